"""FlashAttention-4, for Hopper and Blackwell, where it is installed: `pip install prefixcore[flash]`.

Causal is aligned bottom-right there, as in this op, so a prefix laid in front of the keys is plain causal attention
(`beside.py`). It takes sliding windows, softcap, sinks and packed rows besides, and so does the sequence's part of
the merged and folded paths where PyTorch's fused attention cannot.

Its Python interface is a pre-release. What is called of it is two functions, by keyword alone, and their signatures
are looked at first: a version that has not what is needed is as good as none.

A gradient of keys is summed over the query heads that share them, in any order unless `deterministic=True`. A prefix's
gradient has the same bits on every run, so wherever one is wanted of a grouped head, that is asked for.
"""

from __future__ import annotations

import inspect
from functools import cache, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import as_gradient, strides_are_free
from ..problem import AttentionProblem
from . import recording
from .fused_attention import FusedAttention, Rule, is_aligned, objection, without_prefix

PACKAGE = "flash-attn-4"
INTERFACE = "flash_attn.cute.interface"
GENERATIONS = (9, 10, 11)
"""Major compute capabilities: Hopper and Blackwell. On 12.x (consumer Blackwell) its backward is not deterministic."""

FORWARD = (
    "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "softmax_scale", "causal", "softcap",
    "window_size_left", "learnable_sink", "return_lse",
)  # fmt: skip
BACKWARD = (
    "q", "k", "v", "out", "dout", "lse", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "softmax_scale", "causal",
    "softcap", "window_size_left", "deterministic",
)  # fmt: skip
"""The arguments of `_flash_attn_fwd` and `_flash_attn_bwd` that are given; all others keep their defaults."""


class Spans(NamedTuple):
    """Which rows of packed queries and keys a sequence has, int32; or of keys alone, how many each batch row uses."""

    queries: Tensor | None = None  # [sequences + 1]
    keys: Tensor | None = None  # [sequences + 1]
    used: Tensor | None = None  # [B]


# --- whether it is there ------------------------------------------------------------------------------


@cache
def installed() -> str | None:
    """The version that is installed, or None. Imports nothing."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


@cache
def _loaded() -> tuple[ModuleType | None, str]:
    """Its interface, or None and why it cannot be used. To import it takes seconds: it waits for the first call."""
    try:
        interface = import_module(INTERFACE)
    except Exception as error:  # a broken or half-installed package fails in many ways, and is never needed
        return None, f"{PACKAGE} {installed()} cannot be imported ({type(error).__name__}: {error})"
    for name, needed in (("_flash_attn_fwd", FORWARD), ("_flash_attn_bwd", BACKWARD)):
        function = getattr(interface, name, None)
        there = inspect.signature(function).parameters if callable(function) else {}
        if missing := [argument for argument in needed if argument not in there]:
            return None, f"{PACKAGE} {installed()} has another interface ({name} lacks {', '.join(missing)})"
    return interface, ""


def unavailable(device: torch.device) -> str | None:
    """Why it cannot be used on `device`, in words; None if it can."""
    if installed() is None:
        return "FlashAttention-4 is not installed (pip install prefixcore[flash])"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major not in GENERATIONS:
            return f"FlashAttention-4 is for Hopper and Blackwell, and the GPU has compute capability {major}.{minor}"
    return _loaded()[1] or None


recording.depends_on("strides of gradients", strides_are_free)

# --- what it may be given -----------------------------------------------------------------------------

_PASSED_ON = ("scale", "sliding_window", "softcap", "cu_seqlens")
_OURS = ("prefix_key", "prefix_value", "prefix_index", "prefix_lengths", "sinks")

_RULES = (
    Rule("mask", lambda p: p.mask is None, "there is a mask over queries and keys"),
    Rule("padding", lambda p: p.padding is None, "there is a padding mask"),
    Rule("query", lambda p: p.query.dtype in (torch.bfloat16, torch.float16) or not p.query.is_cuda,
         "FlashAttention-4 takes bfloat16 and float16 alone"),
    Rule("value", lambda p: p.value_dim == p.head_dim, "keys and values have different head dims"),
    Rule("query", lambda p: p.head_dim % 8 == 0 and p.head_dim <= 128,
         "the head dim is no multiple of 8, or more than 128"),
    Rule("key", lambda p: bool(p.query.numel() and p.key.numel()), "there is nothing to attend"),
    Rule("query", lambda p: all(is_aligned(x) for x in (p.query, p.key, p.value)),
         "rows do not begin at multiples of 16 bytes"),
    Rule("is_causal", lambda p: not (p.is_causal and p.queries > p.keys),
         "it is causal over fewer keys than queries: the first see nothing of the sequence"),
)  # fmt: skip

ALLOWED = frozenset((*_PASSED_ON, *_OURS, *(rule.field for rule in _RULES)))
"""The fields of the record of which something is said above. Any other one has to be off."""


def cannot(p: AttentionProblem) -> str | None:
    """What about `p` is beyond FlashAttention-4, or why it is not there, in words; None if nothing is."""
    return unavailable(p.query.device) or objection(p, _RULES, ALLOWED, "FlashAttention-4")


# --- calling it ---------------------------------------------------------------------------------------


def attend(
    p: AttentionProblem, key: Tensor, value: Tensor, spans: Spans, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output [B, H, T, D] and log-sum-exp [B, H, T] of the queries of `p` over keys [B, Hkv, any, D].

    Where the rows are packed (`spans.queries`), `key` and `value` have a batch of 1, too.
    """
    packed = spans.queries is not None
    out, lse = recording.call(
        _forward, *(_tokens(x, packed) for x in (p.query, key, value)), *spans, sinks, softmax_scale=p.scale,
        causal=p.is_causal, softcap=p.softcap or None, window_size_left=p.window - 1 if p.window else None,
    )  # fmt: skip
    return (_heads(out, packed), lse[None] if packed else lse)


