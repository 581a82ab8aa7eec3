from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from prefixcore.backends import library
from tests.device import DEVICE, NAME, triton_backend


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Any:
    """Where `PREFIXCORE_GPU_PATH` forces a path for all tests, what it refuses is skipped in its own words."""
    try:
        return (yield)
    except ValueError as error:
        if "PREFIXCORE_GPU_PATH" in os.environ and "path was forced, but" in str(error):
            pytest.skip(str(error))
        raise


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
