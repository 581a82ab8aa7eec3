"""What concerns all tests: one thread a process, Triton's interpreter, and sharing the tests out among processes."""

from __future__ import annotations

import gc
import os

import pytest

PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
if PARALLEL:  # before anything imports torch, and for what the tests start: the processes already fill the cores
    os.environ["OMP_NUM_THREADS"] = "1"

from tests.device import NAME, shard  # noqa: E402

if NAME != "cuda":  # before anything imports Triton: where no GPU is under test, its kernels are interpreted
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Names are the same in each process that has a part of the tests: none holds the address of an object.

    ``PREFIXCORE_TEST_SHARD=2/8`` runs every eighth test from the third on: Triton compiles on one core a process.
    """
    if unnamed := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"{unnamed[0]}: its name has an address in it; leave ids=str out, or give names")
    if which := os.environ.get("PREFIXCORE_TEST_SHARD"):
        mine = shard(items, which)
        config.hook.pytest_deselected(items=[item for item in items if item not in mine])
        items[:] = mine


@pytest.fixture(scope="module", autouse=True)
def _imported_objects_stay() -> None:
    """What was imported before a file stays to the end: no collection of garbage need look at it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Libraries whose objects are counted at the end find all of them gone."""
    gc.unfreeze()
