"""What is asked of the text, and answered: each layer's queries while prompts and answers are read.

A request need not be what the teacher reads: a template writes its own system message before a user's turn that comes
alone, and a tokenizer may begin every text with a token of its own. What the prefix has to do is then seen in a run of
the request, behind the whole text and with its words as far from the text as in the teacher's run; what its words are
to be answered is taken from the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..audit.errors import NotMeasuredError
from ..audit.running import FrozenRun, WatchedCall
from ..audit.virtual import VirtualTokens
from ..hf.attention.prefix import KeyValue

MOST_READ = 3072
"""Tokens of prompts and answers whose queries are kept: 21 MB a layer for 9 heads of 64."""


class Row(NamedTuple):
    """A prompt with its answer.

    Attributes:
        behind: the ids that the teacher reads behind the text.
        request: the ids that the student reads behind its prefix; they end as `behind` does.
    """

    behind: list[int]
    request: list[int]


class Reads(NamedTuple):
    """What a layer's queries were answered, G queries of each of n tokens for each key-value head (M = G n).

    Attributes:
        query: [Hkv, M, D], scaled.
        rest: [Hkv, M], the logarithm of the rest of the sequence's part of the softmax's denominator.
        rest_output: [Hkv, M, Dv], what the rest of the sequence alone answers.
        output: [Hkv, M, Dv], what text and rest are to answer together.
        softcap: of the scores; None: none.
    """

    query: Tensor
    rest: Tensor
    rest_output: Tensor
    output: Tensor
    softcap: float | None


def reads_of(model: Any, pairs: Sequence[KeyValue], rows: Sequence[Row]) -> list[Reads]:
    """The queries of `rows` behind keys and values, and their answers, a layer after the other.

    Args:
        model: with nothing attached.
        pairs: what stands before each row.
        rows: prompts with their answers; of all of them the first `MOST_READ` tokens are read.

    Raises:
        NotMeasuredError: the model's attention cannot be watched, or has sinks.
    """
    found: list[list[Reads]] = []
    left = MOST_READ
    for row in rows:
        if not left:
            break
        same = shared(row)
        over = max(0, same - left)  # what a token is answered does not depend on those after it
        same -= over
        left -= same
        behind, request = (ids[: len(ids) - over] for ids in row)
        told = _run(model, pairs, behind)
        if behind != request:
            # What stands before the shared words is the same in every request, so that it is fitted to once.
            kept = same if found else len(request)
            own = _run(model, pairs, request, earlier=further(row))
            told = [_as_told(*each, len(behind), len(request), same, kept) for each in zip(own, told, strict=True)]
        found.append(told)
    return [_joined(part) for part in zip(*found, strict=True)]


def shared(row: Row) -> int:
    """How many of the last ids the teacher's row and the request have in common."""
    same = 0
    for a, b in zip(reversed(row.behind), reversed(row.request), strict=False):
        if a != b:
            break
        same += 1
    return same


def further(row: Row) -> int:
    """How many tokens more than in the teacher's row stand before the shared words of a request."""
    return len(row.request) - len(row.behind)


def _run(model: Any, pairs: Sequence[KeyValue], ids: list[int], earlier: int = 0) -> list[Reads]:
    """One row behind keys and values, and what each layer's queries are answered.

    Args:
        model: with nothing attached.
        pairs: what stands before the row.
        ids: of the row.
        earlier: by how many places the row begins before the end of what stands before it.
    """
    found: list[Reads] = []
    place = pairs[0][0].shape[1] - earlier
    virtual = VirtualTokens(place, tuple(range(place)), dict(enumerate(pairs)))
    with torch.no_grad():
        FrozenRun(model)(
            torch.tensor([ids], device=model.device),
            virtual=virtual,
            watch=lambda call: found.append(_read(call)),
        )
    return found


def _as_told(own: Reads, told: Reads, behind: int, request: int, same: int, kept: int) -> Reads:
    """The last `kept` queries of a request, the last `same` of them to be answered as those of the teacher's row.

    Args:
        own, told: of the request, and of the teacher's row.
        behind, request: how many tokens the teacher's row and the request have.
        same: how many of the last ones they share.
        kept: how many of the request's are kept.
    """

    def last(x: Tensor, length: int, count: int) -> Tensor:  # [Hkv, G n, ...], n tokens for each of G
        return x.unflatten(1, (-1, length))[:, :, length - count :]

    output = last(own.output, request, kept).clone()
    output[:, :, kept - same :] = last(told.output, behind, same)
    query, rest, rest_output = (last(x, request, kept).flatten(1, 2) for x in own[:3])
    return Reads(query, rest, rest_output, output.flatten(1, 2), own.softcap)


def _joined(parts: Sequence[Reads]) -> Reads:
    """The queries of several rows as those of one."""
    query, rest, rest_output, output = (torch.cat(each, 1) for each in zip(*(part[:4] for part in parts), strict=True))
    return Reads(query, rest, rest_output, output, parts[0].softcap)


def _read(call: WatchedCall) -> Reads:
    """One row's queries in one layer."""
    assert call.prefix is not None
    if call.options["sinks"] is not None:
        raise NotMeasuredError("attention has sinks")
    softcap = call.options["softcap"] or None
    heads, length, width = call.query.shape[1:]
    groups = call.key.shape[1]
    query = (call.query[0].float() * call.options["scale"]).reshape(groups, heads // groups * length, width)
    scores = capped(query @ call.key[0].float().mT, softcap).unflatten(1, (-1, length))  # [Hkv, G, T, T]
    if call.options["is_causal"]:
        later = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    scores = scores.flatten(1, 2)
    rest, rest_output = scores.logsumexp(-1), scores.softmax(-1) @ call.value[0].float()
    key, value = (x.to(query) for x in call.prefix)
    output = answered(query, key, value, rest, rest_output, softcap)
    return Reads(query.cpu(), rest.cpu(), rest_output.cpu(), output.cpu(), softcap)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores as the softmax takes them."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def weights(query: Tensor, key: Tensor, rest: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """The attention [Hkv, M, P] on `key`, and the rest's share [Hkv, M, 1]."""
    scores = capped(query @ key.mT, softcap)
    total = torch.logaddexp(scores.logsumexp(-1), rest)[..., None]
    return (scores - total).exp(), (rest[..., None] - total).exp()


def answered(
    query: Tensor, key: Tensor, value: Tensor, rest: Tensor, rest_output: Tensor, softcap: float | None
) -> Tensor:
    """What queries get of keys and values and the rest of their sequence [Hkv, M, Dv]."""
    attention, share = weights(query, key, rest, softcap)
    return attention @ value + share * rest_output
