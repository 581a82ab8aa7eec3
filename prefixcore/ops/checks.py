"""Argument errors: what was expected, what came and, where it helps, how to mend it.

Checks are written `if bad: raise wrong(...)` so that a good call never pays for the words.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..backends import gradients

_functorch: Any = getattr(torch._C, "_functorch", None)  # a binary module, of which the stubs know little


def wrong(kind: type[Exception], name: str, expected: str, got: Any, hint: str = "") -> Exception:
    """The exception to raise for the argument `name`."""
    return kind(f"{name}: expected {expected}, got {got}" + (f"; {hint}" if hint else ""))


def check_tensor(name: str, x: Any) -> None:
    """Raises TypeError unless `x` is a tensor."""
    if not isinstance(x, Tensor):
        raise wrong(TypeError, name, "a tensor", type(x).__name__)


def check_dense(**tensors: Any) -> None:
    """Raises TypeError if one of these is a tensor without a place in memory for each of its numbers.

    A good small call does not pay for it: such a tensor has no shape, or no kernel, and who learns that asks here why.
    """
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            continue
        if x.is_nested:
            hint = "pad it, or pack it with cu_seqlens"
            raise wrong(TypeError, name, "a dense tensor (strided)", "a nested one", hint)
        if x.layout is not torch.strided:
            layout = str(x.layout).removeprefix("torch.").removeprefix("_")
            hint = "convert it with .to_dense()"
            raise wrong(TypeError, name, "a dense tensor (strided)", f"one that is {layout}", hint)
        if hasattr(x, "placements"):
            hint = "give this process's part of the rows or heads: .to_local()"
            raise wrong(TypeError, name, "a tensor of this process", f"a DTensor {x.placements}", hint)


def device_type_of(x: Tensor) -> str:
    """`x.device.type`, which writes a new string whenever it is asked; the quick way where it matters."""
    return "cpu" if x.is_cpu else x.device.type


def has_values(x: Tensor) -> bool:
    """Whether there are numbers in `x` to look at: on the meta device and under `FakeTensorMode` there are none, and in
    code that is being compiled not yet.
    """
    return not (torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor))


def of_all_calls(x: Tensor) -> Tensor:
    """What stands behind an argument under `torch.func.vmap`, the values of all its calls: what can be read."""
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x


def check_derivatives(op: str) -> bool:
    """Whether the call is plain eager code: not being compiled, and under no transform of `torch.func`.

    Raises NotImplementedError where the kernels' derivatives would be lost. Compiled code is checked where it is run.
    """
    return not torch.compiler.is_compiling() and gradients.check_transforms(op)
