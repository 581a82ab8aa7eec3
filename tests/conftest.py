"""What concerns all tests: Triton's interpreter, and sharing the tests out among processes."""

from __future__ import annotations

import os

import pytest

from tests.device import NAME, shard

if NAME != "cuda":  # before anything imports Triton: where no GPU is under test, its kernels are interpreted
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``PREFIXCORE_TEST_SHARD=2/8`` runs every eighth test from the third on: Triton compiles on one core a process."""
    if which := os.environ.get("PREFIXCORE_TEST_SHARD"):
        mine = shard(items, which)
        config.hook.pytest_deselected(items=[item for item in items if item not in mine])
        items[:] = mine
