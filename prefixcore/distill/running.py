"""Running a model on prompts: its answers, and its logits where it predicts the tokens of given answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..training import TokenizedExample, collate
from ..training.data import IGNORED, make_batch
from ..training.ending import end_ids
from .front import Reader

PLAIN = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "return_dict_in_generate": False,
}
"""What a model's generation_config may set otherwise: answers are the likeliest tokens, or sampled of all of them."""

MOST_LOGITS = 2**26
"""Numbers of logits at once: a quarter of a gigabyte in float32."""


def answer(
    reader: Reader,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    padding: int,
    end: str | None = None,
    chat: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
    **more: Any,
) -> list[list[int]]:
    """The ids of the model's answers to one batch of prompts, up to and with what ends them.

    Args:
        reader: the model and what stands before the prompts.
        tokenizer: the model's.
        prompts: the ids of each.
        max_new_tokens: of an answer.
        padding: the id to pad with.
        end: text at which an answer ends; None: where the model ends it.
        chat: whether answers are turns of the assistant's.
        temperature: 0: the likeliest tokens; above: sampled.
        seed: of the sampling, by which torch's generator is left as it was.
        more: for `generate`, such as `top_p`.
    """
    model = reader.model
    batch = collate([TokenizedExample(reader.before + ids, []) for ids in prompts], padding, side="left")
    options: dict[str, Any] = {**PLAIN, "do_sample": False, **more}
    if temperature > 0:
        options = {**PLAIN, "do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, **more}
    if end is not None:
        options |= {"stop_strings": [end], "tokenizer": tokenizer}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        generated = model.generate(
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=padding,
            **options,
        )
    ends = end_ids(model, tokenizer, chat=chat)
    return [cut(ids, tokenizer, ends, end) for ids in generated[:, batch["input_ids"].shape[1] :].tolist()]


def cut(ids: Sequence[int], tokenizer: Any, ends: set[int], end: str | None) -> list[int]:
    """An answer up to the token that ends it, and with that."""
    for place, token in enumerate(ids):
        if token in ends or (end is not None and end in tokenizer.decode(ids[: place + 1])):
            return list(ids[: place + 1])
    return list(ids)


def said(tokenizer: Any, ids: Sequence[int], end: str | None) -> str:
    """The text of an answer, without what ends it and without white space around it."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return str(text.split(end)[0] if end is not None else text).strip()


def answer_logits(reader: Reader, rows: Sequence[tuple[list[int], list[int]]], padding: int) -> Tensor:
    """The logits [L, V] at the places that predict the L tokens of all answers, one row after the other.

    Args:
        reader: the model and what stands before the prompts.
        rows: the ids of a prompt and of its answer.
        padding: the id to pad with.
    """
    model = reader.model
    examples = [TokenizedExample(reader.before + prompt, answer) for prompt, answer in rows]
    batch = make_batch(examples, padding, packed=reader.packed, device=model.device)
    labels = batch.pop("labels")
    logits: Tensor = model(**batch, use_cache=False).logits
    if reader.packed:
        return logits[0, :-1]
    return logits[:, :-1][labels[:, 1:] != IGNORED]


def in_batches(lengths: Sequence[int], vocabulary: int, most: int) -> list[list[int]]:
    """Indices in batches of at most `most` answers, of `lengths` tokens, and of no more logits than fit at once."""
    batches: list[list[int]] = [[]]
    for index, length in enumerate(lengths):
        used = sum(lengths[i] for i in batches[-1])
        if batches[-1] and (len(batches[-1]) == most or (used + length) * vocabulary > MOST_LOGITS):
            batches.append([])
        batches[-1].append(index)
    return [batch for batch in batches if batch]
