"""The key/value cache of a call, and what it was filled behind.

A cache holds keys and values that were computed behind some virtual tokens. Going on from it behind others, or behind
none, gives other numbers and no error, so a filled cache carries a `CacheLabel`, and a model that has nothing attached
(any longer) refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache

from ..attention.prefix import PrefixCall
from ..model.sample_inputs import CACHES

if TYPE_CHECKING:
    from ..batch.tasks import Key, Rows

_LABEL = "_prefixcore_label"
"""The attribute of a cache that holds its label."""


def cache_argument(arguments: Mapping[str, Any]) -> Any:
    """The cache that a call is given, under any of its names; None: none."""
    return next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)


def cache_output(output: Any) -> Any:
    """The cache that a model's output holds; None: none. Where the new name is there, reading the old one warns."""
    if isinstance(output, tuple):  # return_dict=False
        return next((each for each in output if isinstance(each, Cache)), None)
    return next((getattr(output, name) for name in CACHES if hasattr(output, name)), None)


def cache_length(cache: Any) -> Any:
    """How many tokens a cache holds: an int, or a tensor [] if it is static.

    States of recurrent layers do not count tokens: 1 where they hold any, in a cache of no other layers.
    """
    try:
        return cache.get_seq_length()
    except ValueError:
        return int(cache.has_previous_state())


def counts_tokens(cache: Any) -> bool:
    """Whether `cache_length` is a number of tokens."""
    try:
        cache.get_seq_length()
    except ValueError:
        return False
    return True


class CacheLabel:
    """What a cache was filled behind. It does not change.

    Attributes:
        keys: of each row what it was filled behind (`Task.key()`), or None.
        rows: the `Rows` of that time.
        order: the keys of the prefixes that are stacked in `prefixes`, and by how much each moves the text's positions.
        prefixes: the `PrefixCall` of that time, so that every token of a sequence sees the same prefix; None: none.
        inserted: how many virtual tokens each row holds in the cache itself: those of soft prompts.
        slots: how many tokens each row of the cache has for them, those that are padding in rows with fewer included.
        first_position: where the first token of the caller stands: at 1 in PaliGemma.
    """

    first_position = 0
    slots = 0

    def __init__(
        self,
        keys: list[Key | None],
        rows: Rows,
        order: dict[Key, int],
        prefixes: PrefixCall | None,
        inserted: list[int],
    ) -> None:
        self.keys, self.rows, self.order, self.prefixes, self.inserted = keys, rows, order, prefixes, inserted
        self.slots = max(inserted, default=0)

    @classmethod
    def inserting(
        cls, before: CacheLabel | None, keys: list[Key | None], rows: Rows, inserted: list[int]
    ) -> CacheLabel:
        """The label `before`, of the prefixes of a call if it had any, with what was put into its rows."""
        if before is None:
            return cls(keys, rows, {}, None, inserted)
        return cls(keys, rows, before.order, before.prefixes, inserted)

    def selecting(self, places: list[int]) -> CacheLabel:
        """The label of the rows at `places` of the cache, in this order."""
        call = self.prefixes
        if call is not None and call.index is not None:
            call = PrefixCall(call.pairs, call.index[call.index.new_tensor(places)], call.lengths)
        keys, inserted = [self.keys[i] for i in places], [self.inserted[i] for i in places]
        label = CacheLabel(keys, self.rows.selecting(places), self.order, call, inserted)
        label.slots, label.first_position = self.slots, self.first_position
        return label

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheLabel:
        return self

    def fits(self, keys: list[Key | None]) -> bool:
        """Whether rows with these keys may go on from the cache; its rows may have been repeated."""
        if len(set(self.keys)) == 1 and set(keys) == set(self.keys):
            return True
        return _repeated(self.keys, len(keys)) == keys

    def prefixes_for(self, keys: list[Key | None]) -> PrefixCall:
        """The prefixes that rows with these keys, which fit, go on behind."""
        call = self.prefixes
        assert call is not None
        if call.index is None or len(call.index) == len(keys):
            return call
        place = {key: i for i, key in enumerate(self.order)}
        index = [place.get(key, -1) if key else -1 for key in keys]
        return PrefixCall(call.pairs, call.index.new_tensor(index), call.lengths)

    def inserted_of(self, num_rows: int) -> list[int]:
        """How many virtual tokens each of `num_rows` rows, which fit, holds in the cache."""
        if len(set(self.inserted)) == 1:
            return [self.inserted[0]] * num_rows
        return _repeated(self.inserted, num_rows)


