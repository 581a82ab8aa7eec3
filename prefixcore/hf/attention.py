"""The attention function that transformers calls in place of its own.

While a prefix is attached, and with a soft prompt from the first packed batch on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..ops import prefix_attention
from .disabled import NamedAttention, find_attention, is_disabled
from .packing import num_shared_tokens

ATTENTION = "prefixcore"
"""The name of the function in transformers' attention and mask interfaces."""

LAYER_PREFIX = "_prefixcore"
"""The attribute of an attention module that holds its `LayerPrefix`."""

KeyValue = tuple[Tensor, Tensor]
"""A prefix of one layer: key [Hkv, P, D] and value [Hkv, P, Dv]."""


class LayerPrefix:
    """The prefix of one attention module, as the forward that is running computed it.

    Gradient checkpointing runs a layer's forward again in the backward, and must find the differentiable prefix of
    the first run. A forward without gradients may come in between, so it has an entry of its own.

    Copies and pickles start empty: the values belong to one forward of one model, and the next forward sets them.

    Attributes:
        differentiable: what forwards that record gradients read; None: not computed yet.
        baked: what forwards without gradients read; None: not computed yet.
        patch: the `Patch` that put it there.
    """

    __slots__ = ("differentiable", "baked", "patch")

    def __init__(self) -> None:
        self.differentiable: KeyValue | None = None
        self.baked: KeyValue | None = None
        self.patch: Any = None

    def __reduce__(self) -> tuple[type[LayerPrefix], tuple[()], tuple[None, dict[str, Any]]]:
        return LayerPrefix, (), (None, {"patch": self.patch})


def prefix_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    prefixcore_other_attention: str | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the prefix and the sequence, or in a disabled forward the attention that the model had before.

    Args:
        module, query, key, value, attention_mask, kwargs: as of an attention function of transformers.
        prefixcore_other_attention: the name of the attention of a disabled forward (`OTHER_ATTENTION`).

    Raises:
        NotImplementedError: as of `attend_to_prefix_and_sequence`; a disabled forward whose model does not hand on its
            arguments.
    """
    if prefixcore_other_attention is None:
        _check_not_disabled(module)
        return attend_to_prefix_and_sequence(module, query, key, value, attention_mask, **kwargs)
    attend = find_attention(prefixcore_other_attention, module)
    named: Any = module
    if prefixcore_other_attention not in ("eager", "sdpa"):
        named = NamedAttention(module, prefixcore_other_attention)
    return attend(named, query, key, value, attention_mask, **kwargs)


def _check_not_disabled(module: nn.Module) -> None:
    """Raises NotImplementedError if a forward is disabled but its attention was not told.

    Not in a backward, where gradient checkpointing repeats forwards that may have begun outside the block.
    """
    layer_prefix = module.__dict__.get(LAYER_PREFIX)
    if layer_prefix is None or not is_disabled(layer_prefix.patch):
        return
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        raise NotImplementedError(
            f"{type(module).__name__} does not get the arguments that its model is called with, so disabled() cannot "
            "reach it: detach instead"
        )


def attend_to_prefix_and_sequence(
    module: nn.Module,
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
        module: the attention module; without a `LayerPrefix` (another model that shares the config) it has none.
        query: [B, H, T, D], after the rotary embedding.
        key, value: [B, Hkv, S, D] and [B, Hkv, S, Dv], after the cache.
        attention_mask: what `prefixcore.hf.mask` made: None, a padding mask [B, S], or four dimensions that say
            everything there is to say about visibility; or the caller's own mask of four dimensions.
        dropout: of a frozen model's attention weights; not applied (`attach` warns).
        scaling, sliding_window, softcap: as the op's.
        is_causal: overrides `module.is_causal`.
        s_aux: [H], attention sinks.
        cu_seq_lens_q, cu_seq_lens_k: int [sequences + 1], where the sequences of a packed batch meet. A mask that comes
            along says the same, or is the empty one of `prefixcore.hf.packing`, whose shape tells how many tokens come
            before the packed ones and are seen by all of them: T and S count these too, cu_seq_lens_q does not.
        max_length_q: the longest packed sequence; None: it is read from cu_seq_lens_q where it matters.
        position_bias, head_mask, cache, output_attentions: refused.

    Returns:
        [B, T, H, Dv], contiguous, and None for the weights.

    Raises:
        NotImplementedError: an argument that the op does not have, named; a packed batch without its lengths.
        RuntimeError: the module was called outside its model's forward.
    """
    if position_bias is not None or head_mask is not None or cache is not None or output_attentions:
        _refuse(position_bias=position_bias, head_mask=head_mask, cache=cache, output_attentions=output_attentions)

    prefix_key = prefix_value = None
    layer_prefix = module.__dict__.get(LAYER_PREFIX)
    if layer_prefix is not None:
        key_value = layer_prefix.differentiable if torch.is_grad_enabled() else layer_prefix.baked
        if key_value is None:
            raise RuntimeError(
                f"{type(module).__name__} was called outside its model's forward, which evaluates the prefix: "
                "call the model that the prefix is attached to"
            )
        prefix_key, prefix_value = key_value
        if prefix_key.device != query.device:  # a model spread over several devices
            prefix_key, prefix_value = prefix_key.to(query.device), prefix_value.to(query.device)

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
    out = attend(query, key, value, prefix_key, prefix_value, attn_mask=attention_mask, cu_seqlens=cu_seq_lens_q)
    return out.transpose(1, 2), None


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
        "position_bias": "a bias of the scores by position has no meaning for virtual tokens",
        "head_mask": "heads cannot be masked one by one",
        "cache": "continuous batching (paged caches) is not supported; use generate without it",
        "output_attentions": "attention weights are never formed; leave output_attentions out, or detach first",
    }
    raise NotImplementedError(
        "prefix attention cannot honour " + "; ".join(f"{name}: {reasons[name]}" for name in names)
    )


AttentionInterface.register(ATTENTION, prefix_attention_forward)
