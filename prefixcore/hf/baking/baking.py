"""`bake`: any soft prompt, text or reparameterized prefix as a plain prefix, which every server path can take."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters import AdapterError, Manifest, adapter_digest, check_target, read_adapter, read_record, write_adapter
from ...adapters.files import find_adapter
from ...adapters.provenance import MEASURED_FIELDS
from ...adapters.writing import check_apart
from ...nn import Config, LayerShape, MultitaskPrompt, Prefix, PrefixTuningConfig
from ..attaching import attach_prefix, attach_soft_prompt, check_model
from ..attention.patch import frozen_run
from ..attention.prefix import KeyValue
from ..families import text_config
from ..handle import Handle
from ..loading import Found, Target
from ..positions.rotary import turn
from .bake_check import Check, Comparison, Run, default_inputs
from .bake_prefix import check_can_be_exact, encode_text, ids_to_prefix, prompt_to_prefix

_HOLDS = ("model", "data", "end", "split", "held_out")
"""What a record says that is as true of an equal prefix."""

_LONGEST_TEXT = 100_000
"""Characters of a text that are kept beside its digest."""


@dataclass(frozen=True)
class Baked:
    """What `bake` wrote.

    Attributes:
        path: the adapter's folder, a plain prefix.
        num_virtual_tokens: P.
        comparison: how far it is from what it was baked from.
        method: what that was: "prompt", "p-tuning", "multitask-prompt", "cpt", "prefix" or "text".

    Examples:
        >>> prefixcore.bake(model, None, "baked", text="France -> Paris", tokenizer=tokenizer).num_virtual_tokens
        15
    """

    path: Path
    num_virtual_tokens: int
    comparison: Comparison
    method: str

    def __str__(self) -> str:
        return f"{self.path}: {self.num_virtual_tokens} virtual tokens baked from a {self.method}; {self.comparison}"


@dataclass
class _Source:
    """What is baked, and what is known about it."""

    method: str
    pairs: list[KeyValue]
    layers: list[int]
    config: Config | None
    original: Callable[[], Any]
    facts: dict[str, Any]
    manifest: Manifest | None = None
    record: dict[str, Any] = field(default_factory=dict)
    found: Found | None = None

    @property
    def position_offset(self) -> bool:
        """Whether the text behind it begins at position P; else at 0."""
        return getattr(self.config, "position_offset", True)


def bake(
    model: PreTrainedModel,
    adapter: str | Path | None,
    directory: str | Path,
    *,
    text: str | None = None,
    tokenizer: Any = None,
    bos: bool | None = None,
    task: str | None = None,
    task_id: int | None = None,
    license: str | None = None,
    intended_use: str | None = None,
    inputs: Sequence[str] = (),
    strict: bool = True,
    position_offset: bool = True,
) -> Baked:
    """Writes a plain prefix that is equal to a soft prompt, a text or a reparameterized prefix.

    The frozen model computes the keys and values of a soft prompt or a text once, so that serving it costs no prefill
    any longer. Before anything is written, logits and greedy tokens are compared with the original's.

    Args:
        model: a transformers model with nothing attached, the one that the adapter was trained for.
        adapter: its folder, ours or one that PEFT wrote; None: `text` is baked.
        directory: the folder to write.
        text: a text to stand before every input, in place of an adapter. Requests then hold the rest alone.
        tokenizer: reads `text` and `inputs`; named in the manifest.
        bos: of a text, whether it begins with the token by which the tokenizer begins every text. Requests must come
            without that token if so. None: the tokenizer has none, else it is asked for.
        task: what it does, in words; None: as the adapter says.
        task_id: of several tasks' prompts, which one.
        license: what others may do with it; None: as the adapter says.
        intended_use: what it is for, and what not; None: as the adapter says.
        inputs: texts to compare on; empty: a few of ordinary tokens.
        strict: as of `load`.
        position_offset: where the text behind the prefix begins, as in `PrefixTuningConfig`. What stands in another
            place is turned to it, which takes a model with rotary positions.

    Returns:
        The folder and how far the two are from each other, which is rounding alone.

    Raises:
        AdapterError: an adapter that cannot be read or is another model's; virtual tokens that stand in the text; a
            task that is not said; a prefix that is not equal; keys that cannot be turned.
        NotImplementedError: a model on which no prefix is equal: a sliding window that loses sight of what stands in
            front, layers that are no attention, keys that change with the length of the text.
        TypeError, ValueError: as of `attach`.

    Nothing is written after an error, and the model is as it was.

    Examples:
        >>> with prefixcore.attach(model, prefixcore.PTuningConfig(num_virtual_tokens=4)) as handle:
        ...     folder = handle.save("capitals-prompt", task="country -> capital")
        >>> baked = prefixcore.bake(model, "capitals-prompt", "capitals")
        >>> baked.num_virtual_tokens, baked.comparison.num_ties
        (4, 0)
        >>> with prefixcore.load(model, "capitals") as handle:
        ...     print(handle)
        Handle(prefix on LlamaForCausalLM, 4 virtual tokens, 0 trainable)
    """
    if (adapter is None) == (text is None):
        raise TypeError("bake: expected the folder of an adapter, or text=..., and not both")
    if (text is not None or inputs) and tokenizer is None:
        raise TypeError("bake: a text needs tokenizer=..., which reads it")
    if adapter is not None and bos is not None:
        raise TypeError("bake: bos is about a text, and an adapter is given")
    check_target(Path(directory).absolute())
    if adapter is not None:
        check_apart(Path(adapter), Path(directory))
    check_model(model)
    if model.config.is_encoder_decoder:
        raise NotImplementedError(
            f"{type(model).__name__} is an encoder-decoder: only a decoder alone computes from a text what a prefix "
            "would be; its adapters hold final values already, so load them as they are"
        )
    target = Target(model)
    if adapter is None:
        assert text is not None
        source = _from_text(target, text, tokenizer, bos)
        _warn_of_merges(tokenizer, text, inputs)
    else:
        source = _from_adapter(target, Path(adapter), task_id, strict)
    virtual = source.pairs[0][0].shape[1]
    if source.position_offset != position_offset:
        source.pairs = turn(model, source.pairs, virtual if position_offset else -virtual)
    ids = [_encode(tokenizer, each, model, without_bos=bool(bos)) for each in inputs]
    ids = ids or default_inputs(model, virtual)
    with source.original() as run:
        check = Check(model, run, ids)
    check.measure_effect(lambda ids: _logits(model, ids))
    module = _plain_prefix(source, len(target.attention_layers[0]), position_offset)
    with _attach(target, module, source.layers, source.found) as handle:
        comparison = check.compare(lambda ids: _logits(model, ids))
        author = {"task": task, "license": license, "intended_use": intended_use}
        _write(directory, handle, module, source, comparison, author, tokenizer)
    return Baked(Path(directory), virtual, comparison, source.method)


def _from_text(target: Target, text: str, tokenizer: Any, bos: bool | None) -> _Source:
    model = target.model
    calls, _ = target.attention_layers
    check_can_be_exact(model, calls)
    ids = encode_text(tokenizer, text, bos, text_config(model).vocab_size)
    pairs = ids_to_prefix(model, ids, calls)
    front = torch.tensor(ids, device=model.device)
    facts: dict[str, Any] = {
        "method": "text",
        "text": text if len(text) <= _LONGEST_TEXT else None,
        "text_sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        "bos": bool(bos),
    }

    @contextmanager
    def original() -> Iterator[Run]:
        yield lambda ids: _logits(model, torch.cat((front, ids)), skip=len(front))

    return _Source("text", pairs, list(range(len(calls))), None, original, facts)


def _from_adapter(target: Target, folder: Path, task_id: int | None, strict: bool) -> _Source:
    model, folder = target.model, find_adapter(folder)
    digest = adapter_digest(folder)
    record = read_record(folder)
    manifest = read_adapter(folder).manifest
    # What is trained, with its reparameterization, so that the final values are held against it.
    trainable = manifest is not None and manifest.method not in ("cpt", "multitask-prompt")
    found = target.read(folder, trainable, strict)
    if adapter_digest(folder) != digest:
        raise AdapterError(f"{folder}: was replaced while it was read; bake it again")
    module, config = found.module, found.module.config
    in_text = getattr(config, "virtual_token_ids", None)
    if in_text is not None:
        raise AdapterError(
            f"{folder}: its virtual tokens stand in the text, in place of the ids {in_text}, so their keys and values "
            "depend on the text before them, and no prefix is equal"
        )
    number = _task_number(folder, module, task_id)
    several = isinstance(module, MultitaskPrompt) and module.num_tasks > 1
    facts = {"digest": digest, "method": config.method, **({"task_id": number} if several else {})}
    if isinstance(module, Prefix):
        layers, pairs = found.layers, [(key.float(), value.float()) for key, value in module.bake()]
    else:
        calls, decoder = target.attention_layers
        check_can_be_exact(model, calls)
        prompt = module.bake() if number is None else module.bake()[number]
        layers, pairs = list(range(len(calls))), prompt_to_prefix(model, decoder, calls, prompt)

    @contextmanager
    def original() -> Iterator[Run]:
        with _attach(target, module.requires_grad_(False), layers, found):
            # Without a cache and by itself a soft prompt is put into the row, and not computed as a prefix.
            extra: dict[str, Any] = {"task_ids": [number]} if several else {}
            yield lambda ids: _logits(model, ids, **extra)

    return _Source(config.method, pairs, layers, config, original, facts, manifest, record, found)


def _task_number(folder: Path, module: Any, task_id: int | None) -> int | None:
    """Which of several tasks' prompts is meant; None: there is one prompt, of no number."""
    if not isinstance(module, MultitaskPrompt):
        if task_id not in (None, 0):
            raise AdapterError(f"{folder}: task_id is {task_id}, but it has one task")
        return None
    if task_id is None and module.num_tasks > 1:
        raise AdapterError(
            f"{folder}: it has the prompts of {module.num_tasks} tasks and a prefix is for one: say which, task_id=0 "
            f"to {module.num_tasks - 1} (--task-id)"
        )
    number = task_id or 0
    if not 0 <= number < module.num_tasks:
        raise AdapterError(f"{folder}: task_id is {number}, but its tasks are 0 to {module.num_tasks - 1}")
    return number


