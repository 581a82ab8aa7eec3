"""A launch of Triton's, as a plan keeps it: which parameters the compiled kernel has, and what stands in them.

Triton 3.6 to 3.9: a kernel's parameters are the arguments in their order, tuples flattened, without those that are
constants of the compiled code (`constexpr` in its signature: what is declared so, None, and the integer 1), and after
them two addresses, of scratch memory that all programs share and of a profiler's, which are null unless it needs them.
Each is read by its own size, little-endian, so that eight bytes hold any of them. Whatever needs more than
`cuLaunchKernel` is not kept.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .plan_words import Address, Constant, Kernel, NotKept, Parameter

_MOST_SHARED = 228 * 1024
"""Bytes of shared memory above which Triton sets an attribute of the launch."""

_PACKED = {
    "i1": "<q", "i8": "<q", "i16": "<q", "i32": "<q", "i64": "<q", "u1": "<Q", "u8": "<Q", "u16": "<Q", "u32": "<Q",
    "u64": "<Q", "fp32": "<f4x", "f32": "<f4x", "fp64": "<d",
}  # fmt: skip


_INTEGERS = ("i32", "i64", "u32", "u64")  # no narrower than a size: the upper bytes are not read


def kernel_of(
    kernel: Any, compiled: Any, programs: int, arguments: dict[str, Any], address_of: Callable[[Tensor], Address],
    measures: dict[str, Any] | None = None,
) -> Kernel:  # fmt: skip
    """The launch of `compiled`, Triton's compiled kernel, with these arguments by name. NotKept: it needs more.

    `measures`: which of them are read from the op's arguments at each call, a `Measure` in the place of each; None if
    the launch is one for this number of keys alone.
    """
    name = kernel.fn.__name__
    metadata = compiled.metadata
    for what, needed in {
        "a cooperative launch": getattr(metadata, "launch_cooperative_grid", False),
        "a programmatic dependent launch": getattr(metadata, "launch_pdl", False),
        "a cluster": getattr(metadata, "num_ctas", 1) != 1,
        "scratch memory": getattr(metadata, "global_scratch_size", 0),
        "a profiler's memory": getattr(metadata, "profile_scratch_size", 0),
        "tensor descriptors": getattr(metadata, "tensordesc_meta", None),
        "an instrumented kernel": getattr(metadata, "instrumentation_mode", ""),
        "oversized shared memory": metadata.shared > _MOST_SHARED,
    }.items():
        if needed:
            raise NotKept(f"{name} needs {what}")
    parameters: list[Parameter] = []
    for parameter, kind in compiled.src.signature.items():
        if parameter not in arguments and kind != "constexpr":
            raise NotKept(f"{name} takes {parameter}, which it was not given by name")
        _add(name, kind, arguments.get(parameter), address_of, parameters, (measures or {}).get(parameter))
    parameters += [Constant(0), Constant(0)]
    threads = 32 * metadata.num_warps
    any_length = measures is not None
    return Kernel(name, compiled.function, programs, threads, metadata.shared, tuple(parameters), any_length)


def _add(
    name: str, kind: Any, value: Any, address_of: Callable[[Tensor], Address], to: list[Parameter], measure: Any
) -> None:
    if isinstance(kind, (tuple, list)):
        measures = measure or (None,) * len(kind)
        for inner_kind, inner, inner_measure in zip(kind, value, measures, strict=True):
            _add(name, inner_kind, inner, address_of, to, inner_measure)
    elif kind == "constexpr":  # also of a measure: what is compiled in is part of the signature
        return
    elif measure:
        if kind not in _INTEGERS:
            raise NotKept(f"{name} takes a size or a stride as a {kind}")
        to.append(measure)
    elif isinstance(kind, str) and kind.startswith("*"):
        to.append(address_of(value) if isinstance(value, Tensor) else Constant(int(value or 0)))
    elif kind in _PACKED:
        number = float(value) if "f" in kind else int(value)
        to.append(Constant(int.from_bytes(struct.pack(_PACKED[kind], number), "little")))
    else:
        raise NotKept(f"{name} takes a {kind}")
