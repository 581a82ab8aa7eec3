"""What is baked: a text, or an adapter, with its keys and values and a way to run the original."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters import AdapterError, Manifest, adapter_digest, read_adapter, read_record
from ...adapters.files import find_adapter
from ...adapters.hub import local_folder
from ...nn import Config, MultitaskPrompt, Prefix
from ..attaching import attach_prefix, attach_soft_prompt
from ..attention.patch import frozen_run
from ..attention.prefix import KeyValue
from ..families import text_config
from ..handle import Handle
from ..loading import Found, Target
from .bake_check import Run
from .bake_prefix import check_can_be_exact, encode_text, ids_to_prefix, prompt_to_prefix

_LONGEST_TEXT = 100_000
"""Characters of a text that are kept beside its digest."""


@dataclass
class Source:
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


def from_text(target: Target, text: str, tokenizer: Any, bos: bool | None) -> Source:
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
        yield lambda ids: logits_of(model, torch.cat((front, ids)), skip=len(front))

    return Source("text", pairs, list(range(len(calls))), None, original, facts)


def from_adapter(target: Target, folder: Path, task_id: int | None, strict: bool) -> Source:
    model, folder = target.model, find_adapter(local_folder(folder))
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
        with attach_found(target, module.requires_grad_(False), layers, found):
            # Without a cache and by itself a soft prompt is put into the row, and not computed as a prefix.
            extra: dict[str, Any] = {"task_ids": [number]} if several else {}
            yield lambda ids: logits_of(model, ids, **extra)

    return Source(config.method, pairs, layers, config, original, facts, manifest, record, found)


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


def attach_found(target: Target, module: Any, layers: list[int], found: Found | None) -> Handle:
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


def logits_of(model: PreTrainedModel, ids: Tensor, skip: int = 0, **extra: Any) -> Tensor:
    """Logits [T, V] of ids [T] but for the first `skip`, fp32; [1, labels] of a head for sequences."""
    with frozen_run(model):
        output = model(input_ids=ids[None], use_cache=False, **extra)
    logits = getattr(output, "logits", None)
    logits = (output[0] if logits is None else logits).float()
    return logits if logits.dim() == 2 else logits[0, skip:]
