"""A plan in Python: the steps of a call, and the words in which the C++ (`csrc/launch/plan.h`) is told of them."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch

_KINDS = {"memory": 1, "kernel": 2, "call": 3, "release": 4}
_PARAMETERS = {"address": 0, "constant": 1, "size": 2, "stride": 3}
_DTYPES = {
    torch.uint8: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.int64: 4, torch.float16: 5, torch.float32: 6,
    torch.float64: 7, torch.bool: 11, torch.bfloat16: 15,
}  # fmt: skip
"""PyTorch's own numbers (`c10::ScalarType`), which its stable C interface takes."""


class NotKept(Exception):
    """Why a call has no plan, in words that follow "not kept:"."""


class View(NamedTuple):
    """A value, or with sizes a view of it; strides and offset count elements."""

    value: int
    sizes: tuple[int, ...] | None = None
    strides: tuple[int, ...] = ()
    offset: int = 0

    def words(self) -> list[int]:
        if self.sizes is None:
            return [self.value, 1]
        return [self.value, 0, self.offset, len(self.sizes), *self.sizes, len(self.strides), *self.strides]


class Address(NamedTuple):
    """A kernel's parameter: `offset` bytes into a value."""

    value: int
    offset: int


class Constant(NamedTuple):
    """A kernel's parameter: so many bits, the lowest first."""

    bits: int


class Measure(NamedTuple):
    """A kernel's parameter: a size or a stride of one of the op's arguments, as it is at each call."""

    value: int
    kind: str  # "size" or "stride"
    dim: int


Parameter = Address | Constant | Measure


class Memory(NamedTuple):
    value: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def words(self) -> list[int]:
        if self.dtype not in _DTYPES:
            raise NotKept(f"memory of {self.dtype}")
        sizes = [len(self.sizes), *self.sizes, len(self.strides), *self.strides]
        return [_KINDS["memory"], 1, self.value, _DTYPES[self.dtype], *sizes]


class Kernel(NamedTuple):
    """A launch: the driver's handle of the kernel, how many programs, threads a program and bytes of shared memory."""

    name: str
    function: int
    programs: int
    threads: int
    shared: int
    parameters: tuple[Parameter, ...]
    any_length: bool = False
    """Whether all that depends on the number of keys is a `Measure`, or the same for all of a `length_bucket`."""

    def words(self) -> list[int]:
        out = [_KINDS["kernel"], 0, _signed(self.function), self.programs, self.threads, self.shared]
        out.append(len(self.parameters))
        for p in self.parameters:
            if isinstance(p, Address):
                out += [_PARAMETERS["address"], p.value, p.offset]
            elif isinstance(p, Measure):
                out += [_PARAMETERS[p.kind], p.value, p.dim]
            else:
                out += [_PARAMETERS["constant"], _signed(p.bits)]
        return out


class Call(NamedTuple):
    """A call of something that is not ours, which `calls.py` knows by its number."""

    name: str
    number: int
    arguments: tuple[View, ...]
    results: tuple[int, ...]

    def words(self) -> list[int]:
        out = [_KINDS["call"], len(self.results), *self.results, self.number, len(self.arguments)]
        return out + [word for view in self.arguments for word in view.words()]


class Release(NamedTuple):
    values: tuple[int, ...]

    def words(self) -> list[int]:
        return [_KINDS["release"], len(self.values), *self.values]


Step = Memory | Kernel | Call | Release


class Plan(NamedTuple):
    """`arguments` tensors come in as the first of `values`; `results` are views of what the steps have made."""

    arguments: int
    values: int
    steps: tuple[Step, ...]
    results: tuple[View, ...]

    @property
    def any_length(self) -> bool:
        """Whether it does for calls of other numbers of keys, of the same `length_bucket`, as well.

        A call of something that is not ours may see the query (value 0), whose shape has nothing to do with them.
        """
        kernels = [step for step in self.steps if isinstance(step, Kernel)]
        calls = [view for step in self.steps if isinstance(step, Call) for view in step.arguments]
        return bool(kernels) and all(k.any_length for k in kernels) and all(v.value == 0 for v in calls)

    def words(self) -> list[int]:
        out = [self.arguments, self.values, len(self.steps)]
        for step in self.steps:
            out += step.words()
        out.append(len(self.results))
        return out + [word for view in self.results for word in view.words()]


def _signed(bits: int) -> int:
    """64 bits as the signed integer that C++ reads."""
    return int(struct.unpack("<q", struct.pack("<Q", bits))[0])
