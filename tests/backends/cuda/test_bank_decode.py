"""Decode over a prompt bank on a GPU or the emulated one: the tensor cores' operand layouts included."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .conftest import Gpu

HALVES = (torch.bfloat16, torch.float16)


def reference(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor | None, lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """In float64, row by row."""
    batch, heads, queries, _ = query.shape
    out = torch.zeros(batch, heads, queries, value.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, heads, queries), -math.inf, dtype=torch.float64)
    for b, entry in enumerate([0] * batch if index is None else index.tolist()):
        length = 0 if entry < 0 else key.shape[2] if lengths is None else int(lengths[entry])
        if length == 0:
            continue
        keys, values = (x[entry, :, :length].double().repeat_interleave(heads // x.shape[1], 0) for x in (key, value))
        scores = query[b].double() @ keys.transpose(1, 2) * scale
        out[b], lse[b] = scores.softmax(-1) @ values, scores.logsumexp(-1)
    return out, lse


def check(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """The weights are rounded to ``dtype`` before they meet the values, as in every flash kernel."""
    error = {torch.bfloat16: 6e-3, torch.float16: 8e-4}[dtype]
    torch.testing.assert_close(got[0].double(), expected[0], rtol=error, atol=error)
    torch.testing.assert_close(got[1].double(), expected[1], rtol=2e-6, atol=2e-6)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random numbers in the middle of memory full of NaN: whatever is read beside them shows."""
    memory = torch.full([*shape[:-2], shape[-2] + 5, shape[-1] + 16], math.nan, dtype=dtype)
    return memory[..., 2:-3, 8:-8].normal_()


