"""`bake`: any soft prompt, text or reparameterized prefix as a plain prefix, which every server path can take."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters import AdapterError, check_target
from ...adapters.writing import check_apart
from ..attaching import check_model
from ..loading import Target
from ..positions.rotary import turn
from .bake_check import Check, Comparison, default_inputs
from .source import attach_found, from_adapter, from_text, logits_of
from .write_baked import plain_prefix, write_baked


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
        adapter: its folder, ours or one that PEFT wrote, or its name on the Hub; None: `text` is baked.
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
        source = from_text(target, text, tokenizer, bos)
        _warn_of_merges(tokenizer, text, inputs)
    else:
        source = from_adapter(target, Path(adapter), task_id, strict)
    virtual = source.pairs[0][0].shape[1]
    if source.position_offset != position_offset:
        source.pairs = turn(model, source.pairs, virtual if position_offset else -virtual, source.layers)
    ids = [_encode(tokenizer, each, model, without_bos=bool(bos)) for each in inputs]
    ids = ids or default_inputs(model, virtual)
    with source.original() as run:
        check = Check(model, run, ids)
    check.measure_effect(lambda ids: logits_of(model, ids))
    module = plain_prefix(source, len(target.attention_layers[0]), position_offset)
    with attach_found(target, module, source.layers, source.found) as handle:
        comparison = check.compare(lambda ids: logits_of(model, ids))
        author = {"task": task, "license": license, "intended_use": intended_use}
        write_baked(directory, handle, module, source, comparison, author, tokenizer)
    return Baked(Path(directory), virtual, comparison, source.method)


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
