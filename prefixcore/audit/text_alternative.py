"""Written prompts in place of the virtual tokens, scored on the same probes: what a person could read and change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..training import DataError, predict, tokenize
from ..training.data import vocabulary_size
from ..training.evaluate import as_decoded, is_right
from .candidates import Candidate, Division, with_text
from .probes import Probes, most_tokens
from .progress import Progress
from .scoring import losses, model_logits, per_text
from .statistics import CHANCE, sign_test, wilson


def text_alternative(
    model: Any,
    tokenizer: Any,
    probes: Probes,
    division: Division,
    candidates: Sequence[Candidate],
    rows: Sequence[dict[str, Any]],
    end: str | None,
    progress: Progress,
) -> dict[str, Any]:
    """The score of each candidate beside the adapter's, on the probes that none of them contains.

    Args:
        model: the model, with nothing attached.
        tokenizer: its tokenizer.
        probes: the adapter's.
        division: which of them are scored.
        candidates: the texts.
        rows: what `behaviour` found for each probe, with and without the adapter.
        end: closes completions, as in training.
        progress: shows bars.
    """
    scored = [probes.examples[i] for i in division.scored]
    of_adapter, of_nothing = (
        _score(
            [rows[i][f"right_{how}"] for i in division.scored],
            [rows[i][f"loss_{how}"] for i in division.scored],
            [len(probes.ids[i].completion_ids) for i in division.scored],
        )
        for how in ("with", "without")
    )
    tried, skipped = [], []
    for candidate in progress(list(candidates), "written prompts"):
        entry = {"name": candidate.name, "text": candidate.text, "shown": candidate.shown}
        try:
            tried.append({**entry, **_score_text(model, tokenizer, scored, candidate.text, end)})
        except DataError as error:
            skipped.append({**entry, "why": str(error)})
    found: dict[str, Any] = {
        "scored": len(scored),
        "examples": len(division.shown),
        "examples_from_probes": division.from_probes,
        "examples_left_out": division.left_out,
        "adapter": of_adapter,
        "nothing": of_nothing,
        "candidates": tried,
        "skipped": skipped,
    }
    if tried:
        best = max(range(len(tried)), key=lambda i: (tried[i]["right"], -tried[i]["loss"]))
        found.update(compare(of_adapter, tried[best]), best=best)
    return found


def compare(adapter: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """Whether a text is as good as the adapter: by right answers where there are any, else by loss."""
    if adapter["right"] or text["right"]:
        metric, one, other = "exact match", adapter["rights"], text["rights"]
        at_least = text["right"] >= adapter["right"]
    else:
        metric, one, other = "loss", [-x for x in adapter["losses"]], [-x for x in text["losses"]]
        at_least = text["loss"] <= adapter["loss"]
    p = sign_test(one, other)
    lower = sum(a < b for a, b in zip(adapter["losses"], text["losses"], strict=True))
    verdict = "as good" if at_least else "not told apart" if p >= CHANCE else "adapter better"
    return {
        "metric": metric,
        "p": p,
        "verdict": verdict,
        "loss_lower": lower,
        "loss_p": sign_test(adapter["losses"], text["losses"]),
    }


def _score_text(model: Any, tokenizer: Any, scored: Sequence[Any], text: str, end: str | None) -> dict[str, Any]:
    asked = with_text(scored, text)
    room = most_tokens(model, 0)
    ids = tokenize(tokenizer, asked, end=end, max_length=room)
    answers = predict(
        model,
        tokenizer,
        [example.prompt for example in asked],
        max_new_tokens=max(len(each.completion_ids) for each in ids) + 1,
        end=end,
        batch_size=16,
        max_length=room,
    )
    vocabulary = vocabulary_size(model)
    by_token = losses(model_logits(model), ids, vocabulary, model.device)
    right = as_decoded(tokenizer, scored, ids)
    rights = [is_right(answer, example, end) for answer, example in zip(answers, right, strict=True)]
    score = _score(rights, per_text(by_token, ids), [len(each.completion_ids) for each in ids])
    return {**score, "tokens": len(ids[0].prompt_ids) - len(tokenizer(scored[0].prompt)["input_ids"])}


def _score(rights: Sequence[bool], text_losses: Sequence[float], lengths: Sequence[int]) -> dict[str, Any]:
    right, total = sum(rights), len(rights)
    return {
        "right": right,
        "share": right / total,
        "interval": list(wilson(right, total)),
        "loss": sum(a * b for a, b in zip(text_losses, lengths, strict=True)) / sum(lengths),
        "rights": [int(x) for x in rights],
        "losses": [round(x, 6) for x in text_losses],
    }
