"""Which backend an op uses: one small rule that can be asked and forced.

`PREFIXCORE_BACKEND` forces one for the whole process, `use_backend` for a block of code.
A forced backend that cannot do what it is asked raises; nothing falls back silently.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ..backends import cpu, cuda, library, triton
from ..backends.forced import Forced
from ..backends.protocol import DTYPES, Backend

TABLE: dict[str, dict[str, tuple[Backend, ...]]] = {
    "prefix_attention": {"cpu": (cpu,), "cuda": (triton,)},
    "soft_embedding": {"cpu": (cpu,), "cuda": (cuda, triton)},
}
"""For each op and type of device its backends: the first that does not refuse is the default, and else the reference.

A new backend is a place in a row; see `prefixcore/backends/protocol.py`.
"""

OPS = tuple(TABLE)
_BY_NAME = {backend.NAME: backend for row in TABLE.values() for backends in row.values() for backend in backends}
BACKENDS = (*_BY_NAME, "reference")

_forced = Forced("backend", os.environ.get("PREFIXCORE_BACKEND"))


class Choice(NamedTuple):
    """A backend's name and, in words, why it is the one."""

    name: str
    why: str


def backend_name(op: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend of `op`; see `which_backend`. Cheap: every call of an op asks it."""
    name = _forced.name
    if name is None:
        for backend in TABLE[op].get(device_type, ()):
            if backend.refuses(op, device_type, dtype) is None:
                name = backend.NAME
                break
        else:
            return "reference"
    elif name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r} (PREFIXCORE_BACKEND): use one of {BACKENDS}")
    elif name != "reference" and (reason := _BY_NAME[name].refuses(op, device_type, dtype)):
        raise ValueError(f"the {name} backend was forced, but {reason}; stop forcing it, or force 'reference'")
    if name != "reference" and not library.BUILT:
        library.require()
    return name


def which_backend(op: str, device: torch.device | str, dtype: torch.dtype) -> Choice:
    """The backend that `op` uses for tensors on `device` with `dtype`, and why.

    Args:
        op: "prefix_attention" or "soft_embedding".
        device: of the tensors; its type alone counts.
        dtype: of the tensors.

    Returns:
        The backend's `name`, and in words `why` it is the one.

    Raises:
        TypeError: `dtype` is none.
        ValueError: an unknown op, or a forced backend that is unknown or cannot do this.
        RuntimeError: the compiled library that would be used is missing.

    Examples:
        >>> prefixcore.which_backend("prefix_attention", "cpu", torch.float64).name
        'reference'
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}: use one of {OPS}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {dtype!r}")
    device_type = torch.device(device).type
    name = backend_name(op, device_type, dtype)
    if _forced.name is not None:
        return Choice(name, "forced")
    if name != "reference":
        return Choice(name, _BY_NAME[name].describe())
    return Choice(name, _why_not_kernels(op, device_type, dtype))


def _why_not_kernels(op: str, device_type: str, dtype: torch.dtype) -> str:
    backends = TABLE[op].get(device_type)
    if backends is None:
        return f"no backend has kernels for {device_type}"
    refusals = {backend.NAME: backend.refuses(op, device_type, dtype) for backend in backends}
    return "; ".join(f"the {name} backend refuses: {reason}" for name, reason in refusals.items())


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Forces one backend (see `BACKENDS`) inside a `with` block; `None` forces none.

    For the whole process while the block runs, not for its thread alone: threads that force different backends at
    the same time are in each other's way.

    Args:
        name: "cpu", "cuda", "triton" or "reference"; None: none is forced.

    Raises:
        ValueError: no backend of this name; one that cannot do what it is asked says so when it is called.

    Examples:
        >>> with prefixcore.use_backend("reference"):
        ...     prefixcore.which_backend("soft_embedding", "cpu", torch.float32)
        Choice(name='reference', why='forced')
    """
    with _forced.within(name, BACKENDS):
        yield


def explain() -> list[tuple[str, str, str, str, str]]:
    """Rows (op, device, dtype, backend, why) for what this machine has: what `prefixcore doctor` prints.

    A backend "none" is one that is forced and cannot do it, or is missing; `why` says which.

    Examples:
        >>> from prefixcore.ops import explain
        >>> explain()[3][:4]
        ('prefix_attention', 'cpu', 'float64', 'reference')
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows = []
    for op in OPS:
        for device in devices:
            for dtype in (*DTYPES, torch.float64):
                try:
                    choice = which_backend(op, device, dtype)
                except (RuntimeError, ValueError) as error:
                    choice = Choice("none", str(error))
                rows.append((op, device, str(dtype).removeprefix("torch."), choice.name, choice.why))
    return rows
