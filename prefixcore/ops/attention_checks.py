"""The argument checks of `prefix_attention`, and the forms it brings its arguments to."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..backends.checks import check_factors, check_storage
from ..backends.problem import TENSORS, AttentionProblem
from .checks import check_dense, check_tensor, has_values, of_all_calls, wrong

_INTEGERS = (torch.int64, torch.int32)
_NUMBERS = (float, int, torch.SymFloat, torch.SymInt)


def check_sequence(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Shapes, dtypes and devices of query, key and value."""
    dtype, device = query.dtype, query.device
    if not (
        query.dim() == key.dim() == value.dim() == 4
        and dtype == key.dtype == value.dtype
        and dtype.is_floating_point
        and device == key.device == value.device
    ):
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.dim() != 4:
                raise wrong(ValueError, name, "four dimensions [batch, heads, length, head dim]", list(x.shape))
            if not dtype.is_floating_point:
                raise wrong(TypeError, "query", "a floating-point dtype", dtype)
            if x.dtype != dtype:
                raise wrong(TypeError, name, f"{dtype} as query", x.dtype)
            if x.device != device:
                raise wrong(ValueError, name, f"device {device} as query", x.device)
    batch, heads, _, dim = query.shape
    key_batch, kv_heads, keys, key_dim = key.shape
    if dim == 0:
        raise wrong(ValueError, "query", "a head dim of at least 1", list(query.shape))
    if kv_heads == 0 or heads % kv_heads:
        raise wrong(ValueError, "key", f"a number of heads that divides query's {heads}", kv_heads)
    if key_batch != batch or key_dim != dim:
        expected = f"[{batch}, heads, keys, {dim}] to fit query {list(query.shape)}"
        raise wrong(ValueError, "key", expected, list(key.shape))
    if value.shape[:3] != (batch, kv_heads, keys):
        expected = f"[{batch}, {kv_heads}, {keys}, value dim] to fit key"
        raise wrong(ValueError, "value", expected, list(value.shape))


