"""Laying keys and values beside their prefix, and taking gradients apart again: the kernels by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixcore.backends.problem import AttentionProblem, attention_problem
from prefixcore.backends.triton.kernels import beside
from tests.device import DEVICE
from tests.ops.problems import Problem

CASES: dict[str, dict[str, Any]] = {
    "one prefix": {"B": 3},
    "one token": {"T": 1, "P": 1, "B": 1},
    "fewer keys than queries": {"T": 7, "S": 4},
    "a bank, some rows without a prefix": {"B": 6, "N": 3, "index": True, "lengths": True},
    "a shorter prefix": {"lengths": True},
    "packed": {"packed": (5, 1, 17)},
    "packed, empty sequences, a bank": {"packed": (0, 5, 0, 0, 3, 0), "N": 3, "index": True, "lengths": True},
    "head dim 20, one head a group, float32 prefix": {
        "D": 20, "H": 3, "Hkv": 3, "dtype": torch.float16, "prefix_dtype": torch.float32},
}  # fmt: skip


def record(case: str) -> AttentionProblem:
    return Problem(**{"T": 9, "P": 5, "seed": 3, **CASES[case]}).record()


def sequences(p: AttentionProblem) -> Iterator[tuple[int, slice, int, int]]:
    """Of each sequence: its batch row, its tokens, its entry of the bank and how much of it counts."""
    ends = [0, p.keys] * p.batch if p.cu_seqlens is None else p.cu_seqlens.tolist()
    for n in range(p.sequences):
        entry = 0 if p.prefix_index is None else int(p.prefix_index[n])
        length = p.virtual_tokens if p.prefix_lengths is None else int(p.prefix_lengths[max(entry, 0)])
        row, tokens = (n, slice(0, p.keys)) if p.cu_seqlens is None else (0, slice(ends[n], ends[n + 1]))
        yield row, tokens, max(entry, 0), 0 if entry < 0 else length


def expected(p: AttentionProblem, x: Tensor, prefix: Tensor) -> list[Tensor]:
    """What each sequence's keys (or values) are, [Hkv, any, D]."""
    return [torch.cat([prefix[entry, :, :length].to(x.dtype), x[row][:, tokens]], 1)
            for row, tokens, entry, length in sequences(p)]  # fmt: skip


def places(p: AttentionProblem) -> list[tuple[int, slice]]:
    """Where each sequence's keys are laid: a batch row and slots."""
    found, begin = [], 0
    for n, (_, tokens, _, length) in enumerate(sequences(p)):
        size = length + tokens.stop - tokens.start
        found.append((n, slice(0, size)) if p.cu_seqlens is None else (0, slice(begin, begin + size)))
        begin += size
    return found


@pytest.mark.parametrize("case", CASES)
def test_laying_out(case: str) -> None:
    """And zeros in all other room, because a masked key counts 0 times its value."""
    p = record(case)
    laid = beside.launch_lay(p, beside.launch_spans(p))
    for got, x, prefix in zip(laid, (p.key, p.value), p.bank, strict=True):
        assert got.dtype == p.query.dtype
        assert got.transpose(1, 2).is_contiguous()
        rest = got.clone()
        for (row, slots), want in zip(places(p), expected(p, x, prefix), strict=True):
            assert torch.equal(got[row, :, slots], want)
            rest[row, :, slots] = 0
        assert not rest.any()


@pytest.mark.parametrize("case", CASES)
def test_taking_apart(case: str) -> None:
    """The prefix's part is summed in float32, in the order of the sequences: the very bits of that sum."""
    p = record(case)
    spans = beside.launch_spans(p)
    shape = beside.launch_lay(p, spans)[0].shape
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(shape, generator=g).to(p.query) for _ in range(2)]
    for grad in grads:  # where nothing was laid there is nothing to read
        unused = torch.ones(shape[0], shape[2], dtype=torch.bool)
        for row, slots in places(p):
            unused[row, slots] = False
        grad.transpose(1, 2)[unused.to(grad.device)] = torch.nan
    of_sequence = [torch.full_like(x, torch.nan) for x in (p.key, p.value)]
    beside.launch_take(p, spans, *grads, *of_sequence)
    sums = beside.launch_sum(p, spans, *grads)
    for grad, got, total in zip(grads, of_sequence, sums, strict=True):
        want = torch.zeros_like(total)
        for (row, slots), (b, tokens, entry, length) in zip(places(p), sequences(p), strict=True):
            part = grad[row, :, slots]
            assert torch.equal(got[b, :, tokens], part[:, length:])
            want[entry, :, :length] += part[:, :length].float()
        assert total.dtype == torch.float32
        assert torch.equal(total, want)


def test_strided_views_and_hidden_garbage() -> None:
    """Keys and values as slices of a fused projection; of an entry what is beyond its length may be anything."""
    p = record("a bank, some rows without a prefix")
    fused = torch.randn(p.batch, p.keys, 3, p.kv_heads, p.head_dim, device=DEVICE)
    dirty = [x.clone() for x in p.bank]
    beyond = torch.arange(p.virtual_tokens, device=DEVICE) >= p.prefix_lengths[:, None]
    for x in dirty:
        x.transpose(1, 2)[beyond] = torch.nan
    p = p._replace(
        key=fused[:, :, 1].transpose(1, 2), value=fused[:, :, 2].transpose(1, 2), prefix_key=dirty[0],
        prefix_value=dirty[1],
    )  # fmt: skip
    for got, x, prefix in zip(beside.launch_lay(p, beside.launch_spans(p)), (p.key, p.value), p.bank, strict=True):
        for (row, slots), want in zip(places(p), expected(p, x, prefix), strict=True):
            assert torch.equal(got[row, :, slots], want)
        assert not got.isnan().any()


def test_many_sequences_are_counted_in_several_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "_SCANNED", 4)
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 4, (11,), generator=g)
    p = Problem(packed=tuple(lengths.tolist()), N=3, index=True, lengths=True).record()
    spans = beside.launch_spans(p)
    assert spans.queries.tolist() == p.cu_seqlens.tolist()
    assert spans.keys.tolist() == [0, *(slots.stop for _, slots in places(p))]
    dense = Problem(B=11, N=3, index=True, lengths=True).record()
    assert beside.launch_spans(dense).used.tolist() == [length + dense.keys for *_, length in sequences(dense)]


def test_nothing_is_counted_where_all_is_used() -> None:
    x = torch.randn(2, 2, 4, 16, device=DEVICE)
    for prefix in (None, torch.randn(2, 3, 16, device=DEVICE)):
        assert beside.launch_spans(attention_problem(x, x, x, prefix, prefix)) == (None, None, None)
    assert beside.launch_spans(record("one prefix")._replace(prefix_key=x[0, :, :0])) == (None, None, None)