def attend_backward(
    p: AttentionProblem, key: Tensor, value: Tensor, spans: Spans, grad_out: Tensor, out: Tensor, lse: Tensor,
    *, repeatable: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value, laid out as [B, T, H, D], from the output and log-sum-exp of everything.

    `repeatable`: the gradients of `key` and `value` are to have the same bits on every run. Sinks need not be named:
    their part is in `out` and `lse`.
    """
    packed = spans.queries is not None
    grads = recording.call(
        _backward, *(_tokens(x, packed) for x in (p.query, key, value, out, grad_out)), lse[0] if packed else lse,
        *spans, softmax_scale=p.scale, causal=p.is_causal, softcap=p.softcap,
        window_size_left=p.window - 1 if p.window else None,
        deterministic=torch.are_deterministic_algorithms_enabled() or (repeatable and p.group > 1),
    )  # fmt: skip
    query, key, value = (_heads(grad, packed) for grad in grads)
    return query, key, value


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None, learnable_sink: Tensor | None, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse, *_ = _interface()._flash_attn_fwd(
        q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k,
        learnable_sink=learnable_sink, return_lse=True, **options,
    )  # fmt: skip
    return out, lse


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, seqused_k: Tensor | None, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    query, key, value, *_ = _interface()._flash_attn_bwd(
        q=q, k=k, v=v, out=out, dout=dout, lse=lse, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k, **options,
    )  # fmt: skip
    return query, key, value


def _interface() -> Any:
    interface, reason = _loaded()
    if interface is None:
        raise RuntimeError(f"{reason}; install {PACKAGE} anew, or remove it")
    return interface


def _tokens(x: Tensor, packed: bool) -> Tensor:
    """`x` [B, H, T, D] as it is taken: [B, T, H, D], packed [T, H, D]."""
    return x[0].transpose(0, 1) if packed else x.transpose(1, 2)


def _heads(x: Tensor, packed: bool) -> Tensor:
    """What is given, [B, T, H, D] or packed [T, H, D], as [B, H, T, D]."""
    return x.transpose(0, 1)[None] if packed else x.transpose(1, 2)


# --- as one of the fused attentions -------------------------------------------------------------------


def _spans(p: AttentionProblem) -> Spans:
    """Those of the sequence alone."""
    if p.cu_seqlens is None:
        return Spans()
    from .kernels.beside import launch_spans

    return launch_spans(without_prefix(p))


def _fused_forward(p: AttentionProblem) -> tuple[Tensor, Tensor]:
    return attend(p, p.key, p.value, _spans(p), None)


def _fused_backward(
    p: AttentionProblem, grad_out: Tensor, out: Tensor, lse: Tensor, *, repeatable: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = attend_backward(p, p.key, p.value, _spans(p), grad_out, out, lse, repeatable=repeatable)
    return as_gradient(query, p.query), as_gradient(key, p.key), as_gradient(value, p.value)


FLASH4 = FusedAttention("FlashAttention-4", _fused_forward, _fused_backward)
FLASH4_REPEATABLE = FLASH4._replace(backward=partial(_fused_backward, repeatable=True))
"""The same where the keys are a prefix: its gradients have the same bits on every run."""
