"""What a backend written in Python checks before a launch, as `csrc/checks.h` does before a C++ kernel runs.

The registered ops can be called without `prefixcore.ops`, and a kernel trusts every size, dtype and pointer: on a
GPU a wrong one ends the process's work there. Shapes and sizes are looked at, never what is in a tensor: nothing
waits for a device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .problem import TENSORS, AttentionProblem
from .protocol import DTYPES

_INTEGERS = (torch.int64, torch.int32)
_SMALLEST, _LARGEST = 1e-30, 1e30
"""Between these sizes scale, softcap and their quotient are float32 numbers of full precision, which the kernels take,
and overflow with no product of less than a hundred million. `csrc/attention_checks.h` says the same."""


def check_storage(name: str, x: Tensor) -> None:
    """ValueError unless the memory behind `x` holds its shape.

    Whoever frees a tensor's memory and keeps the tensor, as FSDP does with what it has sharded, leaves the shape as it
    was. Tensors without a storage of their own, such as those of `torch.func`, are not looked at.
    """
    try:
        have = x.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):
        return
    last, shape = x.storage_offset(), x.shape
    for size, stride in zip(shape, x.stride(), strict=True):
        if size == 0:
            return
        last += (size - 1) * stride
    need = (last + 1) * x.itemsize
    if have < need:
        raise ValueError(
            f"{name}: expected memory for the shape {list(shape)}, {need} bytes, got {have} bytes: its storage was "
            "freed or shrunk; if FSDP shards it, unshard() it first"
        )


def _fits(x: float) -> bool:
    """Whether float32 arithmetic holds `x`. Comparisons that NaN fails, and that compiled code can make."""
    return x == 0 or _SMALLEST <= x <= _LARGEST or -_LARGEST <= x <= -_SMALLEST


def check_factors(scale: float, softcap: float) -> None:
    """ValueError unless float32 arithmetic holds these and their quotient; a softcap of 0 is none."""
    if not _fits(scale):
        raise ValueError(f"scale: expected 0, or a size from {_SMALLEST} to {_LARGEST}, got {scale}")
    if softcap == 0:
        return
    if not _SMALLEST <= softcap <= _LARGEST:
        raise ValueError(f"softcap: expected none, or a number from {_SMALLEST} to {_LARGEST}, got {softcap}")
    if not _fits(scale / softcap):
        raise ValueError(
            f"scale / softcap: expected 0, or a size from {_SMALLEST} to {_LARGEST}, got {scale / softcap}"
        )


def _check(ok: Any, name: str, expected: str, got: Any) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def _check_shape(name: str, x: Tensor, *sizes: int | None) -> torch.Size:
    """The shape of `x`, which has these sizes; None is any."""
    shape = x.shape
    if len(shape) != len(sizes) or any(want not in (None, have) for have, want in zip(shape, sizes, strict=True)):
        expected = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(f"{name}: expected the shape [{expected}], got {list(shape)}")
    return shape


def check_attention(p: AttentionProblem) -> None:
    """ValueError unless a kernel can be given `p`."""
    batch, heads, queries, dim = _check_shape("query", p.query, None, None, None, None)
    _, kv_heads, keys, _ = _check_shape("key", p.key, batch, None, None, dim)
    *_, value_dim = _check_shape("value", p.value, batch, kv_heads, keys, None)
    _check(dim > 0, "query", "a head dim of at least 1", dim)
    _check(kv_heads > 0 and heads % kv_heads == 0, "key", f"a number of heads that divides query's {heads}", kv_heads)
    bank = (None,) if p.prefix_key.dim() == 4 else ()
    shape = _check_shape("prefix_key", p.prefix_key, *bank, kv_heads, None, dim)
    _check_shape("prefix_value", p.prefix_value, *shape[:-1], value_dim)
    entries = shape[0] if bank else 1
    _check(entries > 0, "prefix_key", "a bank of at least one entry", list(shape))

    dtype, prefix_dtype, device = p.query.dtype, p.prefix_key.dtype, p.query.device
    _check(dtype in DTYPES, "query", "float32, bfloat16 or float16", dtype)
    _check(p.key.dtype == p.value.dtype == dtype, "key and value", f"{dtype} as query", (p.key.dtype, p.value.dtype))
    _check(prefix_dtype in (dtype, torch.float32), "prefix_key", f"{dtype} or torch.float32", prefix_dtype)
    _check(p.prefix_value.dtype == prefix_dtype, "prefix_value", f"{prefix_dtype} as prefix_key", p.prefix_value.dtype)

    sequences = batch
    if p.cu_seqlens is not None:
        (ends,) = _check_shape("cu_seqlens", p.cu_seqlens, None)
        expected = "two numbers or more, a batch of 1, and as many keys as queries"
        _check(ends >= 2 and batch == 1 and keys == queries, "cu_seqlens", expected, (ends, batch, keys, queries))
        sequences = ends - 1
    vectors = {"prefix_index": sequences, "prefix_lengths": entries, "cu_seqlens": sequences + 1}
    for name, length in vectors.items():
        if (vector := getattr(p, name)) is not None:
            _check_shape(name, vector, length)
            _check(vector.dtype in _INTEGERS, name, "int64 or int32", vector.dtype)
    if p.padding is not None:
        _check_shape("padding", p.padding, batch, keys)
        _check(p.padding.dtype == torch.bool, "padding", "torch.bool", p.padding.dtype)
    if p.mask is not None:
        _check_shape("mask", p.mask, batch, heads, queries, keys)
        _check(p.mask.dtype in (torch.bool, *DTYPES), "mask", "bool or floating point", p.mask.dtype)
    if p.sinks is not None:
        _check_shape("sinks", p.sinks, heads)
        _check(p.sinks.dtype.is_floating_point, "sinks", "floating point", p.sinks.dtype)
    for name, x in zip(TENSORS, p.tensors, strict=True):
        if x is not None:
            _check(x.device == device, name, f"device {device} as query", x.device)
            check_storage(name, x)
    check_factors(p.scale, p.softcap)
    _check(p.sliding_window >= 0, "sliding_window", "none, or at least 1", p.sliding_window)


def check_outputs(p: AttentionProblem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """ValueError unless these belong to `p`: what the backward is given of the forward, and what comes from behind."""
    numbers = p.query.shape[:3]
    for name, x, shape in (
        ("grad_out", grad_out, (*numbers, p.value_dim)), ("out", out, (*numbers, p.value_dim)),
        ("lse", lse, numbers), ("grad_lse", grad_lse, numbers),
    ):  # fmt: skip
        if x is None:
            continue
        _check_shape(name, x, *shape)
        _check(x.dtype.is_floating_point, name, "floating point", x.dtype)
        _check(x.device == p.query.device, name, f"device {p.query.device} as query", x.device)
        check_storage(name, x)
    _check(lse.dtype == torch.float32, "lse", "torch.float32", lse.dtype)
    for name, x in (("grad_out", grad_out), ("out", out)):
        _check(x.dtype == p.query.dtype, name, f"{p.query.dtype} as query", x.dtype)


def _check_ids(input_ids: Tensor, vocabulary: int, num_virtual: int) -> None:
    _check(input_ids.dtype in _INTEGERS, "input_ids", "int64 or int32", input_ids.dtype)
    rows = vocabulary + num_virtual
    _check(vocabulary >= 0 and num_virtual >= 0 and rows < 2**63, "vocabulary and num_virtual", "sizes of at least 0",
           (vocabulary, num_virtual))  # fmt: skip
    if rows > 2**31:
        _check(input_ids.dtype == torch.int64, "input_ids", f"int64, for int32 does not count to {rows} rows", "int32")
    check_storage("input_ids", input_ids)


def check_embedding(input_ids: Tensor, weight: Tensor, virtual: Tensor) -> None:
    """ValueError unless a kernel can be given the arguments of `soft_embedding`."""
    vocabulary, hidden = _check_shape("weight", weight, None, None)
    num_virtual, _ = _check_shape("virtual", virtual, None, hidden)
    _check(weight.dtype in DTYPES, "weight", "float32, bfloat16 or float16", weight.dtype)
    _check(virtual.dtype in (weight.dtype, torch.float32), "virtual", f"{weight.dtype} or float32", virtual.dtype)
    for name, x in (("input_ids", input_ids), ("virtual", virtual)):
        _check(x.device == weight.device, name, f"device {weight.device} as weight", x.device)
    _check_ids(input_ids, vocabulary, num_virtual)
    check_storage("weight", weight)
    check_storage("virtual", virtual)


def check_embedding_backward(grad: Tensor, input_ids: Tensor, vocabulary: int, num_virtual: int) -> None:
    """ValueError unless a kernel can be given the arguments of `soft_embedding_backward`."""
    _check_shape("grad", grad, *input_ids.shape, None)
    _check(grad.dtype in DTYPES, "grad", "float32, bfloat16 or float16", grad.dtype)
    _check(input_ids.device == grad.device, "input_ids", f"device {grad.device} as grad", input_ids.device)
    _check_ids(input_ids, vocabulary, num_virtual)
    check_storage("grad", grad)
