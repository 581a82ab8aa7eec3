"""PyTorch's own fused attention, cuDNN's kernels and FlashAttention's: they do the sequence's part of the merged path.

They are called below SDPA, by the ops that also give the log-sum-exp, so that the prefix can be merged in afterwards;
and their backwards are called with the merged output and log-sum-exp, which makes them yield exactly the sequence's
part of the gradients. Whether cuDNN or FlashAttention is asked is PyTorch's choice (hardware, versions, dtype, head
dim, what `torch.nn.attention.sdpa_kernel` allows). FlashAttention 3 and 4 override these very ops where a user has
activated one.

PyTorch's never gets a mask, so in what it computes every query sees a key, and no log-sum-exp is infinite.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import attention
from torch.nn.attention import SDPBackend

from ..layout import as_gradient, heads_last
from ..problem import AttentionProblem, is_off
from .recording import depends_on, empty

_aten = torch.ops.aten
_NO_DROPOUT = 0.0
_active_flash: Callable[[], str | None] = getattr(attention, "current_flash_attention_impl", lambda: None)

depends_on("which FlashAttention is behind PyTorch's op", _active_flash)

# PyTorch's experiment with cuDNN's ragged layout stores the log-sum-exp in an order of its own.
_CUDNN_LAYOUT_IS_KNOWN = os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE") != "1"


class FusedAttention(NamedTuple):
    """A fused attention: `forward(p)` gives the sequence's own output and log-sum-exp [B, H, T], natural and float32;
    `backward(p, grad_out, out, lse)` the gradients of query, key and value, from the merged output and log-sum-exp.

    Outputs are laid out as [B, T, H, D], gradients as their tensors are. Prefix and sinks of `p` are not looked at.
    """

    name: str
    forward: Callable[[AttentionProblem], tuple[Tensor, Tensor]]
    backward: Callable[[AttentionProblem, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Rule(NamedTuple):
    """What a kernel may be given as one field of the record, and what speaks against all else, in words."""

    field: str
    allows: Callable[[AttentionProblem], bool]
    otherwise: str


_PASSED_ON = ("scale",)
"""The fields that PyTorch's take, whatever they are."""

_OURS = ("prefix_key", "prefix_value", "prefix_index", "prefix_lengths", "sinks")
"""The fields that our own kernels add to the sequence's part: PyTorch's never see them."""

_RULES = (
    Rule("cu_seqlens", lambda p: p.cu_seqlens is None, "the rows are packed"),
    Rule("mask", lambda p: p.mask is None, "there is a mask over queries and keys"),
    Rule("padding", lambda p: p.padding is None, "there is a padding mask"),
    Rule("sliding_window", lambda p: not p.window, "there is a sliding window"),
    Rule("softcap", lambda p: p.softcap == 0, "there is a softcap"),
    Rule("value", lambda p: p.value_dim == p.head_dim, "keys and values have different head dims"),
    Rule("query", lambda p: p.head_dim % 8 == 0 and p.head_dim <= 256,
          "the head dim is no multiple of 8, or more than 256"),
    Rule("key", lambda p: bool(p.query.numel() and p.key.numel()), "there is nothing to attend"),
    Rule("query", lambda p: all(is_aligned(x) for x in (p.query, p.key, p.value)),
          "rows do not begin at multiples of 16 bytes"),
    Rule("is_causal", lambda p: not (p.is_causal and 1 < p.queries != p.keys),
          "it is causal over more keys than queries, which PyTorch aligns top-left"),
)  # fmt: skip

ALLOWED = frozenset((*_PASSED_ON, *_OURS, *(rule.field for rule in _RULES)))
"""The fields of the record of which something is said above. Any other one has to be off."""


def cannot(p: AttentionProblem) -> str | None:
    """What about the sequence's part of `p` is beyond PyTorch's fused attention, in words; None if nothing is."""
    return objection(p, _RULES, ALLOWED, "PyTorch's fused attention")


def objection(p: AttentionProblem, rules: Sequence[Rule], allowed: Set[str], whose: str) -> str | None:
    """What speaks first against giving `p` to a kernel that follows these rules, in words; None if nothing does."""
    for field in p._fields:
        if field not in allowed and not is_off(getattr(p, field)):
            return f"there is a {field}, which {whose} is not known to take"
    for rule in rules:
        if not rule.allows(p):
            return rule.otherwise
    return None


def is_aligned(x: Tensor) -> bool:
    """Whether wide loads can read its rows. PyTorch's choice of a kernel does not ask."""
    wide = 16 // x.element_size()
    strides = (stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1)
    return not x.storage_offset() % wide and all(stride % wide == 0 for stride in strides)


def without_prefix(p: AttentionProblem) -> AttentionProblem:
    """The sequence's part of `p`."""
    return p._replace(
        prefix_key=p.prefix_key.narrow(-2, 0, 0), prefix_value=p.prefix_value.narrow(-2, 0, 0), prefix_index=None,
        prefix_lengths=None,
    )  # fmt: skip


