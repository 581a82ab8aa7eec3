"""Ctrl-C for real: a signal to a process that is training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prefixcore.adapters import read_adapter

ROOT = Path(__file__).parents[2]


def start(model_folder, data, out, steps):
    command = [
        sys.executable, "-m", "prefixcore", "train", "--model", model_folder, "--data", data, "--out", out,
        "--method", "prefix", "--num-virtual-tokens", 2, "--steps", steps, "--eval-every", 5,
    ]  # fmt: skip
    return subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        # Tests that run in the background of a shell inherit "ignore SIGINT" from it, and so would this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def interrupt(process):
    """Sends Ctrl-C; returns what came on standard error until the process ended."""
    process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=60)[1]
    finally:
        process.kill()  # no effect on a process that has ended


def wait_for(process, text):
    """Read standard error until `text` comes; returns what came."""
    seen = ""
    guard = threading.Timer(120, process.kill)
    guard.start()
    try:
        for line in process.stderr:
            seen += line
            if text in line:
                return seen
    finally:
        guard.cancel()
    pytest.fail(f"{text!r} never came; standard error was:\n{seen}")


def test_ctrl_c_while_training_saves_what_there_is(model_folder, data, tmp_path):
    out = tmp_path / "adapter"
    with start(model_folder, data, out, steps=1_000_000) as process:
        wait_for(process, "held out, at the start")
        time.sleep(1.0)
        err = interrupt(process)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "steps; saved what there is to" in err
    record = json.loads((out / "training.json").read_text())
    assert record["interrupted"]
    assert 0 < len(record["train_loss"]) < 1_000_000
    assert (out / "curve.png").stat().st_size > 0
    assert read_adapter(out).config.num_virtual_tokens == 2
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_ctrl_c_before_training_writes_nothing(model_folder, data, tmp_path):
    out = tmp_path / "adapter"
    with start(model_folder, data, out, steps=1_000_000) as process:
        wait_for(process, "examples to train on")
        err = interrupt(process)
    assert process.returncode == 130
    assert "Traceback" not in err
    # The signal may come a moment before or after the loop takes over.
    if "nothing was" in err:
        assert not out.exists()
    else:
        assert "saved what there is" in err
