"""Stacks of layers that multiply embeddings of ids, and not those that they are given (`scale_embedding` of Marian).

PEFT gives embeddings, so with a soft prompt of its the text of such a model is some twenty times too small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def scales_ids(stack: nn.Module) -> bool:
    """Whether a stack of layers has a factor for the embeddings of ids. Of BART and others the table has it."""
    return getattr(stack, "embed_scale", 1.0) != 1.0


def reads_scaled_ids(model: nn.Module) -> bool:
    """Whether what reads a model's text multiplies the embeddings of ids alone: its encoder, or its only stack."""
    if getattr(model, "main_input_name", None) != "input_ids":
        return False
    whole: Any = model
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        stacks = [whole.get_encoder()]
    else:
        table = getattr(model, "get_input_embeddings", lambda: None)()
        stacks = [stack for stack in model.modules() if any(child is table for child in stack.children())]
    return any(scales_ids(stack) and _scales_ids_alone(stack) for stack in stacks)


def _scales_ids_alone(stack: nn.Module) -> bool:
    """Whether its forward uses the factor for ids, as BlenderbotSmall's decoder does not, and for them alone.

    The decoders of Marian and Pegasus, and FSMT, multiply embeddings that they are given, too, so PEFT's soft prompts
    are right there.
    """
    table = next(stack.parameters())
    ids = torch.zeros(1, 1, dtype=torch.long, device=table.device)
    given = torch.zeros(1, 1, table.shape[-1], device=table.device)
    multiplies_ids, multiplies_given = _multiplies(stack, input_ids=ids), _multiplies(stack, None, inputs_embeds=given)
    return multiplies_ids is not False and not multiplies_given


class _Scaled(Exception):
    """Embeddings were multiplied before anything else was computed of them."""


class _Kept(Exception):
    """Something else was computed of them first."""


class _Watched(Tensor):
    """Ids or embeddings whose forward ends where something is computed of the embeddings, before the first layer."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            is_of_embeddings = any(isinstance(each, cls) and each.is_floating_point() for each in args)
        if is_of_embeddings:
            if func.__name__ in ("mul", "__mul__", "__rmul__", "multiply", "mul_", "__imul__"):
                raise _Scaled
            if func.__name__ in ("add", "__add__", "__radd__", "add_", "__iadd__", "dropout", "layer_norm", "linear"):
                raise _Kept
        return super().__torch_function__(func, types, args, kwargs or {})


def _multiplies(stack: nn.Module, *args: None, **kwargs: Tensor) -> bool | None:
    """Whether a stack's forward multiplies the embeddings of its input; None: its weights are elsewhere or in parts."""
    forward: Any = type(stack).forward  # around what is attached, and around hooks, which an exception would disturb
    try:
        with torch.no_grad():
            forward(stack, *args, **{name: tensor.as_subclass(_Watched) for name, tensor in kwargs.items()})
    except _Scaled:
        return True
    except _Kept:
        return False
    except Exception:
        return None
    return None