def _plain_prefix(source: _Source, num_layers: int, position_offset: bool) -> Prefix:
    """The prefix to write, of whose layers the model has `num_layers`."""
    config = source.config
    shapes = [LayerShape(key.shape[0], key.shape[2], value.shape[2]) for key, value in source.pairs]
    plain = PrefixTuningConfig(
        init=source.pairs,
        layers=None if source.layers == list(range(num_layers)) else source.layers,
        task_type="CAUSAL_LM" if config is None else config.task_type,
        tokenizer_name_or_path=None if config is None else config.tokenizer_name_or_path,
        modules_to_save=None if config is None else config.modules_to_save,
        position_offset=position_offset,
    )
    return Prefix(shapes, plain, source.pairs).requires_grad_(False)


def _attach(target: Target, module: Any, layers: list[int], found: Found | None) -> Handle:
    """Attaches what was read or made, with the heads that an adapter brings."""
    names = [] if found is None else found.heads
    if isinstance(module, Prefix):
        calls, decoder = target.attention_layers
        handle = attach_prefix(target.model, decoder, calls, layers, module, heads=names)
    else:
        handle = attach_soft_prompt(target.model, module, heads=names)
    if found is not None:
        handle.heads.load(found.head_tensors)
        handle.forced = found.forced
    return handle


