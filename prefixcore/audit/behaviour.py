"""What the model says with the virtual tokens and without them: loss, distributions, greedy answers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..training import predict
from ..training.data import vocabulary_size
from ..training.evaluate import as_decoded, is_right
from .probes import Probes, most_tokens
from .progress import Progress
from .promoted import TokenShift
from .scoring import batches, model_logits, per_text
from .statistics import wilson

NEW_TOKENS = 16
"""Greedy tokens after a text of no task."""


def behaviour(
    handle: Any, tokenizer: Any, probes: Probes, end: str | None, progress: Progress, shift: TokenShift | None = None
) -> dict[str, Any]:
    """How an attached adapter changes what the model does on the probes.

    The divergence is KL(with || without), in nats, at the places that predict completion tokens: the expected log-ratio
    under what the model says with the virtual tokens.

    Args:
        handle: of the attached adapter.
        tokenizer: the model's.
        probes: what to ask.
        end: text at which an answer ends; None: the end-of-sequence token.
        progress: shows bars.
        shift: gathers which tokens become likelier.
    """
    model = handle.model
    was_training = model.training
    model.eval()
    try:
        measured = _distributions(handle, probes, progress, shift)
        answers = _answers(handle, tokenizer, probes, end, progress)
    finally:
        model.train(was_training)
    rows = []
    right = as_decoded(tokenizer, probes.examples, probes.ids)
    for i, example in enumerate(probes.examples):
        row: dict[str, Any] = {"prompt": example.prompt, "completion": example.completion}
        for name in ("without", "with"):
            row[f"answer_{name}"] = answers[name][i]
            if not probes.are_texts:
                row[f"right_{name}"] = is_right(answers[name][i], right[i], end)
            row[f"loss_{name}"] = measured[f"loss_{name}"][i]
        row["kl_first"], row["kl_mean"] = measured["kl_first"][i], measured["kl_mean"][i]
        row["changed"] = row["answer_with"] != row["answer_without"]
        rows.append(row)
    return {**probes.to_dict(), "summary": _summary(rows, probes, measured), "rows": rows}


def _distributions(handle: Any, probes: Probes, progress: Progress, shift: TokenShift | None) -> dict[str, Any]:
    """Losses and divergences, by text; `mean_...`: over all completion tokens."""
    logits = model_logits(handle.model)
    vocabulary = vocabulary_size(handle.model)
    device = handle.model.device
    found: dict[str, list[Tensor]] = {"loss_without": [], "loss_with": [], "kl": []}
    for batch in progress(list(batches(probes.ids, vocabulary, device)), f"with and without: {probes.name}"):
        with handle.disabled():
            without = batch.scored(logits(batch.ids, batch.mask))
        log_probs = batch.scored(logits(batch.ids, batch.mask))
        for name, each in (("loss_without", without), ("loss_with", log_probs)):
            found[name].append(-each.gather(1, batch.labels[:, None])[:, 0].double().cpu())
        found["kl"].append((log_probs.exp() * (log_probs - without)).sum(1).double().clamp(min=0).cpu())
        if shift is not None:
            is_first = torch.cat([torch.ones_like(batch.owners[:1]), batch.owners.diff()]).bool()
            shift.see(without, log_probs, is_first)
    values = {name: torch.cat(parts) for name, parts in found.items()}
    lengths = [len(text.completion_ids) for text in probes.ids]
    return {
        **{name: per_text(values[name], probes.ids) for name in ("loss_without", "loss_with")},
        "kl_mean": per_text(values["kl"], probes.ids),
        "kl_first": [float(part[0]) for part in values["kl"].split(lengths)],
        **{f"mean_{name}": float(value.mean()) for name, value in values.items()},
    }


def _answers(handle: Any, tokenizer: Any, probes: Probes, end: str | None, progress: Progress) -> dict[str, list[str]]:
    """Greedy answers, as `prefixcore.training.evaluate` makes them."""
    if probes.are_texts:
        new, end = NEW_TOKENS, None
    else:
        new = max(len(ids.completion_ids) for ids in probes.ids) + 1
    found: dict[str, list[str]] = {}
    for name in progress(["without", "with"], f"answers: {probes.name}"):
        with handle.disabled() if name == "without" else nullcontext():
            found[name] = predict(
                handle.model,
                tokenizer,
                [example.prompt for example in probes.examples],
                max_new_tokens=new,
                end=end,
                batch_size=16,
                max_length=most_tokens(handle.model, handle.num_virtual_tokens),
            )
    return found


def _summary(rows: list[dict[str, Any]], probes: Probes, measured: dict[str, Any]) -> dict[str, Any]:
    changed = sum(row["changed"] for row in rows)
    found: dict[str, Any] = {
        "probes": len(rows),
        "loss_without": measured["mean_loss_without"],
        "loss_with": measured["mean_loss_with"],
        "kl_first": sum(row["kl_first"] for row in rows) / len(rows),
        "kl_mean": measured["mean_kl"],
        "changed": changed,
        "changed_share": changed / len(rows),
    }
    if not probes.are_texts:
        for name in ("without", "with"):
            right = sum(row[f"right_{name}"] for row in rows)
            found[f"right_{name}"], found[f"right_share_{name}"] = right, right / len(rows)
            found[f"interval_{name}"] = list(wilson(right, len(rows)))
        found["lost"] = sum(row["right_without"] and not row["right_with"] for row in rows)
    return found
