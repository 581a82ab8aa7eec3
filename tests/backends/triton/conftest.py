"""Where there is no Triton (it is made for Linux), its kernels cannot even be imported."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.backends.triton import stand_in
from tests.device import DEVICE, triton_backend

_NEEDS_TRITON = ("beside", "flash4", "folded", "merged", "registration", "soft_embedding")
collect_ignore = [] if find_spec("triton") else [f"test_{name}.py" for name in _NEEDS_TRITON]


@pytest.fixture(scope="module")
def triton() -> Iterator[None]:
    """Ops run on Triton's kernels, also where there is no GPU."""
    with triton_backend():
        yield


@pytest.fixture
def plans() -> Iterator[stand_in.Interpreted]:
    """Calls have plans, also where there is no GPU; gives what is launched."""
    with stand_in.replaying() as heard:
        yield heard


@pytest.fixture
def ordinary_way() -> Iterator[None]:
    """No call is replayed, also where all others are: what a test watches in Python happens each time."""
    from prefixcore.backends.triton import use_replay

    with use_replay(False):
        yield


@pytest.fixture
def nothing_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are launched and do nothing: for tests of what is kept alone."""
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(InterpretedFunction, "run", lambda *arguments, **options: None)


@pytest.fixture
def with_flash4(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention-4 is installed: on a GPU itself, or the test is skipped; elsewhere what stands in for it."""
    from prefixcore.backends.triton import flash4

    from . import flash4_stand_in

    if DEVICE.type == "cuda":
        if reason := flash4.unavailable(DEVICE):
            pytest.skip(reason)
        return
    monkeypatch.setattr(flash4, "installed", lambda: flash4_stand_in.VERSION)
    monkeypatch.setattr(flash4, "_loaded", lambda: (flash4_stand_in, ""))
    flash4_stand_in.asked.clear()


@pytest.fixture
def without_flash4(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention-4 is not installed, whatever is: what PyTorch's cannot do is left to our own kernels."""
    from prefixcore.backends.triton import flash4

    monkeypatch.setattr(flash4, "installed", lambda: None)
