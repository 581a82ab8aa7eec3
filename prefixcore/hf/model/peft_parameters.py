"""The parameters of PEFT's adapters (a LoRA, say) inside a model, and the gradients that are given back around them."""

from __future__ import annotations

import sys

from torch import nn


def peft_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of PEFT's adapters inside `model`, also of whole modules that they bring (`modules_to_save`)."""
    if "peft" not in sys.modules:  # nothing of PEFT's can be in the model
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        children = module.named_children()
        if isinstance(module, BaseTunerLayer):
            names = set(module.adapter_layer_names)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            names = {name for name, _ in children} - {"original_module"}
        else:
            continue
        for name in names:
            part = getattr(module, name, None)
            own = part.parameters() if isinstance(part, nn.Module) else [part]
            found.update((id(parameter), parameter) for parameter in own if isinstance(parameter, nn.Parameter))
    return list(found.values())


def flags_to_restore(model: nn.Module, frozen: list[tuple[nn.Parameter, bool]]) -> list[tuple[nn.Parameter, bool]]:
    """Which of the gradients that `attach` turned off come back: none, once PEFT has an adapter in the model since."""
    known = {id(parameter) for parameter, _ in frozen}
    return frozen if all(id(parameter) in known for parameter in peft_parameters(model)) else []