def check_prefix(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor | None, prefix_value: Tensor | None,
    prefix_index: Tensor | None, prefix_lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The prefix as the ops take it: one [Hkv, P, D] or a bank [N, Hkv, P, D]; none is one of length 0."""
    kv_heads, dim, value_dim = key.shape[1], query.shape[3], value.shape[3]
    if prefix_key is None or prefix_value is None:
        if prefix_key is not prefix_value:
            raise wrong(ValueError, "prefix_key and prefix_value", "both or neither", "one of them")
        for name, x in (("prefix_index", prefix_index), ("prefix_lengths", prefix_lengths)):
            if x is not None:
                hint = "give prefix_key and prefix_value too"
                raise wrong(ValueError, name, "None where there is no prefix", type(x).__name__, hint)
        return query.new_empty(kv_heads, 0, dim), query.new_empty(kv_heads, 0, value_dim)
    check_tensor("prefix_key", prefix_key)
    check_tensor("prefix_value", prefix_value)
    dtype, device = query.dtype, query.device
    key_shape, value_shape, key_dtype = prefix_key.shape, prefix_value.shape, prefix_key.dtype
    if (
        len(key_shape) == len(value_shape) == 3
        and key_shape[0] == value_shape[0] == kv_heads
        and key_shape[1] == value_shape[1]
        and key_shape[2] == dim
        and value_shape[2] == value_dim
        and (key_dtype == dtype or key_dtype == torch.float32)
        and prefix_value.dtype == key_dtype
        and prefix_key.device == prefix_value.device == device
    ):  # at once, for a small call feels it; what is wrong, or is a bank, is looked at below
        return prefix_key, prefix_value
    for name, x, width in (("prefix_key", prefix_key, dim), ("prefix_value", prefix_value, value_dim)):
        shape, prefix_dtype = x.shape, x.dtype
        if not 3 <= len(shape) <= 4 or shape[-3] != kv_heads or shape[-1] != width:
            expected = f"[{kv_heads}, P, {width}] or a bank [N, {kv_heads}, P, {width}]"
            raise wrong(ValueError, name, expected, list(shape))
        if prefix_dtype != dtype and prefix_dtype != torch.float32:
            expected = "torch.float32" if dtype == torch.float32 else f"{dtype} or torch.float32"
            raise wrong(TypeError, name, expected, prefix_dtype)
        if x.device != device:
            raise wrong(ValueError, name, f"device {device} as query", x.device)
    if prefix_value.shape[:-1] != prefix_key.shape[:-1]:
        expected = f"as many entries and virtual tokens as prefix_key {list(prefix_key.shape)}"
        raise wrong(ValueError, "prefix_value", expected, list(prefix_value.shape))
    if prefix_value.dtype != prefix_key.dtype:
        raise wrong(TypeError, "prefix_value", f"{prefix_key.dtype} as prefix_key", prefix_value.dtype)
    if bank_size(prefix_key) == 0:
        raise wrong(ValueError, "prefix_key", "a bank of at least one entry", list(prefix_key.shape))
    return prefix_key, prefix_value


def bank_size(prefix: Tensor) -> int:
    """How many prefixes there are: a prefix without a bank's dimension is one."""
    return prefix.shape[0] if prefix.dim() == 4 else 1


def _check_integers(name: str, x: Tensor, length: int, meaning: str, device: torch.device) -> None:
    check_tensor(name, x)
    check_dense(**{name: x})
    if x.dtype not in _INTEGERS:
        raise wrong(TypeError, name, "int64 or int32", x.dtype)
    if x.dim() != 1 or x.shape[0] != length:
        raise wrong(ValueError, name, f"[{length}] ({meaning})", list(x.shape))
    if x.device != device:
        raise wrong(ValueError, name, f"device {device} as query", x.device)


def check_bank(
    query: Tensor, prefix_key: Tensor, prefix_index: Tensor | None, prefix_lengths: Tensor | None, packed: int
) -> None:
    """The bank's index and lengths; `packed` is the number of packed sequences, 0 for a batch."""
    bank = bank_size(prefix_key)
    if prefix_index is not None:
        length, meaning = (packed, "one a packed sequence") if packed else (query.shape[0], "one a batch row")
        _check_integers("prefix_index", prefix_index, length, meaning, query.device)
    elif bank != 1:
        raise wrong(ValueError, "prefix_index", f"one entry a row to choose from the {bank} of the bank", None)
    if prefix_lengths is not None:
        _check_integers("prefix_lengths", prefix_lengths, bank, "one a bank entry", query.device)


def check_packing(query: Tensor, key: Tensor, cu_seqlens: Tensor) -> int:
    """How many sequences are packed."""
    check_tensor("cu_seqlens", cu_seqlens)
    check_dense(cu_seqlens=cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        expected = "[sequences + 1], starting at 0 and ending at T"
        raise wrong(ValueError, "cu_seqlens", expected, list(cu_seqlens.shape))
    _check_integers("cu_seqlens", cu_seqlens, cu_seqlens.shape[0], "sequences + 1", query.device)
    if query.shape[0] != 1:
        raise wrong(ValueError, "query", "a batch of 1 with cu_seqlens", list(query.shape))
    if key.shape[2] != query.shape[2]:
        raise wrong(ValueError, "key", f"as many keys as queries ({query.shape[2]}) with cu_seqlens", key.shape[2])
    return cu_seqlens.shape[0] - 1


def split_mask(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, virtual_tokens: int
) -> tuple[Tensor | None, Tensor | None]:
    """The mask as `(padding [B, S] bool, mask [B, H, T, S])`, at most one of them not None."""
    if attn_mask is None:
        return None, None
    check_tensor("attn_mask", attn_mask)
    check_dense(attn_mask=attn_mask)
    (batch, heads, queries, _), keys, shape = query.shape, key.shape[2], list(attn_mask.shape)
    boolean = attn_mask.dtype == torch.bool
    if not boolean and not attn_mask.dtype.is_floating_point:
        expected = "bool (True is visible) or additive floating point"
        raise wrong(TypeError, "attn_mask", expected, attn_mask.dtype, "turn a mask of 0 and 1 into mask.bool()")
    if attn_mask.device != query.device:
        raise wrong(ValueError, "attn_mask", f"device {query.device} as query", attn_mask.device)
    if attn_mask.requires_grad and torch.is_grad_enabled():
        expected, got = "a constant (no gradient is computed for it)", "a tensor that requires a gradient"
        raise wrong(ValueError, "attn_mask", expected, got, "pass attn_mask.detach()")
    # Sizes are compared one by one: for compiled code a number and a symbol that stands for it are not `in` each other.
    if attn_mask.dim() == 2:
        rows, columns = shape
        if columns != keys or (rows != batch and rows != 1):
            expected = f"a padding mask [{batch}, {keys}] (two dimensions are [B, S])"
            remedy = _without_prefix(shape, keys, virtual_tokens) or "write a mask [T, S] as mask[None, None]"
            raise wrong(ValueError, "attn_mask", expected, shape, remedy)
        if not boolean:
            expected = "bool (True is visible) where it has two dimensions [B, S]"
            remedy = "turn a mask of 0 and 1 into mask.bool(), and write an additive one as mask[:, None, None]"
            raise wrong(TypeError, "attn_mask", expected, attn_mask.dtype, remedy)
        attn_mask = attn_mask[:, None, None, :]
    sizes = zip(reversed(attn_mask.shape), (keys, queries, heads, batch), strict=False)
    if not 2 < attn_mask.dim() <= 4 or any(have != want and have != 1 for have, want in sizes):
        expected = f"a shape that broadcasts to {[batch, heads, queries, keys]}"
        raise wrong(ValueError, "attn_mask", expected, shape, _without_prefix(shape, keys, virtual_tokens))
    if boolean and attn_mask.dim() == 4 and attn_mask.shape[1] == attn_mask.shape[2] == 1:
        return attn_mask[:, 0, 0, :].expand(batch, keys), None
    if not boolean and attn_mask.dtype != query.dtype and query.dtype != torch.float64:
        if not torch.compiler.is_compiling():
            check_storage("attn_mask", attn_mask)
        attn_mask = attn_mask.float()
    return None, attn_mask.expand(batch, heads, queries, keys)


def _without_prefix(shape: list[int], keys: int, virtual_tokens: int) -> str:
    """How to mend a mask of this shape if it has the prefix's columns too."""
    if not shape or virtual_tokens == 0 or shape[-1] != virtual_tokens + keys:
        return ""
    return f"leave out the prefix, which every query sees: attn_mask[..., {virtual_tokens}:]"


def cast_for_autocast(dtype: torch.dtype, **tensors: Tensor) -> Iterator[Tensor]:
    """The tensors in `dtype`, if autocast may cast them: it casts no integers and nothing complex."""
    for name, x in tensors.items():
        if not x.dtype.is_floating_point:
            raise wrong(TypeError, name, "a floating-point dtype", x.dtype)
        if x.dtype != dtype and not torch.compiler.is_compiling():
            check_storage(name, x)
        yield x.to(dtype)


def check_options(
    query: Tensor,
    is_causal: bool,
    scale: float | None,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """The options that change the scores."""
    if not isinstance(is_causal, bool):
        raise wrong(TypeError, "is_causal", "True or False", repr(is_causal))
    for name, x in (("scale", scale), ("softcap", softcap)):
        if x is not None and (isinstance(x, bool) or not isinstance(x, _NUMBERS)):
            raise wrong(TypeError, name, "a number, or None", type(x).__name__)
    if softcap == 0:
        raise wrong(ValueError, "softcap", "none, or a number above 0", softcap)
    if scale is not None or softcap is not None:
        check_factors(1 / math.sqrt(query.shape[3]) if scale is None else scale, softcap or 0)
    if sliding_window is not None:
        if isinstance(sliding_window, bool) or not isinstance(sliding_window, (int, torch.SymInt)):
            raise wrong(TypeError, "sliding_window", "an integer, or None", repr(sliding_window))
        if sliding_window <= 0:
            raise wrong(ValueError, "sliding_window", "none, or at least 1", sliding_window)
    if sinks is None:
        return
    check_tensor("sinks", sinks)
    check_dense(sinks=sinks)
    if sinks.dim() != 1 or sinks.shape[0] != query.shape[1]:
        raise wrong(ValueError, "sinks", f"one logit a head [{query.shape[1]}]", list(sinks.shape))
    if not sinks.dtype.is_floating_point:
        raise wrong(TypeError, "sinks", "floating point", sinks.dtype)
    if sinks.device != query.device:
        raise wrong(ValueError, "sinks", f"device {query.device} as query", sinks.device)
    if sinks.requires_grad and torch.is_grad_enabled():
        expected, got = "a constant (no gradient is computed for it)", "a tensor that requires a gradient"
        raise wrong(ValueError, "sinks", expected, got, "freeze it with requires_grad_(False)")


def check_values(p: AttentionProblem) -> None:
    """The checks of memory and of what is in it, for the reference: the kernels make them themselves."""
    if not has_values(p.prefix_key):
        return
    for name, x in zip(TENSORS, p.tensors, strict=True):
        if x is not None:
            check_dense(**{name: x})
            check_storage(name, x)
    bank, capacity = bank_size(p.prefix_key), p.virtual_tokens
    for place, entry in enumerate(_values(p.prefix_index)):
        if not -1 <= entry < bank:
            raise wrong(IndexError, f"prefix_index[{place}]", f"-1 (none) to {bank - 1}", entry)
    for place, length in enumerate(_values(p.prefix_lengths)):
        if not 0 <= length <= capacity:
            raise wrong(ValueError, f"prefix_lengths[{place}]", f"0 to {capacity}", length)
    if p.cu_seqlens is not None:
        ends = p.cu_seqlens.tolist()
        rising = all(a <= b for a, b in zip(ends, ends[1:], strict=False))
        if ends[0] != 0 or ends[-1] != p.queries or not rising:
            raise wrong(ValueError, "cu_seqlens", f"a sequence rising from 0 to {p.queries}", ends)


def _values(x: Tensor | None) -> list[int]:
    """What is in `x`, under `torch.func.vmap` of all calls; of None nothing."""
    return [] if x is None else of_all_calls(x).flatten().tolist()
