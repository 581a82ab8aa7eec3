"""`make gpu` where there is no GPU, and how it shares out the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.device import shard

ROOT = Path(__file__).resolve().parents[3]


def test_without_a_gpu_it_says_so_and_fails(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / ".ci" / "gpu.py", "--out", tmp_path / "out"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # the GPU of the machine, if there is one
    result = subprocess.run(command, capture_output=True, text=True, env=hidden)
    assert result.returncode == 1
    assert "finds no NVIDIA GPU here, so nothing was run" in result.stderr
    assert not (tmp_path / "out").exists()
    result = subprocess.run([*command, "--wheels", tmp_path / "none"], capture_output=True, text=True, env=hidden)
    assert result.returncode == 1
    assert "is not a folder" in result.stderr


def test_every_test_is_in_one_share(request: pytest.FixtureRequest) -> None:
    items = request.session.items
    shares = [shard(items, f"{index}/3") for index in range(3)]
    assert sorted(item.nodeid for share in shares for item in share) == sorted(item.nodeid for item in items)