def preferred(p: AttentionProblem, *, training: bool) -> FusedAttention | None:
    """The fused attention that PyTorch would choose where `cannot` says None; None: it has none for this.

    `training`: a backward is what is asked for. Some kernels have one for fewer head dims than the forward.
    """
    if not p.query.is_cuda:
        return STAND_IN
    if p.query.dtype == torch.float32:  # which none of them takes, and says so at every call
        return None
    query, key, value = p.query, p.key, p.value
    if training:
        query, key, value = (x.detach().requires_grad_() for x in (query, key, value))
    grouped = p.group > 1
    with torch.set_grad_enabled(training):
        try:
            choice = torch._fused_sdp_choice(
                query, key, value, None, _NO_DROPOUT, _causal(p), scale=p.scale, enable_gqa=grouped
            )
        except RuntimeError:  # every kernel that could is switched off
            return None
        if choice == SDPBackend.CUDNN_ATTENTION.value and (_active_flash() or not _CUDNN_LAYOUT_IS_KNOWN):
            parameters = torch.backends.cuda.SDPAParams(query, key, value, None, _NO_DROPOUT, _causal(p), grouped)
            if torch.backends.cuda.can_use_flash_attention(parameters):
                return FLASH
            if not _CUDNN_LAYOUT_IS_KNOWN:
                return None
    return {SDPBackend.CUDNN_ATTENTION.value: CUDNN, SDPBackend.FLASH_ATTENTION.value: FLASH}.get(choice)


def _causal(p: AttentionProblem) -> bool:
    """A lone query stands at the last key and sees all of them."""
    return p.is_causal and p.queries > 1


def _in_layout_of(query: Tensor, x: Tensor) -> Tensor:
    """`x` in the layout of an output for `query`. cuDNN's plans are cached by the layouts of the inputs alone."""
    wanted = torch.empty_like(query, device="meta").stride()
    return x if x.stride() == wanted else torch.empty_like(query).copy_(x)


def _unused_seed(p: AttentionProblem) -> Tensor:
    """Stands where dropout would have its random state. Nothing reads it; its dtype spares a conversion."""
    return empty(like=p.query, dtype=torch.int64)


def _cudnn_forward(p: AttentionProblem) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention.default(
        p.query, p.key, p.value, None, True, _NO_DROPOUT, _causal(p), False, scale=p.scale
    )
    return heads_last(out), lse.reshape(out.shape[:3])  # from [B, H, T, 1]


def _cudnn_backward(p: AttentionProblem, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, out = _in_layout_of(p.query, grad_out), _in_layout_of(p.query, out)
    seed = _unused_seed(p)
    query, key, value = _aten._scaled_dot_product_cudnn_attention_backward.default(
        grad_out, p.query, p.key, p.value, out, lse.contiguous()[..., None], seed, seed, None, None, None,
        p.queries, p.keys, _NO_DROPOUT, _causal(p), scale=p.scale,
    )  # fmt: skip
    return as_gradient(query, p.query), as_gradient(key, p.key), as_gradient(value, p.value)


def _flash_forward(p: AttentionProblem) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _aten._scaled_dot_product_flash_attention.default(
        p.query, p.key, p.value, _NO_DROPOUT, _causal(p), False, scale=p.scale
    )
    return heads_last(out), lse.contiguous()


def _flash_backward(p: AttentionProblem, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    seed = _unused_seed(p)
    query, key, value = _aten._scaled_dot_product_flash_attention_backward.default(
        grad_out, p.query, p.key, p.value, out, lse.contiguous(), None, None, p.queries, p.keys, _NO_DROPOUT,
        _causal(p), seed, seed, scale=p.scale,
    )  # fmt: skip
    return as_gradient(query, p.query), as_gradient(key, p.key), as_gradient(value, p.value)


def _stand_in_forward(p: AttentionProblem) -> tuple[Tensor, Tensor]:
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu.default(
        p.query, p.key, p.value, _NO_DROPOUT, _causal(p), scale=p.scale
    )
    return heads_last(out), lse.contiguous()


def _stand_in_backward(
    p: AttentionProblem, grad_out: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        grad_out, p.query, p.key, p.value, out, lse, _NO_DROPOUT, _causal(p), scale=p.scale
    )
    return as_gradient(query, p.query), as_gradient(key, p.key), as_gradient(value, p.value)


CUDNN = FusedAttention("cuDNN", _cudnn_forward, _cudnn_backward)
FLASH = FusedAttention("FlashAttention", _flash_forward, _flash_backward)
STAND_IN = FusedAttention("PyTorch's CPU flash attention", _stand_in_forward, _stand_in_backward)
"""Executes the merged path where there is no GPU: its ops take and give what the others do."""
