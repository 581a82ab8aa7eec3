"""Virtual tokens and adapters of PEFT's (a LoRA, say) in one model: neither freezes the other without a word.

`attach` freezes all that it finds in a model, and PEFT freezes all that is not its own, whichever comes second.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...nn.trained import trained_parameters
from ..model.peft_parameters import peft_parameters
from .peft_checkpoint import extend_peft_checkpoints

if TYPE_CHECKING:
    from .attached import Attached
    from .bank import Bank


def warn_of_frozen_peft(model: nn.Module) -> None:
    """Warns if adapters of PEFT's in `model` are trained, which `attach` is about to freeze."""
    extend_peft_checkpoints()
    if any(parameter.requires_grad for parameter in peft_parameters(model)):
        warnings.warn(
            "the model holds adapters of PEFT's that are trained; attach freezes them with the rest of the model. Call "
            "handle.train_with_peft() to train both, before the optimizer is made",
            stacklevel=4,
        )


def check_not_frozen(bank: Bank, adapter: Attached) -> None:
    """Warns once, in a training forward, if PEFT has frozen virtual tokens that were to be trained.

    Raises:
        RuntimeError: PEFT has put an adapter into the module that is trained here.
    """
    if not torch.compiler.is_compiling():
        extend_peft_checkpoints()
    trained = adapter.trained
    if not trained or any(parameter.requires_grad for parameter in trained):
        return
    adapter.trained = []  # said once is enough
    if any("base_layer" in module._modules for module in adapter.module.modules()):
        raise RuntimeError(
            "PEFT has put its adapter into the reparameterization of the virtual tokens too: give its configuration "
            "exclude_modules='.*prefixcore.*'"
        )
    if any(parameter.requires_grad for parameter in peft_parameters(bank.model)):
        of = "" if adapter.name is None else f" of {adapter.name!r}"
        warnings.warn(
            f"PEFT has frozen the virtual tokens{of}, which were to be trained when they were attached, and trains its "
            "own adapter alone. Call handle.train_with_peft() to train both, or handle.train_with_peft(virtual_tokens="
            "False) to leave it so, before the optimizer is made",
            stacklevel=2,
        )


def train_together(bank: Bank, adapter: Attached, *, virtual_tokens: bool, peft: bool) -> None:
    """Says which of the two are trained.

    Raises:
        ValueError: the virtual tokens are kept apart from the model, to be used and not trained.
    """
    extend_peft_checkpoints()
    if virtual_tokens and not adapter.is_kept:
        raise ValueError(
            f"the virtual tokens of {adapter.name!r} were loaded to be used: load them with trainable=True"
        )
    own = [parameter for _, parameter in trained_parameters(adapter.module)]
    for parameter in own:
        parameter.requires_grad_(virtual_tokens)
    adapter.trained = own if virtual_tokens else []
    frozen = {id(parameter): flag for parameter, flag in bank.patch.frozen}
    for parameter in peft_parameters(bank.model):
        if not peft:
            parameter.requires_grad_(False)
        elif frozen.get(id(parameter), False):  # as it was before attach
            parameter.requires_grad_(True)