def _repeated(values: list[Any], count: int) -> list[Any]:
    """`values` as often one after the other as makes `count` of them; fewer if that is no multiple."""
    return [value for value in values for _ in range(count // max(len(values), 1))]


class _Refusing:
    """In place of `cache.update` between the calls of an attached model: a bare model may not go on from the cache."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if cache_length(self.cache) == 0:  # it was emptied
            set_label(self.cache, None)
            return _written(self.cache).update(*args, **kwargs)
        raise RuntimeError(
            "this cache was filled by a model with virtual tokens attached, and is now given to one without (it was "
            "detached, is disabled, or is another model), whose tokens would stand in other places: start a new cache"
        )


class _Forgetting:
    """In place of `cache.reset` of a static cache: an emptied cache was filled behind nothing."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __call__(self) -> None:
        set_label(self.cache, None)
        self.cache.reset()


class _Selecting:
    """In place of a method of a cache that selects, orders or repeats its rows: the label's rows go along."""

    def __init__(self, cache: Cache, name: str) -> None:
        self.cache, self.name = cache, name

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        getattr(type(self.cache), self.name)(self.cache, *args, **kwargs)
        label = get_label(self.cache)
        if label is None or len(set(label.keys)) <= 1:  # whichever rows they are; reading them makes a GPU wait
            return
        (what,) = (*args, *kwargs.values())
        if isinstance(what, int):
            places = [i for i in range(len(label.keys)) for _ in range(what)]
        else:
            places = torch.arange(len(label.keys))[what.cpu()].tolist()
        self.cache.__dict__[_LABEL] = label.selecting(places)


_SELECTING = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")


def get_label(cache: Any) -> CacheLabel | None:
    """The label of a cache; None: it has none, or there is no cache."""
    return None if cache is None else getattr(cache, _LABEL, None)


def set_label(cache: Any, label: CacheLabel | None) -> None:
    """Puts a label on a cache, in place of the one that it has."""
    if label is None:
        for name in (_LABEL, "reset", *_SELECTING):
            cache.__dict__.pop(name, None)
        _written(cache).__dict__.pop("update", None)
        return
    cache.__dict__[_LABEL] = label
    if cache.is_compileable:
        cache.__dict__["reset"] = _Forgetting(cache)
    for name in _SELECTING:
        if hasattr(cache, name):
            cache.__dict__[name] = _Selecting(cache, name)


def open_cache(cache: Any) -> None:
    """Lets a model write to a labelled cache, until `close_cache`."""
    if isinstance(cache, Cache) and not torch.compiler.is_compiling():
        _written(cache).__dict__.pop("update", None)


def close_cache(cache: Any) -> None:
    """Keeps a bare model from writing to a labelled cache."""
    # A compiled step could not see through this, so a static cache goes without.
    if not isinstance(cache, Cache) or torch.compiler.is_compiling() or cache.is_compileable:
        return
    if get_label(cache) is not None:
        _written(cache).__dict__["update"] = _Refusing(cache)


def _written(cache: Cache) -> Any:
    """The cache that every step writes to: of an encoder-decoder's two that of its self-attention."""
    return getattr(cache, "self_attention_cache", cache)


def label_to_continue(cache: Any, keys: list[Key | None]) -> CacheLabel | None:
    """The label of a cache that the call goes on from; None: the call starts a sequence.

    Raises:
        ValueError: the cache was filled behind other virtual tokens than the rows', or behind none, or is none.
    """
    if cache is None:
        return None
    if isinstance(cache, (tuple, list)):
        raise ValueError(
            f"expected a cache of transformers (transformers.Cache), got a {type(cache).__name__}: pairs of keys and "
            "values go into one by DynamicCache(pairs)"
        )
    label, past = get_label(cache), cache_length(cache)
    if label is not None and not (isinstance(past, int) and past == 0):
        if not label.fits(keys):
            raise ValueError(
                "the cache was filled behind other virtual tokens than those of the rows that go on from it: give "
                "each row the task that it began with, or start a new cache"
            )
        if isinstance(past, int) and past < label.slots and counts_tokens(cache):
            raise ValueError(
                f"the cache was cropped to {past} tokens, but it begins with {label.slots} virtual tokens of soft "
                "prompts, which its length counts: crop it to no fewer, or start a new cache"
            )
        return label
    if torch.compiler.is_compiling():  # cannot read how much a static cache holds
        return None
    if label is not None:
        set_label(cache, None)
    elif any(key is not None for key in keys) and int(past) > 0:
        raise ValueError(
            f"the cache holds {int(past)} tokens that were computed without these virtual tokens (before they were "
            "attached, while they were disabled, or by another model): start a new cache, or detach"
        )
    return None
