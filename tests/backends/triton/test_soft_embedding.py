"""The soft embedding's Triton kernels against the float64 reference: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import prefixcore
from prefixcore.backends import triton
from prefixcore.ops.reference import soft_embedding_reference
from tests.device import DEVICE, NAME, triton_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every ``torch.empty`` is full of NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(
    count: int, V: int, N: int, E: int, dtype: torch.dtype = torch.float32, virtual_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, of which half are virtual, the tables, and a gradient of the output."""
    g = torch.Generator().manual_seed(0)
    low, high = torch.randint(0, V, (count,), generator=g), torch.randint(V, V + max(N, 1), (count,), generator=g)
    ids = torch.where(torch.rand(count, generator=g) < (0.5 if N else 0), high, low)
    weight = torch.randn(V, E, generator=g).to(dtype)
    virtual = torch.randn(N, E, generator=g).to(virtual_dtype or dtype)
    grad = torch.randn(count, E, generator=g).to(dtype)
    ids, weight, virtual, grad = (x.to(DEVICE) for x in (ids, weight, virtual, grad))
    return ids, weight, virtual, grad


def check(ids: Tensor, weight: Tensor, virtual: Tensor, grad: Tensor) -> None:
    """Both directions, and the same bits twice."""
    out = triton.soft_embedding(ids, weight, virtual)
    assert (out.dtype, out.shape) == (weight.dtype, (*ids.shape, weight.shape[1]))
    assert out.is_contiguous()
    rounds_in_the_interpreter = NAME != "cuda" and virtual.dtype != weight.dtype == torch.bfloat16
    exact = 0 if not rounds_in_the_interpreter else 8e-3  # which cuts off instead
    leaf = virtual.double().requires_grad_()
    want = soft_embedding_reference(ids, weight.double(), leaf)
    torch.testing.assert_close(out, want.to(weight.dtype), rtol=exact, atol=0)

    got = triton.soft_embedding_backward(grad, ids, weight.shape[0], virtual.shape[0])
    assert got.dtype == torch.float32
    want.backward(grad.double())
    assert leaf.grad is not None
    torch.testing.assert_close(got.double(), leaf.grad, rtol=1e-5, atol=1e-5)
    assert torch.equal(got, triton.soft_embedding_backward(grad, ids, weight.shape[0], virtual.shape[0]))


@pytest.mark.parametrize("E", [1, 20, 63, 576])
@pytest.mark.parametrize("N", [1, 20])
@pytest.mark.parametrize("count", [1, 111, 1000])
def test_shapes(count: int, N: int, E: int) -> None:
    check(*problem(count, V=37, N=N, E=E))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("E", [1, 63, 576])
