"""These tests belong to the environment that has vLLM: elsewhere nothing here is collected, and nothing skipped."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

os.environ.update(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # several engines and the tests share the cores


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> object:
    from .world import World

    return World(Path(tmp_path_factory.mktemp("serving")))
