"""How many positions a model has: rows of a table that it looks positions up in.

Positions beyond the table are an IndexError on a CPU and a device assertion on a GPU, which ends the process. So the
table is found when virtual tokens are attached, by watching which look-ups of a forward have positions for an index,
whatever the table is: a trained embedding (GPT-2, OPT with its offset of 2), sines in a buffer (CodeGen, GPT-J, CTRL).
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ..attention.patch import frozen_run
from ..families import is_known, text_config
from ..families import position_limit as known_position_limit
from .model_inputs import plain_ids

_LENGTHS = 7, 9
"""How many tokens the watched forwards read. What is a table is as long for both; what is made for the input is not."""

_limits: WeakKeyDictionary[PreTrainedModel, tuple[tuple[torch.Size, ...], int | None]] = WeakKeyDictionary()
"""What was found out, with the shapes of the embeddings that it holds for."""


def table_limit(model: PreTrainedModel) -> int | None:
    """How many positions the tables of `model` have; None: it computes them, or its tables grow."""
    shapes = tuple(module.weight.shape for module in model.modules() if isinstance(module, nn.Embedding))
    known = _limits.get(model)
    if known is None or known[0] != shapes:
        known = _limits[model] = (shapes, _find_limit(model))
    return known[1]


def position_limit(model: PreTrainedModel) -> int | None:
    """How many positions the model has; None: it computes them, without a limit."""
    if is_known(model):
        return known_position_limit(model)
    return table_limit(model)


def _find_limit(model: PreTrainedModel) -> int | None:
    if any(hasattr(type(module), "make_weights") for module in model.modules()):
        return None  # sines of XGLM and its kind, which make a longer table where one is needed
    if text_config(model).model_type == "mpt":  # a bias for each distance, up to the longest
        return text_config(model).max_seq_len
    found: set[int] | None = None
    for length in _LENGTHS:
        ids = plain_ids(model, length)
        watch = _Watch(length)
        try:
            with frozen_run(model), watch:
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception:  # attaching itself says what such a model cannot do
            return None
        found = watch.limits if found is None else found & watch.limits
    return min(found or (), default=None)


class _Watch(TorchDispatchMode):
    """Watches look-ups whose index is a run of positions, as many as a forward has tokens.

    Attributes:
        length: how many that are.
        limits: how many positions the tables have.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.limits: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "embedding":
            self._see(args[0], 0, args[1])
        elif name in ("index_select", "gather"):
            self._see(args[0], args[1], args[2])
        elif name == "index":
            indexed = [(dim, index) for dim, index in enumerate(args[1]) if index is not None]
            if len(indexed) == 1:
                self._see(args[0], *indexed[0])
        return func(*args, **(kwargs or {}))

    def _see(self, table: Tensor, dim: int, index: Tensor) -> None:
        # A table is looked up along one axis, and is longer than the input, whose own tokens may be picked as well.
        if table.dim() == 0 or index.dtype not in (torch.int32, torch.int64) or table.shape[dim] <= self.length:
            return
        first = _first_of_run(index, self.length)
        if first is not None:
            self.limits.add(table.shape[dim] - first)


def _first_of_run(index: Tensor, length: int) -> int | None:
    """The first number of an index that counts `length` positions along one of its axes; None: it does not."""
    for dim, size in enumerate(index.shape):
        if size == length and bool((index.diff(dim=dim) == 1).all()):
            return int(index.amin())
    return None
