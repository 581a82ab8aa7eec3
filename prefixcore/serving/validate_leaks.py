"""Whether an answer under one adapter is made of what was computed under another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .validate_judge import Judge
from .validate_lines import FAILED, PASSED, UNTESTED, UNTOLD, Line
from .validate_probes import Probes
from .validate_server import AT_ONCE, Asker, attempt

MOST_ADAPTERS = 8
"""Of one check, which asks each text under each of them, and under none, twice."""

_LONG = 300
"""Tokens that fill blocks of a cache."""


def find_leaks(
    asker: Asker,
    judge: Judge,
    probes: Mapping[str, Probes],
    served: Sequence[str],
    base: str | None,
    cards: Sequence[dict[str, Any]] | None,
) -> Iterator[Line]:
    """The same texts under each adapter and under none, at once and twice, so that caches are hit.

    Args:
        asker: of the server.
        judge: of its answers.
        probes: the prompts of each adapter.
        served: the adapters that it serves.
        base: its name of the bare model, if there is one.
        cards: what it says of its models.
    """
    names: list[str | None] = [*served[:MOST_ADAPTERS]]
    if base is not None:
        names.append(None)
    if len(names) < 2:
        yield Line("leak", "-", UNTESTED, "it takes two adapters, or one and the bare model")
        return
    texts = _texts(asker, judge, probes, cards)
    jobs = [(text, name) for _ in range(2) for text in texts for name in names]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda job: attempt(asker.complete, job[1] or str(base), job[0]), jobs))
    wrong, cached, apart = [], 0, 0
    for (text, name), answer in zip(jobs, answers, strict=True):
        if isinstance(answer, str):
            wrong.append(f"{name or base}: {answer}")
            continue
        ids = judge.reference.ids(text)
        cached += bool(answer.cached)
        apart += any(not judge.are_equal(name, other, ids) for other in names if other != name)
        if not judge.is_right(name, ids, answer, asker.tokens):
            wrong.append(f"{name or base}: {judge.whose(name, ids, answer, asker.tokens)}")
    numbers = {
        "requests": len(jobs),
        "wrong": len(wrong),
        "texts": len(texts),
        "adapters": len(served[:MOST_ADAPTERS]),
        "answers that a cache helped with": cached,
    }
    subject = f"{len(names)} models, {len(texts)} texts"
    if wrong:
        yield Line("leak", subject, FAILED, f"{len(wrong)} of {len(jobs)} answers are wrong; {wrong[0]}", numbers)
    elif not apart:
        yield Line("leak", subject, UNTOLD, "these adapters give these texts the same answers", numbers)
    else:
        yield Line("leak", subject, PASSED, "", numbers)


def _texts(
    asker: Asker, judge: Judge, probes: Mapping[str, Probes], cards: Sequence[dict[str, Any]] | None
) -> list[str]:
    """A short text, and one that fills blocks of a cache, as far as the model has room."""
    reference = judge.reference
    first = next(iter(probes.values())).prompts[0]
    positions = getattr(reference.model.config, "max_position_embeddings", None) or 1024
    longest = max((int(card.get("num_virtual_tokens") or 0) for card in cards or ()), default=0)
    room = min(_LONG, positions - longest - asker.tokens - 64) - len(reference.ids(first))
    text = first
    while len(reference.ids(f"{first} {text}")) < room:
        text = f"{first} {text}"
    return [first, text] if text != first else [first]
