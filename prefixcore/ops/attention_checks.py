"""The argument checks of ``prefix_attention``, and the forms it brings its arguments to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import expect


def check_sequence(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        expect(x.dim() == 4, ValueError, name, "four dimensions [batch, heads, length, head dim]", list(x.shape))
        expect(x.dtype.is_floating_point and x.dtype == query.dtype, TypeError, name,
               "query's floating-point dtype", f"{x.dtype} (query has {query.dtype})")  # fmt: skip
        expect(x.device == query.device, ValueError, name, f"device {query.device} as query", x.device)
    batch, heads, _, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    expect(dim > 0, ValueError, "query", "a head dim of at least 1", list(query.shape))
    expect(kv_heads > 0 and heads % kv_heads == 0, ValueError, "key",
           f"a number of heads that divides query's {heads}", kv_heads)  # fmt: skip
    expect(key.shape[0] == batch and key.shape[3] == dim, ValueError, "key",
           f"[{batch}, heads, keys, {dim}] to fit query {list(query.shape)}", list(key.shape))  # fmt: skip
    expect(value.shape[:3] == key.shape[:3], ValueError, "value",
           f"[{batch}, {kv_heads}, {keys}, value dim] to fit key", list(value.shape))  # fmt: skip


def as_bank(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor | None, prefix_value: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The prefix as a bank [N, Hkv, P, D] (a single prefix is a bank of one, none is one of length 0)."""
    expect((prefix_key is None) == (prefix_value is None), ValueError, "prefix_key and prefix_value",
           "both or neither", "one of them")  # fmt: skip
    kv_heads, dim, value_dim = key.shape[1], key.shape[3], value.shape[3]
    if prefix_key is None or prefix_value is None:
        return query.new_empty(1, kv_heads, 0, dim), query.new_empty(1, kv_heads, 0, value_dim)
    if prefix_key.dim() == 3 and prefix_value.dim() == 3:
        prefix_key, prefix_value = prefix_key.unsqueeze(0), prefix_value.unsqueeze(0)
    for name, x, width in (("prefix_key", prefix_key, dim), ("prefix_value", prefix_value, value_dim)):
        fits = x.dim() == 4 and x.shape[1] == kv_heads and x.shape[3] == width
        expect(
            fits,
            ValueError,
            name,
            f"[{kv_heads}, P, {width}] or a bank [N, {kv_heads}, P, {width}]",
            list(x.shape),
        )
        expect(x.dtype in (query.dtype, torch.float32), TypeError, name, f"{query.dtype} or float32", x.dtype)
        expect(x.device == query.device, ValueError, name, f"device {query.device} as query", x.device)
    expect(prefix_key.shape[:3] == prefix_value.shape[:3], ValueError, "prefix_value",
           f"as many entries and virtual tokens as prefix_key {list(prefix_key.shape)}",
           list(prefix_value.shape))  # fmt: skip
    expect(prefix_key.dtype == prefix_value.dtype, TypeError, "prefix_value", f"{prefix_key.dtype} as prefix_key",
           prefix_value.dtype)  # fmt: skip
    expect(
        prefix_key.shape[0] > 0,
        ValueError,
        "prefix_key",
        "a bank of at least one entry",
        list(prefix_key.shape),
    )
    return prefix_key, prefix_value


def check_integers(name: str, x: Tensor, length: int, meaning: str, device: torch.device) -> None:
    expect(x.dtype in (torch.int64, torch.int32), TypeError, name, "int64 or int32", x.dtype)
    expect(x.dim() == 1 and x.shape[0] == length, ValueError, name, f"[{length}] ({meaning})", list(x.shape))
    expect(x.device == device, ValueError, name, f"device {device} as query", x.device)


def check_bank(
    query: Tensor, prefix_key: Tensor, prefix_index: Tensor | None, prefix_lengths: Tensor | None, packed: int
) -> None:
    bank = prefix_key.shape[0]
    if prefix_index is not None:
        length, meaning = (packed, "one a packed sequence") if packed else (query.shape[0], "one a batch row")
        check_integers("prefix_index", prefix_index, length, meaning, query.device)
    else:
        expect(
            bank == 1,
            ValueError,
            "prefix_index",
            f"one entry a row to choose from the {bank} of the bank",
            None,
        )
    if prefix_lengths is not None:
        check_integers("prefix_lengths", prefix_lengths, bank, "one a bank entry", query.device)


def check_packing(query: Tensor, key: Tensor, cu_seqlens: Tensor) -> int:
    """How many sequences are packed."""
    expect(cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 2, ValueError, "cu_seqlens",
           "[sequences + 1], starting at 0 and ending at T", list(cu_seqlens.shape))  # fmt: skip
    check_integers("cu_seqlens", cu_seqlens, cu_seqlens.shape[0], "sequences + 1", query.device)
    expect(query.shape[0] == 1, ValueError, "query", "a batch of 1 with cu_seqlens", list(query.shape))
    expect(key.shape[2] == query.shape[2], ValueError, "key",
           f"as many keys as queries ({query.shape[2]}) with cu_seqlens", key.shape[2])  # fmt: skip
    return cu_seqlens.shape[0] - 1


