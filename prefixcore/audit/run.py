"""`audit`: every measure, one after another, and what comes of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..adapters import Adapter, read_adapter, read_record
from ..adapters.record import how_read
from ..hf import load
from ..training import Example
from ..training.data import vocabulary_size
from ..version import __version__
from .attention_mass import attention_mass
from .behaviour import behaviour
from .candidates import Candidate, divide, written_candidates
from .errors import AuditError, NotMeasuredError
from .generic import NAME, generic_texts
from .leave_one_out import leave_one_out
from .norms import norms_by_layer
from .probes import LIMIT, Probes, check_other, prepare
from .progress import Progress
from .promoted import TokenShift
from .report import Report
from .running import FrozenRun
from .scoring import losses, per_text
from .search import TRIALS, search
from .subject import describe
from .summary import summarize
from .text_alternative import text_alternative
from .virtual import VirtualTokens, virtual_tokens
from .vocabulary import nearest_to_prefix, nearest_to_prompt, start_ids
from .wording import visible

FORMAT = 1
"""Of the JSON: raised when a field changes its meaning."""


def audit(
    model: PreTrainedModel,
    tokenizer: Any,
    adapter_folder: str | Path,
    probes: Sequence[Example],
    others: Mapping[str, Sequence[Example]] | None = None,
    *,
    examples: Sequence[Example] | None = None,
    instructions: Sequence[str] = (),
    generic: bool | None = None,
    end: str | None = None,
    limit: int | None = LIMIT,
    trials: int = TRIALS,
    strict: bool = True,
    name: str = "probes",
    show_progress: bool | None = False,
) -> Report:
    """Measures what an adapter does to its model, on probes of its task and on others. The same input, the same report.

    Args:
        model: the base model, with nothing attached; it is left as it was.
        tokenizer: the model's.
        adapter_folder: a prefix or a soft prompt, ours or one that PEFT wrote.
        probes: prompts of the adapter's task with the right completions, best ones that it was not trained on.
        others: probes of other tasks, by name.
        examples: of the task, best the training data, for written prompts to show; those that are probes too are left
            out. None: a few probes are set aside for it.
        instructions: what a person would write in place of the adapter; with and without examples they are tried too.
        generic: whether texts of no task, which come with prefixcore, are measured as well. None: where no others are.
        end: text that closes a completion; "": the end-of-sequence token; None: as the adapter was trained.
        limit: the most probes of each kind; None: all.
        trials: the most losses that the search for a text may compute; 0: no search.
        strict: False: a model that does not look like the one it was trained for is taken too, and the report says so.
        name: what the report calls the probes.
        show_progress: bars on standard error; None: on a terminal.

    Returns:
        The report: `write(path)` makes the page and the JSON beside it.

    Raises:
        AuditError: no probe, the task's own probes as another's, a method that cannot be audited, another model's
            tokenizer, numbers that are not finite.
        DataError: a probe that the tokenizer cannot encode or that is too long.
        AdapterError: the adapter is damaged, or another model's.
        TypeError, ValueError, NotImplementedError: as of `prefixcore.load`.

    Examples:
        >>> from prefixcore.audit import audit
        >>> from prefixcore.training import Example
        >>> with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=3)) as handle:
        ...     folder = handle.save("swap")
        >>> probes = [Example("ab ->", " ba"), Example("cd ->", " dc"), Example("ef ->", " fe")]
        >>> report = audit(model, tokenizer, "swap", probes, trials=0)
        >>> [entry["measured"] for entry in report.data["verdicts"]][:2]
        ['Right answers in its task', 'Loss in its task']
    """
    if not probes:
        raise AuditError("there is no probe: an audit needs at least one prompt with its completion")
    for probe in probes:
        if not isinstance(probe, Example):
            raise TypeError(
                f"probes: expected those of read_examples(file), or Example(prompt, completion) for each, got "
                f"{type(probe).__name__}"
            )
    folder, progress = Path(adapter_folder), Progress(show_progress)
    adapter, record = read_adapter(folder), read_record(folder)
    trained_end, is_chat = how_read(record, adapter.manifest)
    if is_chat:
        warnings.warn(
            f"{folder} was trained on conversations, and an audit asks with prompts as they are: the model reads "
            "another text than in use, unless prompts and completions are written as its chat template writes turns",
            stacklevel=2,
        )
    virtual = virtual_tokens(adapter, model.device)
    end = trained_end if end is None else (end or None)
    asked: dict[str, Any] = {"virtual_tokens": virtual.count, "end": end, "limit": limit}
    own = prepare(name, probes, model, tokenizer, **asked)
    elsewhere = [prepare(other, texts, model, tokenizer, **asked) for other, texts in (others or {}).items()]
    for another in elsewhere:
        check_other(own, another)
    if generic or (generic is None and not elsewhere):
        elsewhere.append(prepare(NAME, generic_texts(), model, tokenizer, are_texts=True, **asked))
    division = divide(own, examples)
    if not division.scored:
        raise AuditError("no probe is left to score; give more probes, or examples of their own")

    was_training = model.training
    model.eval()
    try:
        shift = TokenShift()
        with load(model, folder, strict=strict) as handle:
            forced = list(handle.forced)
            task = behaviour(handle, tokenizer, own, end, progress, shift)
            elsewhere_found = [behaviour(handle, tokenizer, texts, end, progress) for texts in elsewhere]
            for found in (task, *elsewhere_found):
                _check_finite(found)
        inside, nearest = _inside(model, tokenizer, adapter.config, own, virtual, task["rows"], progress)
        candidates = _candidates(adapter, instructions, division.shown, nearest, tokenizer, end)
        if nearest and trials and division.shown:
            text = search(model, tokenizer, nearest, division.shown, end=end, trials=trials, progress=progress)
            if all(each.text != text for each in candidates):
                candidates.append(Candidate("searched from the nearest tokens", text))
        texts = text_alternative(model, tokenizer, own, division, candidates, task["rows"], end, progress)
    finally:
        model.train(was_training)
    data: dict[str, Any] = {
        "format": FORMAT,
        "made_by": _versions(),
        "subject": {**describe(folder, adapter, record, virtual), "forced": forced},
        "model": _describe_model(model),
        "settings": {
            "end": end,
            "limit": limit,
            "trials": trials,
            "examples_given": examples is not None,
            "instructions": list(instructions),
            "others_given": bool(others),
        },
        "task": task,
        "others": elsewhere_found,
        "promoted": shift.to_dict(tokenizer),
        **inside,
        "text": texts,
    }
    return Report(summarize(rounded(data)))


def _inside(
    model: PreTrainedModel,
    tokenizer: Any,
    config: Any,
    probes: Probes,
    virtual: VirtualTokens,
    rows: Sequence[dict[str, Any]],
    progress: Progress,
) -> tuple[dict[str, Any], list[list[int]]]:
    """The measures that look inside, in runs that are compared with the attached model first.

    Returns:
        What was found, and for each virtual token the ids of the nearest tokens, where there are such.
    """
    run = FrozenRun(model)
    vocabulary = vocabulary_size(model)
    start = start_ids(model, config, tokenizer, virtual.count)

    def agreement() -> dict[str, Any]:
        by_token = losses(lambda ids, mask: run(ids, mask, virtual), probes.ids, vocabulary, model.device)
        attached = [row["loss_with"] for row in rows]
        worst = max(abs(a - b) for a, b in zip(per_text(by_token, probes.ids), attached, strict=True))
        allowed = 1e-3 if model.dtype == torch.float32 else 0.1
        if not worst <= allowed * max(1.0, *attached):
            raise NotMeasuredError(
                f"the attached model and the audit's own run differ by {worst:.3g} nats, so what the latter shows "
                "would not be the adapter's doing (modules that were trained along are one reason)"
            )
        return {"largest_difference": worst, "allowed": allowed}

    def nearest() -> dict[str, Any]:
        if virtual.is_prefix:
            return nearest_to_prefix(run, tokenizer, virtual, start, progress)
        return nearest_to_prompt(model, tokenizer, virtual, start, progress)

    found = {"agreement": measure(agreement)}
    why = found["agreement"].get("not_measured")
    watched: dict[str, Callable[[], dict[str, Any]]] = {
        "attention": lambda: attention_mass(run, probes, virtual, progress).to_dict(),
        "leave_one_out": lambda: leave_one_out(run, probes, virtual, vocabulary, progress),
    }
    if virtual.is_prefix:
        watched["norms"] = lambda: norms_by_layer(run, probes, virtual, progress)
    for name, make in watched.items():
        found[name] = {"not_measured": why} if why else measure(make)
    found["nearest"] = measure(nearest)
    kinds = found["nearest"].get("kinds")
    if not kinds:
        return found, []
    tokens = (kinds.get("embedding") or kinds["value"])["tokens"]
    return found, [[token["id"] for token in row] for row in tokens]


def measure(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a measure gives, or why there is none."""
    try:
        return make()
    except (NotMeasuredError, NotImplementedError) as error:
        return {"not_measured": str(error)}


