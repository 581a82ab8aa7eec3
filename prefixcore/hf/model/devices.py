"""Where a model computes, also where accelerate keeps its weights elsewhere between forwards, and what can read them.

An offloaded weight is on the meta device, without values; a hook puts it on the device of computation for each forward
of its module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_PLAIN = (Tensor, nn.Parameter, FakeTensor)


def _offloads(module: nn.Module) -> list[Any]:
    """The hooks of accelerate's that bring the weights of `module` for a forward."""
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return [each for each in hooks if getattr(each, "offload", False) and each.weights_map is not None]


def without_values(model: nn.Module) -> list[str]:
    """The parameters on the meta device that no hook of accelerate's would bring."""
    missing = []
    inside = ""  # of a module whose hook brings the weights of all that it holds
    for name, module in model.named_modules():
        hooks = _offloads(module)
        if any(hook.place_submodules for hook in hooks):
            inside = f"{name}."
        if hooks or (inside and name.startswith(inside)):
            continue
        fields = [
            field for field, parameter in module._parameters.items() if parameter is not None and parameter.is_meta
        ]
        missing += [f"{name}.{field}" if name else field for field in fields]
    return missing


def device_of(module: nn.Module) -> torch.device:
    """The device that the first weight of `module` is on when it computes."""
    for each in module.modules():
        parameter = next((p for p in each._parameters.values() if p is not None), None)
        if parameter is None:
            continue
        if parameter.is_meta:
            for hook in _offloads(each):
                if hook.execution_device is not None:
                    return torch.device(hook.execution_device)
        return parameter.device
    return torch.device("cpu")


def is_plain(weight: Tensor) -> bool:
    """Whether a kernel finds the numbers of a weight in its memory: not in one that torchao has quantised, say."""
    return type(weight) in _PLAIN