def split_mask(query: Tensor, key: Tensor, attn_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The mask as ``(padding [B, S] bool, mask [B, H, T, S])``, one of them None."""
    if attn_mask is None:
        return None, None
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    expect(attn_mask.dtype == torch.bool or attn_mask.dtype.is_floating_point, TypeError, "attn_mask",
           "bool (True is visible) or additive floating point", attn_mask.dtype,
           "turn a mask of 0 and 1 into mask.bool()")  # fmt: skip
    expect(
        attn_mask.device == query.device,
        ValueError,
        "attn_mask",
        f"device {query.device} as query",
        attn_mask.device,
    )
    expect(not attn_mask.requires_grad, ValueError, "attn_mask", "a constant (no gradient is computed for it)",
           "a tensor that requires a gradient", "pass attn_mask.detach()")  # fmt: skip
    shape = tuple(attn_mask.shape)
    if attn_mask.dim() == 2:
        expect(shape in ((batch, keys), (1, keys)), ValueError, "attn_mask",
               f"a padding mask [{batch}, {keys}] (two dimensions are [B, S])", list(shape),
               "write a mask [T, S] as mask[None, None]")  # fmt: skip
        attn_mask = attn_mask[:, None, None, :]
    fits = 2 < attn_mask.dim() <= 4 and all(
        have in (1, want) for have, want in zip(reversed(attn_mask.shape), (keys, queries, heads, batch), strict=False)
    )
    expect(
        fits,
        ValueError,
        "attn_mask",
        f"a shape that broadcasts to {[batch, heads, queries, keys]}",
        list(shape),
    )
    if attn_mask.dtype == torch.bool and attn_mask.dim() == 4 and attn_mask.shape[1:3] == (1, 1):
        return attn_mask[:, 0, 0, :].expand(batch, keys), None
    if attn_mask.dtype not in (torch.bool, torch.float32, torch.float64) and attn_mask.dtype != query.dtype:
        attn_mask = attn_mask.float()
    if attn_mask.dtype == torch.float64 and query.dtype != torch.float64:
        attn_mask = attn_mask.float()
    return None, attn_mask.expand(batch, heads, queries, keys)


def check_options(
    query: Tensor,
    scale: float | None,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    expect(scale is None or math.isfinite(scale), ValueError, "scale", "a finite number", scale)
    expect(sliding_window is None or sliding_window > 0, ValueError, "sliding_window", "at least 1, or None",
           sliding_window)  # fmt: skip
    expect(softcap is None or softcap > 0, ValueError, "softcap", "more than 0, or None", softcap)
    if sinks is not None:
        expect(sinks.dim() == 1 and sinks.shape[0] == query.shape[1], ValueError, "sinks",
               f"one logit a head [{query.shape[1]}]", list(sinks.shape))  # fmt: skip
        expect(sinks.dtype.is_floating_point, TypeError, "sinks", "floating point", sinks.dtype)
        expect(sinks.device == query.device, ValueError, "sinks", f"device {query.device} as query", sinks.device)
        expect(not (sinks.requires_grad and torch.is_grad_enabled()), ValueError, "sinks",
               "a constant (no gradient is computed for it)", "a tensor that requires a gradient",
               "freeze it with requires_grad_(False)")  # fmt: skip


def check_values(arguments: tuple) -> None:
    """The checks that read tensors; the kernels make them themselves."""
    prefix_key, prefix_index, prefix_lengths, cu_seqlens = (
        arguments[3],
        arguments[5],
        arguments[6],
        arguments[10],
    )
    if torch.compiler.is_compiling():
        return
    bank, capacity = prefix_key.shape[0], prefix_key.shape[2]
    if prefix_index is not None:
        for place, entry in enumerate(prefix_index.tolist()):
            expect(-1 <= entry < bank, IndexError, f"prefix_index[{place}]", f"-1 (none) to {bank - 1}", entry)
    if prefix_lengths is not None:
        for place, length in enumerate(prefix_lengths.tolist()):
            expect(0 <= length <= capacity, ValueError, f"prefix_lengths[{place}]", f"0 to {capacity}", length)
    if cu_seqlens is not None:
        ends, total = cu_seqlens.tolist(), arguments[0].shape[2]
        rising = all(a <= b for a, b in zip(ends, ends[1:], strict=False))
        expect(ends[0] == 0 and ends[-1] == total and rising, ValueError, "cu_seqlens",
               f"a sequence rising from 0 to {total}", ends)  # fmt: skip
