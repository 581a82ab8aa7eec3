"""Measuring again what a manifest says of an adapter, on the same held-out examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .chat import unroll
from .columns import Columns
from .data import DataError, Example, TokenizedExample, split, tokenize
from .describe import describe_data
from .evaluate import evaluate
from .reading import read_examples

LOSS_TOLERANCE = 0.02
"""The share of a loss that another dtype, machine or kernel may change."""

ANSWERS = 0.02
"""The share of answers that rounding may turn; of ten answers or more, at least one."""


@dataclass(frozen=True)
class Remeasured:
    """What came of measuring again.

    Attributes:
        metrics: as they are now, by name.
        examples: how many held-out examples there are.
        training_data: whether the training data of the manifest is in the file as well; None: the file is of held-out
            examples alone.
        differences: in words, each metric that is not what the manifest says; none: it holds.

    Examples:
        >>> from prefixcore.training import Remeasured
        >>> Remeasured({"exact_match": 0.9}, 25, True, []).examples
        25
    """

    metrics: dict[str, float]
    examples: int
    training_data: bool | None
    differences: list[str]


def remeasure(model: nn.Module, tokenizer: Any, manifest: Any, path: str | Path) -> Remeasured:
    """Scores an adapter again, on the examples that its manifest names by their digest.

    Args:
        model: with the adapter attached.
        tokenizer: the model's.
        manifest: the adapter's.
        path: the data that `prefixcore train` was given, which is split again, or the held-out examples.

    Raises:
        DataError: the file cannot be read, or holds no examples with the digest of the manifest's split; or the
            manifest names no metrics that can be measured here.

    Examples:
        >>> from pathlib import Path
        >>> from prefixcore.adapters import read_adapter
        >>> from prefixcore.training import describe_data, read_jsonl, remeasure
        >>> _ = Path("test.jsonl").write_text('{"prompt": "Peru ->", "completion": " Lima"}')
        >>> split = describe_data(read_jsonl("test.jsonl"), name="test.jsonl")
        >>> with prefixcore.attach(model, prefixcore.PromptTuningConfig(num_virtual_tokens=4)) as handle:
        ...     folder = handle.save("prompt", metrics={"exact_match": 1.0}, split=split)
        ...     remeasure(model, tokenizer, read_adapter(folder).manifest, "test.jsonl").differences
        ['exact_match: 1 in the manifest, 0 now']
    """
    metrics, named, settings = manifest.metrics or {}, manifest.split or {}, manifest.training or {}
    known = {name: value for name, value in metrics.items() if name in ("exact_match", "loss")}
    if not known:
        raise DataError("the manifest has neither exact_match nor loss, which are what is measured here")
    examples = read_examples(path, chat=settings.get("chat") is True, columns=Columns.of(settings))
    held_out, training = _held_out(tokenizer, examples, named, settings)
    if held_out is None:
        raise DataError(f"{path}: holds no examples with the digest of the manifest's split, {named.get('sha256')}")
    end = settings.get("end")
    ids = _tokenize(tokenizer, held_out, end)
    longest = settings.get("max_length")
    now = evaluate(model, tokenizer, held_out, ids, end=end, max_length=_room(ids, longest))
    found = {"exact_match": now.exact_match, "loss": now.loss}
    differences = [
        f"{name}: {value:.4g} in the manifest, {found[name]:.4g} now"
        for name, value in known.items()
        if not abs(found[name] - value) <= _tolerance(name, value, len(held_out))
    ]
    has_data = None
    if training is not None and manifest.data is not None:
        has_data = describe_data(training)["sha256"] == manifest.data["sha256"]
    return Remeasured({name: found[name] for name in known}, len(held_out), has_data, differences)


def _held_out(
    tokenizer: Any, examples: Sequence[Example], named: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[list[Example] | None, list[Example] | None]:
    """The held-out examples of the manifest, and those of the training where the file has them."""
    limit = settings.get("eval_limit")
    parts: list[tuple[list[Example], list[Example] | None]] = [(list(examples), None)]
    if isinstance(named.get("seed"), int) and isinstance(named.get("fraction"), (int, float)):
        training, held_out = split(examples, named["fraction"], named["seed"])
        parts.insert(0, (held_out, training))
    for part, rest in parts:
        few = _used(tokenizer, part[:limit] if isinstance(limit, int) else part, settings)
        if few and describe_data(few)["sha256"] == named.get("sha256"):
            return few, None if rest is None else _used(tokenizer, rest, settings)
    return None, None


def _used(tokenizer: Any, examples: list[Example], settings: Mapping[str, Any]) -> list[Example]:
    """What a training makes of them: each as one text, and what `--skip-too-long` leaves."""
    examples = unroll(tokenizer, examples)
    longest = settings.get("max_length")
    if not settings.get("skip_too_long") or not isinstance(longest, int):
        return examples
    ids = _tokenize(tokenizer, examples, settings.get("end"))
    return [example for example, tokenized in zip(examples, ids, strict=True) if tokenized.length <= longest]


def _tokenize(tokenizer: Any, examples: Sequence[Example], end: Any) -> list[TokenizedExample]:
    return tokenize(tokenizer, examples, end=end if isinstance(end, str) else None)


def _room(ids: Sequence[TokenizedExample], longest: Any) -> int | None:
    """The most tokens of a prompt and its answer: an answer may be a token longer than the right one."""
    if not isinstance(longest, int):
        return None
    return max(longest, 1 + max(each.length for each in ids)) if ids else longest


def _tolerance(name: str, value: float, count: int) -> float:
    if name == "loss":
        return max(LOSS_TOLERANCE * abs(value), 1e-3)
    return max(ANSWERS, 1 / count if count >= 10 else 0.0) + 1e-9
