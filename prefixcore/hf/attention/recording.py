"""The attention calls of one forward, as a recording attention function sees them."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ...nn import LayerShape
from ..families import text_config
from ..model.sample_inputs import sample_inputs
from ..model.tensor_parallel import HeadGroup, head_group
from .interface import PREFIXES, prefix_attention_forward
from .mask import prefix_mask
from .patch import frozen_run
from .prefix import PrefixCall

RECORDING = "prefixcore_recording"


@dataclass(frozen=True)
class AttentionCall:
    """One attention call of a forward.

    Attributes:
        module, name: the attention module and its name in the model.
        num_heads: H.
        key, value: [B, Hkv, S, D] and [B, Hkv, S, Dv], as attention sees them; of all heads, also where this process
            computes some of them.
        kwargs: the other arguments.
        place: "encoder", "decoder" or "cross" in an encoder-decoder; None in a model of one stack.
        group: the processes that share its heads; None: each has all of them.
        cache_layer: of attention that nothing but its cache reaches, its number there; None: the interface reaches it.
    """

    module: nn.Module
    name: str
    num_heads: int
    key: Tensor
    value: Tensor
    kwargs: dict[str, Any]
    place: str | None = None
    group: HeadGroup | None = None
    cache_layer: int | None = None

    @property
    def shape(self) -> LayerShape:
        """Hkv, D and Dv."""
        return LayerShape(self.key.shape[1], self.key.shape[3], self.value.shape[3])

    @property
    def is_causal(self) -> bool:
        """Whether a token sees none of those after it, as attention functions find out."""
        said = self.kwargs.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if said is None else said)


_calls: ContextVar[list[tuple[nn.Module, Tensor, Tensor, Tensor, dict[str, Any]]] | None] = ContextVar(
    "prefixcore_calls", default=None
)


def _record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    calls = _calls.get()
    if calls is not None:
        calls.append((module, query, key, value, kwargs))
    kwargs = {**kwargs, PREFIXES: PrefixCall([])}
    return prefix_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(RECORDING, _record)
AttentionMaskInterface.register(RECORDING, prefix_mask)


def record(model: PreTrainedModel, input_ids: Tensor, decoder_input_ids: Tensor | None = None) -> list[AttentionCall]:
    """The attention calls of one forward over `input_ids` [B, T], in order; the model is left as it was.

    A model that does not read tokens is given one image, or some sound, of noise.

    Keys and values are those that attention sees: after the rotary embedding, not repeated for the query heads. The
    decoder of an encoder-decoder reads `decoder_input_ids`, or the same ids.
    """
    names = {module: name for name, module in model.named_modules()}
    # The heads of encoder-decoders have wishes of their own: as many tokens in both, an end of the text.
    body: Any = model.base_model if model.config.is_encoder_decoder else model
    token = _calls.set([])
    try:
        with frozen_run(model, RECORDING):
            body(**sample_inputs(body, input_ids, decoder_ids=decoder_input_ids))
        calls = _calls.get() or []
    finally:
        _calls.reset(token)
    found = [
        AttentionCall(module, names[module], query.shape[1], key, value, kwargs)
        for module, query, key, value, kwargs in calls
    ]
    group = head_group(model)
    return found if group is None else [_with_all_heads(model, call, group) for call in found]


def _with_all_heads(model: PreTrainedModel, call: AttentionCall, group: HeadGroup) -> AttentionCall:
    """A call with the keys and values of the heads of all processes.

    Raises:
        NotImplementedError: it cannot be told which heads are whose.
    """
    config = text_config(model)
    expected = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    have = call.num_heads, call.key.shape[1]
    if have == expected:
        return call
    if (have[0] * group.size, have[1] * group.size) != expected:
        raise NotImplementedError(
            f"{call.name} has {have[0]} query and {have[1]} key/value heads in this process, one of {group.size} that "
            f"share {expected[0]} and {expected[1]}: for a prefix each of them needs the same share of both. Take a "
            "number of processes (tp_size) that divides both"
        )
    key, value = group.gather(call.key, 1), group.gather(call.value, 1)
    return replace(call, num_heads=expected[0], key=key, value=value, group=group)
