from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from prefixcore.backends import library
from tests.device import DEVICE, NAME, triton_backend


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills every ``torch.empty`` with NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="package", autouse=NAME != "cpu")
def gpu() -> Iterator[None]:
    """The triton backend in the cpu backend's place, where that is what is under test."""
    torch.set_default_device(DEVICE)
    with triton_backend():
        yield
    torch.set_default_device("cpu")


@pytest.fixture(params=library.host().runnable_isas() if NAME == "cpu" else [NAME])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine can run, in turn; a GPU has but one."""
    if NAME != "cpu":
        yield request.param
        return
    before = library.host().isa()
    library.host().select_isa(request.param)
    yield request.param
    library.host().select_isa(before)
