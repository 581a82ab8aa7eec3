"""The frozen weights: which they are, and a digest that shows they did not change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

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
