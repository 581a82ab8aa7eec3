"""vLLM as the demo and the measurements start it: on this machine, in float32, small enough for a laptop."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from prefixcore.serving import launch

LENGTH = 2048
"""The longest sequence, in tokens; the model's own 8,192 would only reserve more memory."""


def end_with_us() -> None:
    """Lets SIGTERM end this process as Ctrl-C does, so that the server is stopped too."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextlib.contextmanager
def start(
    model: Path, adapters: Path, python: str, log: Path, say: Callable[[str], object], rows: int = 32
) -> Iterator[launch.Server]:
    """The server of a registry for the block; `rows`: how many requests run at once."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    arguments = ["--dtype", "float32", "--max-model-len", str(LENGTH), "--max-num-seqs", str(rows)]
    with launch.start(model, adapters, python=python, arguments=arguments, log=log, say=say) as server:
        yield server
