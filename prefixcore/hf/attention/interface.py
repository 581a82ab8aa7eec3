"""The attention function that transformers calls in place of its own.

While a prefix is attached, and with a soft prompt from the first packed batch on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ...ops import prefix_attention
from ..batch.packing import num_shared_tokens
from .disabled import NamedAttention, find_attention, other_attention
from .mass import is_watching, note_mass
from .prefix import PrefixCall, running_call

ATTENTION = "prefixcore"
"""The name of the function in transformers' attention and mask interfaces."""

LAYER = "_prefixcore"
"""The attribute of an attention module of an attached model: a `Layer`."""

PREFIXES = "prefixcore_prefixes"
"""The argument by which a decoder hands its attention layers the prefixes of the call, a `PrefixCall`."""


class NoArgumentsError(RuntimeError):
    """A layer of an attached model was called without the arguments that its decoder is called with."""


class Layer(NamedTuple):
    """What an attention module of an attached model knows.

    Attributes:
        numbers: which of the model's attention layers it is; several where layers share a module, in their order.
        other_attention: the name of the attention that the model had before.
        is_handed_arguments: whether it gets the arguments that the decoder is called with.
    """

    numbers: tuple[int, ...]
    other_attention: str
    is_handed_arguments: bool = True


def prefix_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    prefixcore_prefixes: PrefixCall | None = None,
    prefixcore_other_attention: str | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the prefix and the sequence, or in a disabled forward the attention that the model had before.

    Args:
        module, query, key, value, attention_mask, kwargs: as of an attention function of transformers.
        prefixcore_prefixes: the prefixes of the call.
        prefixcore_other_attention: the name of the attention of a disabled forward (`OTHER_ATTENTION`).

    Raises:
        NotImplementedError: as of `attend_to_prefix_and_sequence`.
        RuntimeError: a layer of an attached model gets neither of the two arguments.
    """
    layer: Layer | None = module.__dict__.get(LAYER)
    if layer is not None and not layer.is_handed_arguments and prefixcore_other_attention is None:
        prefixcore_prefixes, prefixcore_other_attention = running_call(), other_attention(module.config)
    if layer is not None and prefixcore_prefixes is None and _is_in_backward():
        # Gradient checkpointing repeats a forward that ran before ours came in.
        prefixcore_other_attention = prefixcore_other_attention or layer.other_attention
    if prefixcore_other_attention is not None:
        attend = find_attention(prefixcore_other_attention, module)
        named: Any = module
        if prefixcore_other_attention not in ("eager", "sdpa"):
            named = NamedAttention(module, prefixcore_other_attention)
        return attend(named, query, key, value, attention_mask, **kwargs)
    if layer is None:  # of another model that shares the configuration
        prefixcore_prefixes = None
    elif prefixcore_prefixes is None:
        raise NoArgumentsError(
            f"{type(module).__name__} does not get the arguments of its model's forward, which evaluates the prefix: "
            "call the model that the prefix is attached to, or detach"
        )
    number = None
    if layer is not None and prefixcore_prefixes is not None:
        number = prefixcore_prefixes.next_of(layer.numbers)
    return attend_to_prefix_and_sequence(
        module, number, prefixcore_prefixes, query, key, value, attention_mask, **kwargs
    )


def _is_in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def attend_to_prefix_and_sequence(
    module: nn.Module,
    layer: int | None,
    prefixes: PrefixCall | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    position_bias: Tensor | None = None,
    head_mask: Tensor | None = None,
    cache: Any = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over the module's prefix, if it has one, and the sequence.

    Args:
        module: the attention module.
        layer: which of the model's attention layers it is.
        prefixes: the prefixes of the call; None: none.
        query: [B, H, T, D], after the rotary embedding.
        key, value: [B, Hkv, S, D] and [B, Hkv, S, Dv], after the cache.
        attention_mask: what `mask.py` made: None, a padding mask [B, S], or four dimensions that say
            everything there is to say about visibility; or the caller's own mask of four dimensions.
        dropout: of a frozen model's attention weights; not applied (`attach` warns).
        scaling, sliding_window, softcap: as the op's.
        is_causal: overrides `module.is_causal`.
        s_aux: [H], attention sinks.
        cu_seq_lens_q, cu_seq_lens_k: int [sequences + 1], where the sequences of a packed batch meet. A mask that comes
            along says the same, or is the empty one of `batch/packing.py`, whose shape tells how many tokens come
            before the packed ones and are seen by all of them: T and S count these too, cu_seq_lens_q does not.
        max_length_q: the longest packed sequence; None: it is read from cu_seq_lens_q where it matters.
        position_bias: [1 or B, H, T, S], added to the scores of the sequence; a prefix has no distance, and so none.
        head_mask, cache, output_attentions: refused.

    Returns:
        [B, T, H, Dv], contiguous, and None for the weights.

    Raises:
        NotImplementedError: an argument that the op does not have, named; a packed batch without its lengths.
    """
    if head_mask is not None or cache is not None or output_attentions:
        _refuse(head_mask=head_mask, cache=cache, output_attentions=output_attentions)

    prefix_key = prefix_value = index = lengths = None
    if prefixes is not None and layer is not None:
        if prefixes.recorded is not None:
            prefixes.recorded[layer] = key[0], value[0]
        pair = prefixes.at(layer, query.device)
        if pair is not None:
            prefix_key, prefix_value = pair
            if prefixes.index is not None:
                assert prefixes.lengths is not None
                index, lengths = prefixes.index.to(query.device), prefixes.lengths[layer].to(query.device)

    num_shared = 0
    if cu_seq_lens_q is not None:
        num_shared, attention_mask = num_shared_tokens(attention_mask), None
    elif attention_mask is not None and attention_mask.shape[-1] == 0:
        raise NotImplementedError(
            f"{type(module).__name__} is called without the cu_seq_lens_q that its model got, so sequences cannot be "
            "packed in this model: pad them into rows of their own"
        )
    if attention_mask is not None and attention_mask.dim() == 4:  # says everything: causality and window included
        is_causal, sliding_window = False, None
    elif is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if not is_causal:  # where tokens see later ones, a window has two sides, and a mask says it where it hides any
        if cu_seq_lens_q is not None and sliding_window is not None:
            raise NotImplementedError(
                f"{type(module).__name__} has a window to both sides, so sequences cannot be packed: pad them into rows"
            )
        sliding_window = None
    if position_bias is not None:
        if cu_seq_lens_q is not None:
            _refuse(position_bias=position_bias)
        attention_mask = _with_bias(position_bias, attention_mask)

    attend = partial(
        prefix_attention,
        is_causal=is_causal,
        scale=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    if num_shared:
        assert cu_seq_lens_q is not None
        return _attend_after_shared(
            attend, num_shared, query, key, value, cu_seq_lens_q, max_length_q, sliding_window
        ), None

    def attend_to(value: Tensor, prefix_value: Tensor | None) -> Tensor:
        return attend(
            query, key, value, prefix_key, prefix_value, prefix_index=index, prefix_lengths=lengths,
            attn_mask=attention_mask, cu_seqlens=cu_seq_lens_q,
        )  # fmt: skip

    if prefix_value is not None and layer is not None and is_watching():
        note_mass(attend_to, layer, value, prefix_value)
    out = attend_to(value, prefix_value)
    return out.transpose(1, 2), None


def _with_bias(bias: Tensor, mask: Tensor | None) -> Tensor:
    """A bias of the scores and a mask as one additive mask [B, H, T, S]."""
    bias = bias.detach()  # of frozen weights; T5 lets a bias of zeros require a gradient under gradient checkpointing
    if mask is None:
        return bias
    if mask.dim() == 2:
        mask = mask[:, None, None, :]
    return bias + mask if mask.is_floating_point() else bias.masked_fill(~mask.bool(), float("-inf"))


def _attend_after_shared(
    attend: Callable[..., Tensor],
    num_shared: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_length: int | None,
    window: int | None,
) -> Tensor:
    """Attention [1, P + T, H, Dv] of P shared tokens, and of T packed ones that see them and their own sequence.

    To the packed tokens the keys and values of the shared ones are a prefix, one that is computed from the layer below
    and passes its gradient on to it. The op shows a prefix to every query, but the shared tokens stand within the
    sliding window: where the window hides some of them, each sequence runs by itself, behind its own copy of them.
    """
    parts = [num_shared, query.shape[2] - num_shared]
    shared_query, query = query.split(parts, 2)
    shared_key, key = key.split(parts, 2)
    shared_value, value = value.split(parts, 2)
    outs = [attend(shared_query, shared_key, shared_value)]
    if max_length is None:
        max_length = 0 if window is None else int(cu_seqlens.diff().max())
    if window is None or num_shared + max_length <= window:
        dtype = torch.promote_types(key.dtype, value.dtype)  # they differ under autocast: rotation is in float32
        prefix = shared_key[0].to(dtype), shared_value[0].to(dtype)
        outs.append(attend(query, key, value, *prefix, cu_seqlens=cu_seqlens))
    else:
        lengths = cu_seqlens.diff().tolist()
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
            outs.append(attend(q, torch.cat((shared_key, k), 2), torch.cat((shared_value, v), 2)))
    return torch.cat([out.transpose(1, 2) for out in outs], 1)


def _refuse(**arguments: Any) -> NoReturn:
    names = [name for name, value in arguments.items() if value is not None and value is not False]
    reasons = {
        "position_bias": "sequences cannot be packed in a model that biases scores by position",
        "head_mask": "heads cannot be masked one by one",
        "cache": "pages of keys and values are read in generate_batch and init_continuous_batching alone",
        "output_attentions": "attention weights are never formed; leave output_attentions out, or detach first",
    }
    raise NotImplementedError(
        "prefix attention cannot honour " + "; ".join(f"{name}: {reasons[name]}" for name in names)
    )


AttentionInterface.register(ATTENTION, prefix_attention_forward)
