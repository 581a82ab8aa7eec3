"""examples/two_nodes.sh: two torchruns on ports of their own, and one adapter."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import prefixcore
from tests import tiny
from tests.distributed import launch


def test_two_nodes_train_one_adapter(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder, examples = tiny.folder(tmp_path / "model"), launch.ROOT / "examples"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = ["sh", str(examples / "two_nodes.sh"), str(examples / "torchrun_loop.py")]
    process = launch.start(
        [*script, "--model", str(folder), "--out", str(tmp_path / "out"), "--steps", "2"], PORT=port, PATH=path
    )
    try:
        output, _ = process.communicate(timeout=launch.SECONDS)
    finally:
        launch.end(process)
    assert process.returncode == 0, output
    with prefixcore.load(tiny.model(), tmp_path / "out") as handle:
        assert handle.num_virtual_tokens > 1
