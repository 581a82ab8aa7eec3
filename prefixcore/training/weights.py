"""The frozen weights: which they are, a digest that shows they did not change, and one of what else there is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn


def base_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `(name, parameter)` of the model itself, without the virtual tokens attached to it.

    Examples:
        >>> from prefixcore.training import base_parameters
        >>> bare = len(list(model.parameters()))
        >>> with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4)):
        ...     len(list(base_parameters(model))) == bare
        True
    """
    for name, parameter in model.named_parameters():
        if not name.startswith("prefixcore."):
            yield name, parameter


def weights_digest(model: nn.Module) -> str:
    """SHA-256 (hex) over the name, dtype, shape and bytes of every base parameter, in name order.

    Equal digests before and after training mean that the frozen weights are byte-identical. The
    virtual tokens (submodule `prefixcore`) are left out, so attaching does not change the digest.

    Examples:
        >>> from prefixcore.training import weights_digest
        >>> before = weights_digest(model)
        >>> with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4)):
        ...     weights_digest(model) == before
        True
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(base_parameters(model)):
        tensor = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def configuration_digest(model: Any) -> str:
    """SHA-256 (hex) over what a frozen model computes by besides its weights.

    That is its configuration (RoPE's base, say), its buffers, and of layers that PEFT has put in which of them are
    active and by what they are scaled. Where it lies, who wrote it and what computes attention are left out.

    Examples:
        >>> from prefixcore.training.weights import configuration_digest
        >>> before = configuration_digest(model)
        >>> model.config.rope_parameters["rope_theta"] *= 2
        >>> configuration_digest(model) == before
        False
    """
    digest = hashlib.sha256()
    values = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "_attn_implementation", "attn_implementation"):
        values.pop(name, None)
    digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    for name, buffer in sorted(model.named_buffers()):
        if not name.startswith("prefixcore."):
            digest.update(f"{name} {tensors_digest([buffer])}".encode())
    for name, module in model.named_modules():
        if hasattr(module, "scaling") and hasattr(module, "active_adapters"):  # a tuner layer of PEFT's
            said = [module.scaling, module.active_adapters, module.disable_adapters]
            digest.update(f"{name} {json.dumps(said, sort_keys=True, default=str)}".encode())
    return digest.hexdigest()


def tensors_digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 (hex) over dtype, shape and bytes of tensors, one after another."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
