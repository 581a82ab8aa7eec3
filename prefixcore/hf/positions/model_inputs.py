"""What a model wants to know of every token besides its embedding, said of virtual tokens.

Some models look a token's id up once more: for embeddings of its own in each layer (Gemma 4), for where images stand
and so for positions of three axes (Qwen2-VL), for the last token that is not padding (classification heads). Given
embeddings alone, they raise, search the vocabulary for them, or are wrong. These models are given ids, in which each
virtual token has the id of a stand-in, and its embedding is put in place of the stand-in's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ...adapters.scaled_ids import scales_ids
from ..batch.layout import Layout
from ..families import text_config
from ..model.devices import device_of

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Arguments that tell of every token whether it is text, an image or something else."""

_TEXT_TYPE = 0


_found_to_read_ids: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
"""Models that failed when they were given embeddings alone, and passed with ids (`prefixcore.hf.verify`)."""


class _Calls(threading.local):
    def __init__(self) -> None:  # runs in each thread: compiled code is guarded by what an instance holds
        self.running: tuple[tuple[nn.Module, Callable[[Tensor], Tensor]], ...] = ()


_calls = _Calls()


@contextmanager
def stand_ins(embed: nn.Module, put: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A block in which `embed`, as this thread calls it, gives `put` of what it makes of ids with stand-ins."""
    before = _calls.running
    _calls.running = (*before, (embed, put))
    hook = embed.register_forward_hook(replace_stand_ins, prepend=True)
    try:
        yield
    finally:
        hook.remove()
        _calls.running = before


def has_stand_ins(embed: nn.Module) -> bool:
    """Whether a call with stand-ins is running in this thread."""
    return any(each is embed for each, _ in _calls.running)


def replace_stand_ins(embed: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The hook after each forward of the input embeddings: stand-ins get the embeddings of virtual tokens."""
    for each, put in reversed(_calls.running):
        if each is embed:
            return put(output)
    return output


def put_virtual(layout: Layout, virtual: Tensor, embeddings: Tensor) -> Tensor:
    """`embeddings` of ids with stand-ins, [B, P + T, E], `virtual` [B, P, E] in their place; others stay."""
    length = layout.num_virtual_tokens + layout.length
    if embeddings.dim() != 3 or embeddings.shape[:2] != (layout.batch_size, length):
        return embeddings
    return layout.insert(layout.remove(embeddings), virtual.to(device=embeddings.device, dtype=embeddings.dtype))


def reads_ids(model: PreTrainedModel) -> bool:
    """Whether the model looks at ids besides their embeddings, so that it is given ids with stand-ins."""
    known = has_axes(model) or has_layer_embeddings(model) or head_of(model) == SEQUENCE or scales_ids(model)
    return known or model in _found_to_read_ids


def found_to_read_ids(model: PreTrainedModel, found: bool) -> None:
    """Notes that the model has to be given ids, or takes the note back."""
    if found:
        _found_to_read_ids[model] = True
    else:
        _found_to_read_ids.pop(model, None)


def has_axes(model: PreTrainedModel) -> bool:
    """Whether positions have several axes (time, height, width), computed from where images stand in the ids."""
    return any(hasattr(type(module), "get_rope_index") for module in (model, model.base_model))


def has_layer_embeddings(model: PreTrainedModel) -> bool:
    """Whether each layer has embeddings of its own for every token of the vocabulary."""
    return bool(getattr(text_config(model), "hidden_size_per_layer_input", 0))


def stand_in(model: PreTrainedModel) -> int:
    """The id that virtual tokens have where a model reads ids.

    It has no meaning of its own: no special token, whose id models compare with. Where layers have embeddings of their
    own, the padding token's: the one that Gemma gives to what is no token of the vocabulary (images).
    """
    config = text_config(model)
    if has_layer_embeddings(model) and isinstance(config.pad_token_id, int) and config.pad_token_id >= 0:
        return config.pad_token_id
    special = set(_special_ids(model.config)) | set(_special_ids(getattr(model, "generation_config", None)))
    return next((i for i in range(config.vocab_size // 2, config.vocab_size) if i not in special), 0)


def plain_ids(model: PreTrainedModel, count: int) -> Tensor:
    """[1, count] ids spread evenly over the vocabulary, none of which is a special token."""
    config = text_config(model)
    special = set(_special_ids(model.config)) | set(_special_ids(getattr(model, "generation_config", None)))
    # Gemma 3n's embeddings of each layer end before the ids of images and sound.
    size = min(config.vocab_size, getattr(config, "vocab_size_per_layer_input", config.vocab_size))
    ids = []
    for i in range(1, count + 1):
        near = range(i * size // (count + 1), size)
        ids.append(next((each for each in near if each not in special and each not in ids), near[0]))
    return torch.tensor([ids], device=device_of(model))


def _special_ids(config: Any) -> Iterator[int]:
    """Every number that a configuration, or one inside it, names as a token."""
    if config is None:
        return
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _special_ids(value)
        elif "token" in name or name.endswith(("_id", "_index")):
            values = value if isinstance(value, (list, tuple)) else [value]
            yield from (each for each in values if isinstance(each, int))


def insert_token_types(model: PreTrainedModel, kwargs: dict[str, Any], layout: Layout) -> None:
    """Gives virtual tokens the type of text, in place: 0 in models that read images, else that of the first token."""
    for name in TOKEN_TYPES:
        types = kwargs.get(name)
        if types is None:
            continue
        if name == "mm_token_type_ids" or reads_images(model):
            kwargs[name] = layout.insert_value(types, _TEXT_TYPE)
        else:
            kwargs[name] = layout.insert(types, layout.first_of_text(types).expand(-1, layout.num_virtual_tokens))


def reads_images(model: PreTrainedModel) -> bool:
    """Whether the model's configuration has another one inside than that of its text decoder."""
    return text_config(model) is not model.config


def insert_positions(positions: Tensor, layout: Layout, missing: Tensor | None = None) -> Tensor:
    """Positions [B, T] or [axes, B, T] with those of virtual tokens, [..., B, P + T].

    The prompt counts on from the position of the first token of the text, and the text comes P later, on each axis.

    Args:
        positions: of the text.
        layout: where the virtual tokens stand.
        missing: [B, 1], how many virtual tokens fewer than P each row has; None: none.
    """
    if positions.dim() == 3:
        return torch.stack([insert_positions(axis, layout, missing) for axis in positions])
    positions = positions.expand(layout.batch_size, -1)
    fewer: Any = 0 if missing is None else missing
    slots = torch.arange(layout.num_virtual_tokens, device=positions.device)
    prompt = (layout.first_of_text(positions) + slots - fewer).clamp(min=0)
    return layout.insert(positions + layout.num_virtual_tokens - fewer, prompt)


def restarts(positions: Tensor) -> bool:
    """Whether positions go back within a row, as in a packed batch; of several axes the first, which images leave."""
    first = positions[0] if positions.dim() == 3 else positions
    return bool((first.diff(dim=-1) < 0).any())


def positions_from_mask(mask: Tensor) -> Tensor:
    """Positions of a padding mask [B, T], which do not count padding."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def text_positions(model: PreTrainedModel, positions: Tensor) -> Tensor | None:
    """Of positions with or without axes those that count tokens, [B, T]; None: they cannot be told.

    transformers gives axes in two ways: time, height and width behind a first axis that counts tokens, or all of them
    moved by `rope_deltas`, which says how much fewer positions images have than tokens.
    """
    if positions.dim() == 2:
        return positions
    if positions.shape[0] == 4:
        return positions[0]
    deltas = getattr(model.base_model, "rope_deltas", None)
    if isinstance(deltas, Tensor) and positions.shape[1] % deltas.shape[0] == 0:
        return positions[0] - deltas.to(positions.device).repeat_interleave(positions.shape[1] // deltas.shape[0], 0)
    return None


TOKENS, SEQUENCE, OTHER = "one output a token", "one output a sequence", "something else"
_SEQUENCE_HEAD = "ForSequenceClassification"
_TOKEN_HEADS = ("ForTokenClassification", "ForMaskedLM", "ForQuestionAnswering")
"""Of the last, the first and last places of an answer are two scores a token."""


def head_of(model: PreTrainedModel) -> str:
    """What the model's head returns: `TOKENS`, `SEQUENCE` or `OTHER`."""
    name = type(model).__name__
    if name.endswith(_SEQUENCE_HEAD):
        return SEQUENCE
    is_tokens = name.endswith(_TOKEN_HEADS) or model.can_generate() or model.base_model is model
    return TOKENS if is_tokens else OTHER
