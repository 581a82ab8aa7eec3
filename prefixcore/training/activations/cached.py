"""Calls of a model that begin at the first layer whose prefix is trained, where what comes before is known."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...hf.lower_layers import LowerLayers
from ..batch import Batch, call_model
from ..data import TokenizedExample, pad_id
from .check import CacheError, Found, check_exact
from .disk import Folder, identity
from .room import PLACES, Size, check_room
from .rows import Rows, Text, distinct, text_of

PROBES = 3
"""Examples of the batch that the check is made with."""


class CachedActivations:
    """Calls a model with batches, and keeps what its layers below the trained prefix make of each text.

    A batch whose texts are all known begins at the first layer whose prefix is trained. Any other one runs through all
    layers, and what the lower ones make of its texts is kept.

    Args:
        lower: the layers.
        rows: where it is kept.
        found: what layers pass on.

    Attributes:
        lower: the layers below the trained prefix.
        rows: what is kept.
        calls: how many calls of the model have begun at that layer.

    Examples:
        >>> from prefixcore.training import Example, cache_activations, tokenize
        >>> handle = prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4, layers=[1]))
        >>> examples = tokenize(tokenizer, [Example("Peru ->", " Lima")])
        >>> with cache_activations(handle, tokenizer, examples, "memory") as cached:
        ...     cached.calls, cached.rows.is_complete
        (0, False)
    """

    def __init__(self, lower: LowerLayers, rows: Rows, found: Found) -> None:
        self.lower, self.rows, self._found = lower, rows, found
        self.calls = 0

    def __call__(self, model: Any, batch: Batch) -> Any:
        """The model's output for a batch."""
        texts = [text_of(example) for example in batch.examples]
        if all(text in self.rows.known for text in texts):
            self.calls += 1
            with self.lower.given(self._gather(batch, texts)):
                return call_model(model, batch)
        with self.lower.recorded() as seen:
            output = call_model(model, batch)
        hidden = seen[-1].flatten(0, 1)
        for text, place in zip(texts, batch.places, strict=True):
            self.rows.put(text, hidden[place])
        return output

    def _gather(self, batch: Batch, texts: Sequence[Text]) -> Tensor:
        """What the lower layers pass on of a batch, [B, T, E]; zeros at padding, which nothing sees."""
        count, length = batch.shape
        hidden = torch.zeros(count * length, self._found.width, dtype=self._found.dtype, device=self._found.device)
        for text, place in zip(texts, batch.places, strict=True):
            hidden[place] = self.rows.get(text).to(hidden.device, hidden.dtype, non_blocking=True)
        return hidden.view(count, length, -1)


@contextmanager
def cache_activations(
    handle: Any,
    tokenizer: Any,
    examples: Sequence[TokenizedExample],
    place: str,
    *,
    dtype: torch.dtype | None = None,
    folder: str | Path | None = None,
    packed: bool | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[CachedActivations]:
    """A block in which the activations of some examples are kept, for the model that the prefix of `handle` is on.

    Args:
        handle: of a prefix that is not trained in the first layers: `layers` leave them out, or `train_layers` does.
        tokenizer: the model's; only its padding id is used.
        examples: all that may be kept; of others nothing is.
        place: "memory", or "disk".
        dtype: of what is kept; None: the model's own, with which nothing is lost.
        folder: where on the disk. It stays, and what is in it is taken again for the same weights, configuration,
            examples, layer, prefix below it, positions and dtype. None: a temporary one.
        packed: batches that the check is made with; None: where `handle.can_pack`.
        say: told how much it takes before anything is kept, and what is taken of the folder.

    Raises:
        CacheError: the model's layers cannot be cut in two, or the prefix reaches the first one.
        ValueError: no such place, a folder of others, or no room.

    Examples:
        >>> from prefixcore.training import Example, cache_activations, held_out_loss, tokenize
        >>> handle = prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4, layers=[1]))
        >>> examples = tokenize(tokenizer, [Example("Peru ->", " Lima"), Example("Norway ->", " Oslo")])
        >>> with cache_activations(handle, tokenizer, examples, "memory", say=print) as cached:
        ...     first = held_out_loss(model, examples, pad_token_id=0, call=cached)
        ...     second = held_out_loss(model, examples, pad_token_id=0, call=cached)
        activations before layer 1 take 3.5 KiB (28 tokens of 32 numbers in float32) in memory
        >>> first == second, cached.calls
        (True, 1)
    """
    if place not in PLACES:
        raise ValueError(f"cache_activations must be one of {', '.join(map(repr, PLACES))} or None, got {place!r}")
    try:
        lower = LowerLayers(handle)
    except (ValueError, NotImplementedError) as error:
        raise CacheError(f"activations cannot be kept: {error}") from error
    found = _check(handle, tokenizer, lower, examples, handle.can_pack if packed is None else packed)
    texts = distinct(examples)
    size = Size(sum(map(len, texts)), found.width, dtype or found.dtype)
    takes = f"activations before layer {lower.first} take {size}"
    if place == "memory":
        check_room(size, place)
        say(f"{takes} in memory")
        yield CachedActivations(lower, Rows(texts, torch.empty(size.tokens, size.width, dtype=size.dtype)), found)
        return
    with tempfile.TemporaryDirectory(prefix="prefixcore-activations-") as temporary:
        kept = Folder(Path(folder if folder is not None else temporary))
        of = identity(handle.model, texts, size, lower.first, handle._adapter.shift, lower.prefix)
        rows, why = kept.open(texts, size, of, lambda: check_room(size, place, kept.path))
        if why is not None:
            say(f"the activations in {kept.path} are not taken ({why}), and are made anew")
        there = f", {len(rows.known):,} of {len(texts):,} texts are there already" if rows.known else ""
        say(f"{takes} in {kept.path}{there}")
        before = len(rows.known)
        try:
            yield CachedActivations(lower, rows, found)
        finally:
            if folder is not None and len(rows.known) > before:
                kept.close(rows, of)


def _check(
    handle: Any, tokenizer: Any, lower: LowerLayers, examples: Sequence[TokenizedExample], packed: bool
) -> Found:
    """What layers pass on; CacheError: the model cannot begin above them."""
    probes = sorted(examples, key=lambda example: example.length)[:PROBES]
    parameters = [parameter for parameter in handle.parameters() if parameter.requires_grad]
    model, padding = handle.model, pad_id(tokenizer, handle.model)
    device = next(model.parameters()).device
    batch = Batch.of(probes, padding, packed=packed, device=device)
    first = Batch.of(probes[:1], padding, packed=packed, device=device)
    try:
        return check_exact(model, lower, parameters, batch, first)
    except NotImplementedError as error:
        raise CacheError(f"activations cannot be kept: {error}") from error
