"""What the prefix starts from: the text's own keys and values, of P of its tokens, or fitted to all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapters import AdapterError
from ..audit.attention_mass import virtual_weights
from ..audit.errors import NotMeasuredError
from ..audit.running import FrozenRun, WatchedCall
from ..audit.virtual import VirtualTokens
from ..hf.attention.prefix import KeyValue
from ..hf.positions.rotary import turn
from .front import Front
from .matching import fitted
from .reads import Row, further, reads_of
from .targets import Target

MOST_PROMPTS = 16
"""Whose attention on the text is measured."""


class Start(NamedTuple):
    """Where a prefix starts from.

    Attributes:
        values: one (key [Hkv, P, D], value [Hkv, P, Dv]) a layer.
        places: of the text's tokens that they are of; none where they were fitted to the text.
        kind: how these were chosen.
        why: in words, where that is another way than was asked for; else empty.
    """

    values: list[KeyValue]
    places: list[int]
    kind: str
    why: str = ""


def starting_values(
    model: Any, front: Front, count: int, kind: str, targets: Sequence[Target], own: list[KeyValue]
) -> Start:
    """Keys and values of `count` tokens of the text, or as many fitted to what prompts are answered behind all.

    What was computed at a token's place in the text is moved to its place in the prefix, so that the prompt stands
    behind the last of them as it stands behind the text; what is fitted stands as far from the prompt as it stood
    there. On a model whose keys cannot be moved, the first tokens, which need no moving, are taken; where its attention
    cannot be watched, tokens spread evenly.

    Args:
        model: the model, with nothing attached.
        front: the text.
        count: P.
        kind: "first", "spread", "mass" or "match".
        targets: prompts and answers, whose attention on the text is the mass, or is matched.
        own: the keys and values of the whole text.
    """
    places, asked, why = list(range(count)), kind, ""
    try:
        turn(model, [(key[:, :1].cpu(), value[:, :1].cpu()) for key, value in own], 1)
    except AdapterError as error:
        kind, why = "first", str(error)
    if kind == "match":
        try:
            return Start(matched(model, front, count, targets, own), [], kind)
        except NotMeasuredError as error:
            kind, why = "spread", str(error)
    if kind == "mass":
        try:
            places = heaviest(attention_on(model, front, targets), count)
        except NotMeasuredError as error:
            kind, why = "spread", str(error)
    if kind == "spread":
        places = spread(len(front.ids), count)
    if kind == asked:
        return Start(moved(model, own, places), places, kind)
    which = "the first tokens" if kind == "first" else "tokens spread evenly"
    why = f"it starts from {which}, not from {asked!r} ({why})"
    return Start(moved(model, own, places), places, kind, why)


def matched(model: Any, front: Front, count: int, targets: Sequence[Target], own: list[KeyValue]) -> list[KeyValue]:
    """Keys and values fitted to what the text answers the queries of prompts and answers; see `matching`.

    To fit them again, to the queries that they call forth themselves, brings them no nearer.
    """
    if front.pairs is None:
        raise NotMeasuredError("no prefix is equal to the text")
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [
        Row(each.asked.behind + each.answer, each.asked.alone + each.answer) for each in map(targets.__getitem__, order)
    ]
    reads = reads_of(model, own, rows)
    found = [fitted(each, key, value, count) for each, (key, value) in zip(reads, own, strict=True)]
    # As far from the words that request and teacher's row share as the text was.
    return turn(model, found, count + further(rows[0]) - len(front.ids))


def spread(length: int, count: int) -> list[int]:
    """`count` places out of `length`, the first and the last among them."""
    if count == 1:
        return [0]
    return [round(i * (length - 1) / (count - 1)) for i in range(count)]


def heaviest(mass: Tensor, count: int) -> list[int]:
    """The first place, on which attention rests where it finds nothing, and those of the largest mass [N], in order."""
    mass = mass.clone()
    mass[0] = torch.inf
    return sorted(mass.topk(count).indices.tolist())


def attention_on(model: Any, front: Front, targets: Sequence[Target]) -> Tensor:
    """The attention [N] that a few prompts and answers pay to each token of the text, summed over what reads.

    Each layer and head counts the same, and so does each token that reads.

    Raises:
        NotMeasuredError: no prefix is equal to the text, or the model's attention cannot be watched.
    """
    if front.pairs is None:
        raise NotMeasuredError("no prefix is equal to the text")
    virtual = VirtualTokens(len(front.ids), tuple(range(len(front.ids))), dict(enumerate(front.pairs)))
    total = torch.zeros(len(front.ids), dtype=torch.float64)
    run = FrozenRun(model)

    def watch(call: WatchedCall) -> None:
        total.add_(virtual_weights(call)[0].double().sum(1).mean(0).cpu())  # [H, T, N]

    for target in targets[:MOST_PROMPTS]:
        run(torch.tensor([target.asked.behind + target.answer], device=model.device), virtual=virtual, watch=watch)
    return total


def moved(model: Any, pairs: list[KeyValue], places: list[int]) -> list[KeyValue]:
    """The keys and values at `places`, turned to places 0, 1, ...; AdapterError: the model's keys cannot be turned."""
    by = torch.arange(len(places)) - torch.tensor(places)
    picked = [(key[:, places].cpu(), value[:, places].cpu()) for key, value in pairs]
    return turn(model, picked, by) if bool(by.any()) else picked
