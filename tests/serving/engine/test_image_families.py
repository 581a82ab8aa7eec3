"""Each family that reads images, too: its text and its images with a prefix and without, beside transformers.

Two are tried with every change, and the server with it; all of them by `make serve-test ARGS="-m slow"`. Each in a
process of its own, since torchvision lies where these alone look (`.ci/serve_env.sh`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefixcore.serving.families import WITH_IMAGES

TORCHVISION = Path(sys.prefix, "images")
OFTEN = ("qwen2_5_vl", "qwen3_5_text")
"""Positions of three axes; linear attention."""
OF_TEXT = ("qwen3_5_text", "qwen3_5_moe_text")
"""They read none, and vLLM loads them with the code of those that do."""


@pytest.mark.parametrize(
    "family",
    [*OFTEN, *(pytest.param(each, marks=pytest.mark.slow) for each in (*WITH_IMAGES, *OF_TEXT) if each not in OFTEN)],
)
def test_a_family(family: str) -> None:
    run("image_world", family)


@pytest.mark.slow
def test_compiled() -> None:
    run("image_world", OFTEN[0], "compiled")


def test_the_server() -> None:
    run("image_front")


def run(module: str, *arguments: str) -> None:
    paths = [str(TORCHVISION), *(path for path in sys.path if path)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", f"tests.serving.engine.{module}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
