"""Cartridges (HazyResearch): one `.pt` file with the keys and values of every layer (arXiv:2506.06266).

`torch.save` of four lists, `trainable_keys`, `trainable_values` and the first tokens that stay as they are,
`frozen_keys`, `frozen_values` (`fixed_keys`, `fixed_values` in files of 2025), each with one `[1, Hkv, tokens, D]` a
layer. Keys are as attention sees them, and the text behind a cartridge begins at position P: our convention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..storage import naming
from .files import load_torch, save_torch
from .record import PREFIX, Contents, Facts, KeyValues, Written, all_layers, as_numbers, one_shape, rounded

_TRAINED = ("trainable_keys", "trainable_values")
_FROZEN = (("frozen_keys", "frozen_values"), ("fixed_keys", "fixed_values"))


class _Parameters:
    """What stands for `torch.nn.ParameterList` in a file, of which the tensors alone are taken."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []

    def __setstate__(self, state: Any) -> None:
        parameters = state.get("_parameters") if isinstance(state, dict) else None
        self.tensors = [] if parameters is None else [parameters[name] for name in sorted(parameters, key=int)]


class Cartridges:
    """The files of https://github.com/HazyResearch/cartridges."""

    name = "cartridges"
    title = "HazyResearch Cartridges"
    kinds: tuple[str, ...] = (PREFIX,)
    is_folder = False
    position_offset = True
    needs_model = False
    layout = ".pt: lists of keys and values [1, Hkv, tokens, D] a layer, frozen tokens apart"
    lost = "manifest, heads; a prefix in some layers alone is refused"

    def read(self, source: Path, facts: Facts) -> Contents:
        """A cartridge, old or new."""
        saved = load_torch(source, {"torch.nn.modules.container.ParameterList": _Parameters})
        with naming(source):
            if not isinstance(saved, dict):
                raise AdapterError(f"expected a dictionary of lists, got {type(saved).__name__}")
            frozen_names = next((names for names in _FROZEN if names[0] in saved), _FROZEN[0])
            trained = [_tensors(saved, name) for name in _TRAINED]
            frozen = [_tensors(saved, name) for name in frozen_names]
            layers = len(trained[0])
            if not layers:
                raise AdapterError("trainable_keys: expected one tensor a layer, got none")
            for name, found in zip((*_TRAINED, *frozen_names), (*trained, *frozen), strict=True):
                if len(found) != layers and (found or name in _TRAINED):
                    raise AdapterError(f"{name}: {len(found)} tensors, but trainable_keys has {layers}")
            prefix = [
                tuple(_joined(frozen[i], trained[i], layer, frozen_names[i]) for i in (0, 1)) for layer in range(layers)
            ]
            pairs: KeyValues = [(key, value) for key, value in prefix]
            tokens = {tensor.shape[1] for pair in pairs for tensor in pair}
            if len(tokens) != 1:
                raise AdapterError(f"layers have different numbers of virtual tokens, {sorted(tokens)}")
            num_frozen = frozen[0][0].shape[2] if frozen[0] else 0
            return Contents(prefix=pairs, num_frozen_tokens=num_frozen)

    def write(self, contents: Contents, facts: Facts, dtype: torch.dtype) -> Written:
        """A file that both their current code and that of 2025 find their names in."""
        prefix = all_layers(contents, self.title)
        one_shape(prefix, self.title)
        frozen = contents.num_frozen_tokens
        if frozen >= contents.num_virtual_tokens:
            raise AdapterError("a cartridge has tokens that are trained, but all of this prefix are frozen")
        lists: dict[str, list[nn.Parameter]] = {}
        for i, trained in enumerate(_TRAINED):
            tensors = [rounded(trained, pair[i], dtype)[None] for pair in prefix]
            lists[trained] = [nn.Parameter(t[:, :, frozen:].clone()) for t in tensors]
            for names in _FROZEN:  # one storage for both names
                first = lists.get(_FROZEN[0][i])
                lists[names[i]] = first or [
                    nn.Parameter(t[:, :, :frozen].clone(), requires_grad=False) for t in tensors
                ]
        return Written({"": save_torch({name: nn.ParameterList(found) for name, found in lists.items()})})


def _tensors(saved: dict[Any, Any], name: str) -> list[Any]:
    if name not in saved:
        raise AdapterError(f"{name}: missing; a cartridge has {', '.join(_TRAINED)}, {', '.join(_FROZEN[0])}")
    found = saved[name]
    if isinstance(found, _Parameters):
        return found.tensors
    if found is None:
        return []
    if not isinstance(found, (list, tuple)):
        raise AdapterError(f"{name}: expected a list of tensors, got {type(found).__name__}")
    return list(found)


def _joined(frozen: list[Any], trained: list[Any], layer: int, frozen_name: str) -> Tensor:
    """Keys or values [Hkv, P, D] of a layer."""
    name = frozen_name.replace("frozen", "trainable").replace("fixed", "trainable")
    last = as_numbers(f"{name}[{layer}]", trained[layer], [1, None, None, None])[0]
    if not frozen or not isinstance(frozen[layer], Tensor) or frozen[layer].numel() == 0:
        return last
    first = as_numbers(f"{frozen_name}[{layer}]", frozen[layer], [1, last.shape[0], None, last.shape[2]])[0]
    return torch.cat((first, last), 1)
