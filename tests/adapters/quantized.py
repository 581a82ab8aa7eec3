"""A tensor subclass as torchao has them: int8 numbers and scales, which few operations know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Int8(Tensor):
    """Refuses every operation but `linear`, `embedding` and `dequantize`; `can_dequantize` False: that too."""

    can_dequantize = True

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers: Tensor, scale: Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    def dequantize(self) -> Tensor:
        if not self.can_dequantize:
            raise NotImplementedError("aten.dequantize")
        return self.numbers * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        raise NotImplementedError(f"Int8 dispatch: {func}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return nn.functional.linear(args[0], args[1].numbers * args[1].scale, *args[2:])
        if func is nn.functional.embedding:
            return nn.functional.embedding(args[0], args[1].numbers * args[1].scale)
        return super().__torch_function__(func, types, args, kwargs or {})


class Opaque(Int8):
    can_dequantize = False


def quantize(model: nn.Module, kind: type[Int8] = Int8, modules: type[nn.Module] = nn.Linear) -> None:
    """Puts such weights in place of those of the linear layers (or other `modules`), the head aside."""
    for name, module in model.named_modules():
        if isinstance(module, modules) and name != "lm_head":
            weight = module.weight.detach()
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            numbers = (weight / scale).round().to(torch.int8)
            module.weight = nn.Parameter(kind(numbers, scale), requires_grad=False)
