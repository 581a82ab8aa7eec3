"""Checks that several configurations share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor

KeyValues: TypeAlias = Sequence[tuple[Tensor, Tensor]]
"""One (key [Hkv, P, D], value [Hkv, P, Dv]) a layer."""


def check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def count_virtual_tokens(init: Any) -> int:
    """P of initial values given as tensors; shapes are checked against the model later."""
    if isinstance(init, Tensor):
        if init.dim() != 2:
            raise ValueError(f"init as a tensor must be [P, width], got shape {list(init.shape)}")
        return init.shape[0]
    for layer, pair in enumerate(init):
        is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
        if not is_pair or not all(isinstance(t, Tensor) and t.dim() == 3 for t in pair):
            raise ValueError(
                f"init must hold a (key [Hkv, P, D], value [Hkv, P, Dv]) pair a layer; entry {layer} does not"
            )
    if len(init) == 0:
        raise ValueError("init holds no layer: expected one (key, value) pair for every layer with a prefix")
    return init[0][0].shape[1]


def check_virtual_token_ids(ids: Any, num_virtual_tokens: int | None) -> None:
    if ids is None:
        return
    each = [ids] if isinstance(ids, int) else ids
    are_ids = isinstance(each, (list, tuple)) and all(type(i) is int and i >= 0 for i in each)
    if not are_ids or not each or len(set(each)) != len(each):
        raise ValueError(f"virtual_token_ids must be a token id, or a list of different ones, got {ids!r}")
    if not isinstance(ids, int) and num_virtual_tokens is not None and len(each) != num_virtual_tokens:
        raise ValueError(
            f"virtual_token_ids holds {len(each)} ids for {num_virtual_tokens} virtual tokens: give one for each, or "
            "one for all"
        )


def check_prompt_tensor(init: Any) -> None:
    if not isinstance(init, (str, Tensor)):
        raise ValueError("init of a soft prompt must be a single tensor [P, hidden], got a sequence")
