from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from prefixcore.backends import library


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills every ``torch.empty`` with NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=library.host().runnable_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine can run, in turn."""
    before = library.host().isa()
    library.host().select_isa(request.param)
    yield request.param
    library.host().select_isa(before)