def _logits(model: PreTrainedModel, ids: Tensor, skip: int = 0, **extra: Any) -> Tensor:
    """Logits [T, V] of ids [T] but for the first `skip`, fp32; [1, labels] of a head for sequences."""
    with frozen_run(model):
        output = model(input_ids=ids[None], use_cache=False, **extra)
    logits = getattr(output, "logits", None)
    logits = (output[0] if logits is None else logits).float()
    return logits if logits.dim() == 2 else logits[0, skip:]


def _encode(tokenizer: Any, text: str, model: PreTrainedModel, *, without_bos: bool) -> Tensor:
    """The ids of an input as a request would have them."""
    ids = list(tokenizer(text, **({"add_special_tokens": False} if without_bos else {}))["input_ids"])
    if not ids:
        raise AdapterError(f"inputs: expected texts with tokens in them, got {text[:40]!r}")
    return torch.tensor(ids, device=model.device)


def _warn_of_merges(tokenizer: Any, text: str, inputs: Sequence[str]) -> None:
    """Warns where a tokenizer makes other tokens of a text and an input in one piece than of the two by themselves."""
    first, *rest = ([*tokenizer(each, add_special_tokens=False)["input_ids"]] for each in (text, *inputs))
    for each, ids in zip(inputs, rest, strict=True):
        if [*tokenizer(text + each, add_special_tokens=False)["input_ids"]] != first + ids:
            warnings.warn(
                f"the tokenizer merges the end of the text with the beginning of {each[:40]!r}: the prefix acts as the "
                "tokens of the two one after the other, not as those of one piece; end the text where a token ends, "
                "such as at a line break",
                stacklevel=3,
            )


def _write(
    directory: str | Path,
    handle: Handle,
    module: Prefix,
    source: _Source,
    comparison: Comparison,
    author: Mapping[str, str | None],
    tokenizer: Any,
) -> Path:
    """Writes the prefix, with what still holds of what it was baked from."""
    before = source.manifest
    facts = {
        **source.facts,
        "dtype": str(handle.model.dtype).removeprefix("torch."),
        "largest_difference": comparison.largest_difference,
        "inputs": comparison.num_inputs,
    }
    # What was measured is as true of an equal prefix: on the same model, and of one task.
    holds = before is not None and not handle.forced and "task_id" not in source.facts
    measured = {name: getattr(before, name) for name in MEASURED_FIELDS} if holds else {}
    told = {f"baked_{name}": value for name, value in facts.items() if name != "text"}
    measured["training"] = {**(measured.get("training") or {}), **told}
    manifest = Manifest.create(
        handle.model,
        module.config,
        list(module.shapes),
        tokenizer=tokenizer,
        forced=handle.forced,
        **measured,
        **author,
    )
    if tokenizer is None and before is not None:
        manifest = replace(manifest, tokenizer=before.tokenizer)
    kept = _HOLDS if holds else ("end",)
    record: Mapping[str, Any] = {
        **{name: source.record[name] for name in kept if name in source.record},
        "baked_from": facts,
    }
    return write_adapter(
        directory,
        module=module,
        config=module.config,
        manifest=manifest,
        heads=handle.heads.trained,
        record=record,
        source=before,
    )
