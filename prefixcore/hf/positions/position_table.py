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
from ..model.sample_inputs import reads_tokens
from ..model.signature import argument_names
from .model_inputs import plain_ids

_LENGTHS = 7, 9
"""How many tokens the watched forwards read. What is a table is as long for both; what is made for the input is not."""

_Table = tuple[int | None, int]
"""How many positions there are, None: no limit; and which is that of the first token."""

_tables: WeakKeyDictionary[PreTrainedModel, tuple[tuple[torch.Size, ...], _Table]] = WeakKeyDictionary()
"""What was found out, with the shapes of the embeddings that it holds for."""


def table_limit(model: PreTrainedModel) -> int | None:
    """How many positions the tables of `model` have; None: it computes them, or its tables grow."""
    return _table(model)[0]


def first_position(model: PreTrainedModel) -> int:
    """The `position_ids` of the first token of a text, where `model` counts by itself: 2 in RoBERTa, 0 as a rule."""
    return 0 if is_known(model) else _table(model)[1]


def _table(model: PreTrainedModel) -> _Table:
    shapes = tuple(module.weight.shape for module in model.modules() if isinstance(module, nn.Embedding))
    known = _tables.get(model)
    if known is None or known[0] != shapes:
        known = _tables[model] = (shapes, _find_table(model))
    return known[1]


def position_limit(model: PreTrainedModel) -> int | None:
    """How many positions the model has; None: it computes them, without a limit."""
    if is_known(model):
        return known_position_limit(model)
    return table_limit(model)


def _find_table(model: PreTrainedModel) -> _Table:
    if not reads_tokens(model):
        return None, 0  # what it reads has one size, that of its table
    if any(hasattr(type(module), "make_weights") for module in model.modules()):
        return None, 0  # sines of XGLM and its kind, which make a longer table where one is needed
    if text_config(model).model_type == "mpt":  # a bias for each distance, up to the longest
        return text_config(model).max_seq_len, 0
    found = _watched(model)
    if not found:
        return None, 0
    limit, first = min(found)
    if first and "position_ids" in argument_names(model):
        said = _watched(model, from_zero=True)  # where a table begins later (OPT, BioGPT), positions still begin at 0
        first -= min(said)[1] if said else first
    return limit, first


def _watched(model: PreTrainedModel, from_zero: bool = False) -> set[tuple[int, int]]:
    """The tables of positions, as `_Watch` finds them; `from_zero`: in a forward that is told positions from 0 on."""
    found: set[tuple[int, int]] | None = None
    for length in _LENGTHS:
        ids = plain_ids(model, length)
        watch = _Watch(length)
        told = {"position_ids": torch.arange(length, device=ids.device)[None]} if from_zero else {}
        try:
            with frozen_run(model), watch:
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **told)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception:  # attaching itself says what such a model cannot do
            return set()
        found = watch.tables if found is None else found & watch.tables
    return found or set()


class _Watch(TorchDispatchMode):
    """Watches look-ups whose index is a run of positions, as many as a forward has tokens.

    Attributes:
        length: how many that are.
        tables: how many positions the tables have, and which is the first that is looked up.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.tables: set[tuple[int, int]] = set()

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
            self.tables.add((table.shape[dim] - first, first))


def _first_of_run(index: Tensor, length: int) -> int | None:
    """The first number of an index that counts `length` positions along one of its axes; None: it does not."""
    for dim, size in enumerate(index.shape):
        if size == length and bool((index.diff(dim=dim) == 1).all()):
            return int(index.amin())
    return None
