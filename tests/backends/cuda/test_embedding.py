"""Soft embedding on a GPU, or every index and every barrier of its kernels executed on the emulated one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from .conftest import Gpu

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["0", "1"], ids=["by rows", "streamed"])
def either_gather(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lookup by the kernels that run unless others are asked for, and by those."""
    monkeypatch.setenv("PREFIXCORE_STREAMED_EMBEDDING", request.param)


def ids_with_all(limit: int, *shape: int) -> Tensor:
    return torch.randint(0, limit, shape)


@pytest.mark.usefixtures("either_gather")
@pytest.mark.parametrize("hidden", [1, 7, 24, 96, 1000, 1024, 5000, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_gather(gpu: Gpu, dtype: torch.dtype, hidden: int) -> None:
    weight, virtual = torch.randn(20, hidden).to(dtype), torch.randn(5, hidden).to(dtype)
    ids = ids_with_all(25, 3, 7)
    out = gpu.twice(lambda: gpu.soft_embedding(ids, weight, virtual))
    assert torch.equal(out, torch.cat([weight, virtual])[ids])


@pytest.mark.usefixtures("either_gather")
@pytest.mark.parametrize("hidden", [5, 64, 3000])
@pytest.mark.parametrize("dtype", HALVES)
def test_virtual_rows_in_float32_are_rounded(gpu: Gpu, dtype: torch.dtype, hidden: int) -> None:
    weight, virtual = torch.randn(20, hidden).to(dtype), torch.randn(5, hidden)
    ids = ids_with_all(25, 21)
    out = gpu.twice(lambda: gpu.soft_embedding(ids, weight, virtual))
    assert torch.equal(out, torch.cat([weight, virtual.to(dtype)])[ids])


@pytest.mark.usefixtures("either_gather")
def test_tables_that_are_views(gpu: Gpu) -> None:
    for first, width in ((0, 32), (8, 32), (3, 32), (8, 30)):
        weight = torch.full((20, 48), torch.nan)[:, first : first + width].normal_()
        virtual = torch.full((10, 64), torch.nan)[::2, first : first + width].normal_()
        ids = ids_with_all(25, 9).int()
        out = gpu.twice(lambda ids=ids, w=weight, v=virtual: gpu.soft_embedding(ids, w, v))
        assert torch.equal(out, torch.cat([weight, virtual])[ids])


@pytest.mark.usefixtures("either_gather")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_an_id_out_of_range_makes_its_row_nan_and_no_other(gpu: Gpu, dtype: torch.dtype) -> None:
    weight, virtual = torch.randn(20, 40).to(dtype), torch.randn(5, 40).to(dtype)
    ids = torch.tensor([3, -1, 24, 25, 2**40, 19, -(2**40), 20])
    bad = torch.tensor([False, True, False, True, True, False, True, False])
    out = gpu.twice(lambda: gpu.soft_embedding(ids, weight, virtual))
    assert out[bad].isnan().all()
    assert torch.equal(out[~bad], torch.cat([weight, virtual])[ids[~bad]])
    grad = torch.randn(8, 40).to(dtype)
    backward = gpu.twice(lambda: gpu.soft_embedding_backward(grad, ids, 20, 5))
    expected = torch.zeros(5, 40)
    expected[4], expected[0] = grad[2], grad[7]
    assert torch.equal(backward, expected)


def test_nothing_to_do(gpu: Gpu) -> None:
    weight, virtual, none = torch.randn(20, 8), torch.randn(5, 8), torch.zeros(2, 0, dtype=torch.int64)
    assert gpu.soft_embedding(none, weight, virtual).shape == (2, 0, 8)
    assert gpu.soft_embedding(none, weight[:, :0], virtual[:, :0]).shape == (2, 0, 0)
    assert torch.equal(gpu.soft_embedding_backward(torch.zeros(2, 0, 8), none, 20, 5), torch.zeros(5, 8))
    ids = torch.tensor([1, 2])
    assert torch.equal(gpu.soft_embedding(ids, weight, virtual[:0]), weight[ids])
    assert gpu.soft_embedding_backward(torch.zeros(2, 8), ids, 20, 0).shape == (0, 8)


@pytest.mark.parametrize(
    ("count", "num_virtual", "hidden", "share"),
    [
        (1, 1, 1, 1.0),
        (700, 1, 3, 1.0),  # one row gathers everything
        (3000, 20, 40, 0.1),  # several tiles of ids, few of them virtual
        (2500, 300, 8, 0.9),
        (4000, 2500, 4, 1.0),  # more rows than the scan has threads
        (70_000, 3, 8, 0.5),  # tiles longer than the least
        (40, 2, 2100, 1.0),  # several blocks of columns
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_backward(gpu: Gpu, dtype: torch.dtype, count: int, num_virtual: int, hidden: int, share: float) -> None:
    ids = torch.where(torch.rand(count) < share, 50 + torch.randint(0, num_virtual, (count,)), torch.tensor(7))
    grad = torch.randn(count, hidden).to(dtype)
    got = gpu.twice(lambda: gpu.soft_embedding_backward(grad, ids, 50, num_virtual))
    # index_add_ on the CPU adds in the order of the ids, as the kernel does: the same bits.
    hits = ids >= 50
    expected = torch.zeros(num_virtual, hidden).index_add_(0, ids[hits] - 50, grad[hits].float())
    assert torch.equal(got, expected)


def test_backward_of_unaligned_gradients(gpu: Gpu) -> None:
    ids = torch.tensor([[50, 3], [51, 50]])
    grad = torch.randn(2 * 2 * 16 + 1)[1:].view(2, 2, 16)
    expected = torch.stack([grad[0, 0] + grad[1, 1], grad[1, 0]])
    assert torch.equal(gpu.twice(lambda: gpu.soft_embedding_backward(grad, ids, 50, 2)), expected)
    turned = grad.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(gpu.soft_embedding_backward(turned, ids, 50, 2), expected)


def test_tables_beyond_32_bits(gpu: Gpu, tmp_path: Path) -> None:
    """A sparse file of 2.2 billion numbers; only its last rows are ever touched."""
    rows, hidden = 2_200_000, 1024
    with open(tmp_path / "table", "wb") as file:
        file.truncate(rows * hidden * 2)
    path = str(tmp_path / "table")
    weight = torch.from_file(path, shared=True, size=rows * hidden, dtype=torch.bfloat16).view(rows, hidden)
    weight[-2:].normal_()
    virtual = torch.randn(2, hidden).bfloat16()
    out = gpu.soft_embedding(torch.tensor([rows - 2, rows + 1]), weight, virtual)
    assert torch.equal(out, torch.stack([weight[-2], virtual[1]]))
    out = gpu.soft_embedding(torch.tensor([0, rows - 1]), virtual, weight[2:])
    assert torch.equal(out, torch.stack([virtual[0], weight[-1]]))


def test_a_virtual_dtype_that_cannot_be_is_refused(gpu: Gpu) -> None:
    with pytest.raises((ValueError, RuntimeError), match="virtual: expected the dtype of weight, or float32"):
        gpu.soft_embedding(torch.tensor([1]), torch.randn(2, 4), torch.randn(2, 4).half())


def test_rows_of_another_length_are_refused(gpu: Gpu) -> None:
    ids = torch.tensor([1, 2])
    with pytest.raises((ValueError, RuntimeError), match="virtual: expected rows as long as those of weight"):
        gpu.soft_embedding(ids, torch.randn(2, 8), torch.randn(2, 4))
    with pytest.raises((ValueError, RuntimeError), match="grad: expected one row for each of input_ids"):
        gpu.soft_embedding_backward(torch.randn(1, 8), ids, 2, 2)