def test_streamed(dtype: torch.dtype, E: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that are off until a GPU has run them."""
    from prefixcore.backends.triton.kernels import soft_embedding

    monkeypatch.setattr(soft_embedding, "STREAMED", True)
    check(*problem(1000, V=37, N=20, E=E, dtype=dtype, virtual_dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("virtual_dtype", [None, torch.float32], ids=["", "float32 virtual"])
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
def test_dtypes(dtype: torch.dtype, virtual_dtype: torch.dtype | None, ids_dtype: torch.dtype) -> None:
    ids, *rest = problem(111, V=37, N=20, E=63, dtype=dtype, virtual_dtype=virtual_dtype)
    check(ids.to(ids_dtype), *rest)


def test_views() -> None:
    """Rows of any distance, columns of any distance, ids and gradients of any order."""
    ids, weight, virtual, grad = problem(111, V=37, N=20, E=64)
    check(ids.view(3, 37).t(), weight, virtual, grad.view(37, 3, 64))
    check(ids.view(3, 37), weight[:, 3:23], virtual[:, 8:28], grad[:, :20].reshape(3, 37, 20))
    check(ids, weight[:, ::2], virtual[:, ::2], grad[:, 1::2])
    check(ids, weight.repeat(2, 1)[::2], virtual.t().contiguous().t(), grad[:1].expand(111, 64))
    check(ids[1:], weight[:, 1:], virtual[:, 1:], grad[1:, 1:])


@pytest.mark.parametrize(
    ("count", "V", "N", "E"), [(0, 5, 3, 8), (7, 5, 0, 8), (7, 5, 3, 0), (0, 5, 0, 0), (7, 0, 3, 8)]
)
def test_nothing(count: int, V: int, N: int, E: int) -> None:
    ids, weight, virtual, grad = problem(count, max(V, 1), N, E)
    if V == 0:
        ids = ids % N
    check(ids, weight[:V], virtual, grad)


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_id_out_of_range_makes_its_row_nan_and_no_other(dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    """As in CUDA: nobody can look at the ids without waiting for the GPU, and nothing may be read outside a table."""
    _, weight, virtual, grad = problem(8, V=20, N=5, E=40, dtype=dtype)
    far = 2**62 if ids_dtype == torch.int64 else 2**31 - 1
    ids = torch.tensor([3, -1, 24, 25, far, 19, -far, 20], dtype=ids_dtype, device=DEVICE)
    bad = (ids < 0) | (ids >= 25)
    out = triton.soft_embedding(ids, weight, virtual)
    assert out[bad].isnan().all()
    assert torch.equal(out[~bad], torch.cat([weight, virtual])[ids[~bad].long()])
    expected = torch.zeros(5, 40, device=DEVICE)
    expected[4], expected[0] = grad[2], grad[7]
    assert torch.equal(triton.soft_embedding_backward(grad, ids, 20, 5), expected)


def test_one_virtual_token_at_every_place() -> None:
    """All rows in one sum, which takes many steps: close to float64's, and the rows of others are zero."""
    grad = torch.randn(5000, 3, device=DEVICE)
    ids = torch.full((5000,), 8, device=DEVICE)
    got = triton.soft_embedding_backward(grad, ids, 7, 3)
    torch.testing.assert_close(got[1].double(), grad.double().sum(0), rtol=1e-5, atol=1e-4)
    assert not got[0].any()
    assert not got[2].any()


def test_offsets_beyond_32_bits() -> None:
    """A row more than 2^31 elements from the table's start; the room between is never touched, so it costs nothing."""
    if NAME == "cuda" and torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    torch.use_deterministic_algorithms(False)  # which would fill the room
    stride = 2**31 + 2**20
    weight = torch.empty_strided((2, 8), (stride, 1), device=DEVICE).copy_(torch.randn(2, 8))
    virtual = torch.randn(1, 8, device=DEVICE)
    out = triton.soft_embedding(torch.tensor([1, 2, 0], device=DEVICE), weight, virtual)
    assert torch.equal(out, torch.cat([weight, virtual])[[1, 2, 0]])


def test_rows_of_another_length_are_refused() -> None:
    ids = torch.tensor([1, 2], device=DEVICE)
    with pytest.raises(ValueError, match=r"virtual: expected the shape \[any, 8\], got \[2, 4\]"):
        triton.soft_embedding(ids, torch.randn(2, 8, device=DEVICE), torch.randn(2, 4, device=DEVICE))
    with pytest.raises(ValueError, match=r"grad: expected the shape \[2, any\], got \[1, 8\]"):
        triton.soft_embedding_backward(torch.randn(1, 8, device=DEVICE), ids, 2, 2)


@pytest.mark.skipif(NAME == "cuda", reason="where CUDA was compiled in, its kernels stand in the dispatcher")
def test_in_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public op and its gradient, as a training step calls them."""
    ran: list[str] = []
    for name in ("soft_embedding", "soft_embedding_backward"):
        real = getattr(triton, name)
        monkeypatch.setattr(triton, name, lambda *a, real=real, name=name: (ran.append(name), real(*a))[1])
    ids, weight, virtual, grad = problem(111, V=37, N=20, E=63, dtype=torch.float16, virtual_dtype=torch.float32)
    leaf = virtual.clone().requires_grad_()
    with triton_backend():
        out = prefixcore.soft_embedding(ids, weight, leaf)
        out.backward(grad)
    assert ran == ["soft_embedding", "soft_embedding_backward"]
    assert torch.equal(out, triton.soft_embedding(ids, weight, virtual))
    assert torch.equal(leaf.grad, triton.soft_embedding_backward(grad, ids, 37, 20))
