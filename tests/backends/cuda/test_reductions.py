"""The split reduction and the merge of partial results on a GPU or the emulated one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from .conftest import Gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("shape", [(5,), (3, 2, 5, 8), (1, 1021), (2, 0, 4), ()])
@pytest.mark.parametrize("splits", [0, 1, 7, 8, 9, 20])
def test_splits_are_added_in_their_order(gpu: Gpu, splits: int, shape: tuple[int, ...]) -> None:
    partials = torch.randn(splits, *shape)
    out = gpu.twice(lambda: gpu.split_reduction(partials, 0.3))
    expected = torch.zeros(shape)
    for part in partials:
        expected = expected + part
    assert torch.equal(out, expected * 0.3)


def test_partials_that_are_views(gpu: Gpu) -> None:
    whole = torch.randn(4, 6, 20)
    for partials in (whole[:, 1:4], whole.transpose(1, 2), whole[:, :, 1:], whole.flatten()[1:461].view(4, 115)):
        out = gpu.twice(lambda p=partials: gpu.split_reduction(p, 1.0))
        torch.testing.assert_close(out, partials.sum(0))


def attend(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def parts(batch: int, heads: int, queries: int, dim: int, size: float = 3.0) -> tuple[list, tuple[Tensor, Tensor]]:
    """Two partial results in float64, and the whole one."""
    scores, values = torch.randn(batch, heads, queries, 19).double() * size, torch.randn(batch, heads, 19, dim).double()
    halves = [attend(scores[..., :7], values[:, :, :7]), attend(scores[..., 7:], values[:, :, 7:])]
    return halves, attend(scores, values)


@pytest.mark.parametrize("dim", [1, 6, 32, 80, 256])
@pytest.mark.parametrize(("dtype", "other_dtype"), [(d, o) for d in DTYPES for o in {d, torch.float32}])
def test_merge(gpu: Gpu, dtype: torch.dtype, other_dtype: torch.dtype, dim: int) -> None:
    halves, whole = parts(2, 3, 5, dim)
    (out, lse), (other_out, other_lse) = halves

    def run() -> tuple[Tensor, Tensor]:
        merged, merged_lse = out.to(dtype), lse.float()
        gpu.lse_merge(merged, merged_lse, other_out.to(other_dtype), other_lse.float())
        return merged, merged_lse

    merged, merged_lse = gpu.twice(run)
    error = {torch.float32: 1e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(merged.double(), whole[0], rtol=error, atol=error)
    torch.testing.assert_close(merged_lse.double(), whole[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["heads last", "inside others", "last dimension strided", "unaligned", "expanded"])
def test_merge_of_views_writes_only_its_own(gpu: Gpu, layout: str) -> None:
    halves, whole = parts(2, 3, 5, 8)
    (out, lse), (other_out, other_lse) = halves

    def run() -> tuple[Tensor, Tensor, Tensor]:
        memory = torch.full((2000,), 7.0)
        if layout == "heads last":
            view = memory[: 2 * 5 * 3 * 8].view(2, 5, 3, 8).transpose(1, 2)
        elif layout == "last dimension strided":
            view = memory[: 2 * 3 * 5 * 16].view(2, 3, 5, 16)[..., ::2]
        elif layout == "unaligned":
            view = memory[1 : 2 * 3 * 5 * 8 + 1].view(2, 3, 5, 8)
        else:
            view = memory[: 2 * 3 * 5 * 12].view(2, 3, 5, 12)[..., 4:]
        view.copy_(out)
        lse_view = torch.empty(2, 5, 3).transpose(1, 2).copy_(lse)
        other, other_lses = other_out.float(), other_lse.float()
        if layout == "expanded":  # one result for all queries
            other, other_lses = other[:, :, :1].expand(-1, -1, 5, -1), other_lses[:, :, :1].expand(-1, -1, 5)
        gpu.lse_merge(view, lse_view, other, other_lses)
        merged = view.clone()
        view.fill_(7.0)
        assert (memory == 7.0).all()
        return merged, lse_view

    merged, merged_lse = gpu.twice(run)
    if layout == "expanded":
        share = torch.sigmoid(other_lse[:, :, :1] - lse)[..., None]
        whole = (out + share * (other_out[:, :, :1] - out), torch.logaddexp(lse, other_lse[:, :, :1]))
    torch.testing.assert_close(merged, whole[0].float())
    torch.testing.assert_close(merged_lse, whole[1].float())


@pytest.mark.parametrize("nothing", [math.inf, -math.inf])
def test_rows_that_see_nothing(gpu: Gpu, nothing: float) -> None:
    """What stands in the output of a part that sees nothing is not read, were it NaN."""
    (out, lse), (other_out, other_lse) = ((o.float(), x.float()) for o, x in parts(1, 1, 4, 8)[0])
    for row in (1, 3):
        lse[0, 0, row], out[0, 0, row] = nothing, math.nan
    for row in (2, 3):
        other_lse[0, 0, row], other_out[0, 0, row] = nothing, math.nan

    def run() -> tuple[Tensor, Tensor]:
        merged, merged_lse = out.clone(), lse.clone()
        gpu.lse_merge(merged, merged_lse, other_out, other_lse)
        return merged, merged_lse

    merged, merged_lse = gpu.twice(run)
    assert torch.equal(merged[0, 0, 1], other_out[0, 0, 1])
    assert torch.equal(merged[0, 0, 2], out[0, 0, 2])
    assert torch.equal(merged[0, 0, 3], torch.zeros(8))
    assert torch.equal(merged_lse[0, 0, 1:], torch.tensor([other_lse[0, 0, 1], lse[0, 0, 2], -math.inf]))
    assert merged[0, 0, 0].isfinite().all()


@pytest.mark.parametrize("difference", [0.0, 1e-4, 20.0, 100.0, 5000.0, -100.0, -5000.0])
def test_merge_of_parts_far_apart(gpu: Gpu, difference: float) -> None:
    out, other = torch.full((1, 1, 1, 4), 3.0), torch.full((1, 1, 1, 4), -2.0)
    lse = torch.full((1, 1, 1), 40.0)
    gpu.lse_merge(out, lse, other, torch.full((1, 1, 1), 40.0 + difference))
    share = torch.sigmoid(torch.tensor(difference).double())
    torch.testing.assert_close(out.double(), (3 - 5 * share).expand(1, 1, 1, 4), rtol=1e-6, atol=1e-6)
    expected = torch.logaddexp(torch.tensor(40.0).double(), torch.tensor(40.0 + difference).double())
    torch.testing.assert_close(lse.double(), expected.expand(1, 1, 1), rtol=1e-6, atol=0)


def test_merge_of_nothing(gpu: Gpu) -> None:
    for shape in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
        gpu.lse_merge(*(torch.zeros(shape), torch.zeros(shape[:3])) * 2)


def test_bad_arguments_are_refused(gpu: Gpu) -> None:
    out, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    for arguments, message in [
        ((out[0], lse, out, lse), r"out: expected 4 dimensions, got \[2, 3, 4\]"),
        ((out, lse[..., :2], out, lse), r"lse: expected the shape \[1, 2, 3\], got \[1, 2, 2\]"),
        ((out, lse, out[..., :3], lse), r"other_out: expected the shape \[1, 2, 3, 4\], got \[1, 2, 3, 3\]"),
        ((out, lse, out, lse.double()), "other_lse: expected float32"),
        ((out.double(), lse, out, lse), "out: expected float32, bfloat16 or float16"),
        ((out, lse, out.half(), lse), "other_out: expected the dtype of out, or float32"),
        ((out, lse[:, :1].expand_as(lse), out, lse), "expected memory of its own for every element"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            gpu.lse_merge(*arguments)
    with pytest.raises((ValueError, RuntimeError), match="partials: expected float32"):
        gpu.split_reduction(out.half(), 1.0)
    with pytest.raises((ValueError, RuntimeError), match="partials: expected a dimension for the splits"):
        gpu.split_reduction(torch.tensor(1.0), 1.0)