def problem(
    batch: int, heads: int, kv_heads: int, queries: int, dim: int, value_dim: int, bank: int, length: int,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        poisoned(batch, heads, queries, dim, dtype=dtype),
        poisoned(bank, kv_heads, length, dim, dtype=dtype),
        poisoned(bank, kv_heads, length, value_dim, dtype=dtype),
        torch.randint(-1, bank, (batch,)),
        torch.randint(0, length + 1, (bank,)),
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "queries", "dim", "value_dim", "bank", "length", "processors"),
    [
        (1, 1, 1, 1, 32, 32, 1, 1, 1),
        (3, 4, 2, 1, 64, 64, 2, 150, 4),  # every warp has keys of its own: few rows
        (2, 8, 1, 3, 80, 80, 2, 100, 4),  # two warps of rows
        (6, 12, 1, 2, 64, 64, 2, 63, 1),  # four
        (20, 4, 4, 1, 32, 48, 3, 129, 8),  # many batch rows share an entry and a block
        (5, 8, 2, 1, 128, 128, 2, 320, 16),
        (2, 2, 2, 1, 96, 112, 2, 20, 4),
        (2, 4, 1, 2, 256, 256, 2, 100, 8),  # tiles of 32 keys, queries not kept in registers
        (3, 6, 2, 1, 64, 224, 2, 70, 4),
        (2, 10, 1, 9, 64, 32, 2, 90, 4),  # several blocks for one batch row
        (70, 1, 1, 1, 32, 32, 1, 16, 1),  # more rows of one entry than a block holds
    ],
)
def test_against_the_reference(
    gpu: Gpu, batch: int, heads: int, kv_heads: int, queries: int, dim: int, value_dim: int, bank: int,
    length: int, processors: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    inputs = problem(batch, heads, kv_heads, queries, dim, value_dim, bank, length, dtype)
    got = gpu.twice(lambda: gpu.bank_decode(*inputs, 0.2), processors)
    check(got, reference(*inputs, 0.2), dtype)


@pytest.mark.parametrize("batch", [130, 300])
def test_rows_of_an_entry_scattered_over_a_large_batch(gpu: Gpu, batch: int) -> None:
    query, key, value, _, lengths = problem(batch, 1, 1, 1, 32, 32, 7, 20, torch.float16)
    index = torch.randint(-1, 7, (batch,))
    got = gpu.twice(lambda: gpu.bank_decode(query, key, value, index, lengths, 0.2), 1)
    check(got, reference(query, key, value, index, lengths, 0.2), torch.float16)


@pytest.mark.parametrize("processors", [1, 2, 3, 5, 8, 64])
def test_any_number_of_splits(gpu: Gpu, processors: int) -> None:
    inputs = problem(2, 2, 1, 1, 64, 64, 1, 700, torch.float16)
    got = gpu.twice(lambda: gpu.bank_decode(*inputs[:3], None, None, 0.2), processors)
    check(got, reference(*inputs[:3], None, None, 0.2), torch.float16)


def test_one_prefix_is_a_bank_of_one(gpu: Gpu) -> None:
    query, key, value, *_ = problem(3, 4, 2, 1, 64, 64, 1, 40, torch.bfloat16)
    got = gpu.twice(lambda: gpu.bank_decode(query, key[0], value[0], None, None, 0.2))
    check(got, reference(query, key, value, None, None, 0.2), torch.bfloat16)


def test_rows_without_a_prefix(gpu: Gpu) -> None:
    query, key, value, *_ = problem(4, 2, 1, 1, 32, 32, 2, 40, torch.bfloat16)
    index, lengths = torch.tensor([-1, 0, 1, -1], dtype=torch.int32), torch.tensor([33, 0])
    out, lse = gpu.twice(lambda: gpu.bank_decode(query, key, value, index, lengths, 0.2))
    check((out, lse), reference(query, key, value, index, lengths, 0.2), torch.bfloat16)
    assert (out[[0, 2, 3]] == 0).all()
    assert (lse[[0, 2, 3]] == -math.inf).all()


def test_what_is_out_of_range_is_nan_in_its_own_rows(gpu: Gpu) -> None:
    query, key, value, *_ = problem(6, 2, 1, 1, 32, 32, 4, 40, torch.float16)
    index, lengths = torch.tensor([4, 0, -2, 1, 2, 2**40]), torch.tensor([33, 41, -1, 9])
    out, lse = gpu.twice(lambda: gpu.bank_decode(query, key, value, index, lengths, 0.2))
    bad = torch.tensor([0, 2, 3, 4, 5])
    assert out[bad].isnan().all()
    assert lse[bad].isnan().all()
    expected = reference(query[1:2], key, value, index[1:2], lengths, 0.2)
    check((out[1:2], lse[1:2]), expected, torch.float16)


@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_small_and_large_scores(gpu: Gpu, size: float) -> None:
    query, key, value, index, lengths = problem(2, 4, 2, 1, 64, 64, 2, 150, torch.bfloat16)
    query.mul_(size)
    got = gpu.twice(lambda: gpu.bank_decode(query, key, value, index, lengths, 1.0))
    check(got, reference(query, key, value, index, lengths, 1.0), torch.bfloat16)


def test_scores_of_minus_infinity_come_to_nothing(gpu: Gpu) -> None:
    query, key, value, index, lengths = problem(1, 1, 1, 1, 32, 32, 1, 40, torch.bfloat16)
    index[:], lengths[:] = 0, 40
    query[..., 0] = 1.0
    key[:, :, :32, 0] = -math.inf  # all that some warp sees of its first tile, too
    got = gpu.twice(lambda: gpu.bank_decode(query, key, value, index, lengths, 1.0))
    check(got, reference(query, key, value, index, lengths, 1.0), torch.bfloat16)


def test_tensors_that_copies_of_sixteen_bytes_cannot_read(gpu: Gpu) -> None:
    dtype = torch.float16
    query = torch.randn(2 * 2 * 32 + 1).to(dtype)[1:].view(2, 2, 1, 32)
    key = torch.randn(1, 1, 20, 33).to(dtype)[..., 1:]
    value = torch.randn(1, 1, 32, 20).to(dtype).transpose(2, 3)
    got = gpu.twice(lambda: gpu.bank_decode(query, key, value, None, None, 0.2))
    check(got, reference(query, key, value, None, None, 0.2), dtype)


def test_nothing_to_do(gpu: Gpu) -> None:
    query, key, value, index, lengths = problem(3, 2, 1, 1, 32, 48, 2, 10, torch.float16)
    out, lse = gpu.bank_decode(query[:0], key, value, index[:0], lengths, 1.0)
    assert (out.shape, lse.shape) == ((0, 2, 1, 48), (0, 2, 1))
    assert gpu.bank_decode(query[:, :, :0], key, value, index, lengths, 1.0)[0].shape == (3, 2, 0, 48)
    for keys, values, rows, sizes in (
        (key[:, :, :0], value[:, :, :0], index, torch.zeros(2, dtype=torch.int64)),
        (key[:0], value[:0], torch.full((3,), -1), torch.zeros(0, dtype=torch.int64)),
    ):
        out, lse = gpu.bank_decode(query, keys, values, rows, sizes, 1.0)
        assert torch.equal(out, torch.zeros(3, 2, 1, 48))
        assert (lse == -math.inf).all()


def test_banks_beyond_32_bits(gpu: Gpu, tmp_path: Path) -> None:
    """A sparse file of 2.2 billion numbers; only its last entry is ever touched."""
    entries, length, dim = 2_100, 8_192, 128
    with open(tmp_path / "bank", "wb") as file:
        file.truncate(entries * length * dim * 2)
    bank = torch.from_file(
        str(tmp_path / "bank"), shared=True, size=entries * length * dim, dtype=torch.bfloat16
    ).view(entries, 1, length, dim)  # fmt: skip
    assert bank.numel() > 2**31
    bank[-1, :, :100].normal_()
    query, index = torch.randn(1, 2, 1, dim).bfloat16(), torch.tensor([entries - 1])
    lengths = torch.full((entries,), 100)
    got = gpu.bank_decode(query, bank, bank, index, lengths, 0.1)
    check(got, reference(query, bank, bank, index, lengths, 0.1), torch.bfloat16)


def test_merged_with_the_sequence_it_is_attention_over_both(gpu: Gpu) -> None:
    query, key, value, index, lengths = problem(4, 4, 2, 1, 64, 64, 3, 80, torch.bfloat16)
    keys, values = torch.randn(2, 4, 2, 30, 64).bfloat16()
    sequence, lse = reference(query, keys, values, torch.arange(4), None, 0.2)
    out, lse = sequence.bfloat16(), lse.float()
    prefix_out, prefix_lse = gpu.bank_decode(query, key, value, index, lengths, 0.2)
    gpu.lse_merge(out, lse, prefix_out, prefix_lse)
    for b in range(4):
        length = int(lengths[index[b]]) if index[b] >= 0 else 0
        both = [torch.cat([p[index[b], :, :length], s[b]], 1)[None] for p, s in ((key, keys), (value, values))]
        expected, expected_lse = reference(query[b : b + 1], *both, None, None, 0.2)
        torch.testing.assert_close(out[b : b + 1].double(), expected, rtol=2e-2, atol=1e-2)
        torch.testing.assert_close(lse[b : b + 1].double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_bad_arguments_are_refused(gpu: Gpu) -> None:
    query, key, value, index, lengths = problem(3, 4, 2, 1, 64, 64, 2, 10, torch.float16)
    for arguments, message in [
        (
            (query.float(), key.float(), value.float(), index, lengths),
            "expected bfloat16 or float16, got Float: use prefix_attention",
        ),
        ((query, key.bfloat16(), value, index, lengths), "prefix_key: expected the dtype of query"),
        ((query[0], key, value, index, lengths), "query: expected 4 dimensions"),
        ((query, key[0, 0], value, index, lengths), "prefix_key: expected 4 dimensions"),
        ((query, key, value[:, :, :9], index, lengths), r"prefix_value: expected the shape \[2, 2, 10, 64\], got"),
        ((query[..., :32], key, value, index, lengths), "prefix_key: expected the last dimension of query, 32, got"),
        ((query[..., :40], key[..., :40], value, index, lengths), "multiple of 16 from 32 to 256, got 40"),
        ((query, key, value[..., :16], index, lengths), "prefix_value: .* multiple of 16 from 32 to 256, got 16"),
        ((query[:, :3], key, value, index, lengths), "expected a multiple of the prefix's 2 heads, got 3"),
        ((query, key, value, index[:2], lengths), r"prefix_index: expected the shape \[3\], got \[2\]"),
        ((query, key, value, index.float(), lengths), "prefix_index: expected int64 or int32"),
        ((query, key, value, index, lengths[:1]), r"prefix_lengths: expected the shape \[2\], got \[1\]"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            gpu.bank_decode(*arguments, 1.0)


def test_opcheck(gpu: Gpu) -> None:
    inputs = problem(3, 4, 2, 1, 64, 48, 2, 10, torch.float16)
    gpu.opcheck("bank_decode", *inputs, 0.2)
    gpu.opcheck("bank_decode", *inputs[:3], None, None, 0.2)
    gpu.opcheck("split_reduction", torch.randn(3, 4, 5), 0.2)
    out, lse = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)
    gpu.opcheck("lse_merge", out, lse, out.clone(), lse.clone())
