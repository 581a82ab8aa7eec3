"""A plugin: calls are recorded and replayed in every test, as on a GPU with `PREFIXCORE_REPLAY=1`.

PREFIXCORE_TEST_DEVICE=interpreter python -m pytest -p tests.backends.triton.always_replayed FILE
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.backends.triton import stand_in


@pytest.fixture(scope="session")
def kernels() -> Iterator[stand_in.Interpreted]:
    """Those of all tests: plans outlive the test that made them."""
    with stand_in.replaying() as heard:
        yield heard


@pytest.fixture(autouse=True)
def replayed(kernels: stand_in.Interpreted) -> Iterator[None]:
    """Anew in each test: those of replay itself end it."""
    from prefixcore.backends.triton import replay

    with stand_in.on_launch(kernels.run, kernels.count), replay.use_replay(True):
        replay._switch.read_launch = kernels.read
        yield