def _candidates(
    adapter: Adapter,
    instructions: Sequence[str],
    shown: Sequence[Example],
    nearest: Sequence[Sequence[int]],
    tokenizer: Any,
    end: str | None,
) -> list[Candidate]:
    """The written prompts to try."""
    headings = [("instruction" if i == 1 else f"instruction {i}", text) for i, text in enumerate(instructions, start=1)]
    if text := getattr(adapter.config, "init_text", None):
        headings.append(("the text it started from", text))
    if adapter.manifest is not None and adapter.manifest.task:
        headings.append(("its stated task", adapter.manifest.task))
    found = written_candidates(headings, shown, end)
    if nearest:
        text = tokenizer.decode([ids[0] for ids in nearest])
        if all(each.text != text for each in found):
            found.append(Candidate("nearest tokens", text))
    return found


def rounded(value: Any) -> Any:
    """Plain data whose numbers have six digits that count, for what follows depends on the machine."""
    if isinstance(value, float):  # what a file states may be NaN, which JSON has no number for
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


def _check_finite(found: dict[str, Any]) -> None:
    values = [row[name] for row in found["rows"] for name in ("loss_with", "loss_without", "kl_mean", "kl_first")]
    if not all(math.isfinite(value) for value in values):
        raise AuditError(
            f"the model's log-probabilities are not finite on {visible(found['name'])}: take another dtype (float32), "
            "or check the adapter's values with `prefixcore inspect`"
        )


def _describe_model(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "name": str(getattr(model, "name_or_path", "") or "") or None,
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }


def _versions() -> dict[str, str]:
    import transformers

    return {"prefixcore": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__}
