"""soft_embedding against ``embedding(cat(weight, virtual))``."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prefixcore

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(
    shape: tuple[int, ...], V: int, N: int, E: int, dtype: torch.dtype, virtual_dtype: torch.dtype, seed: int = 0
):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V + N, shape, generator=g)
    weight = torch.randn(V, E, generator=g).to(dtype)
    virtual = torch.randn(N, E, generator=g).to(virtual_dtype)
    return ids, weight, virtual


def check(ids: torch.Tensor, weight: torch.Tensor, virtual: torch.Tensor) -> None:
    virtual = virtual.detach().requires_grad_()
    out = prefixcore.soft_embedding(ids, weight, virtual)
    table = torch.cat([weight, virtual.detach().to(weight.dtype)])
    assert torch.equal(out, torch.nn.functional.embedding(ids.long(), table))  # a copy: not one bit may differ
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    out.backward(grad)
    want = torch.zeros(virtual.shape, dtype=torch.float64)
    chosen = ids.flatten() >= weight.shape[0]
    want.index_add_(
        0, ids.flatten()[chosen].long() - weight.shape[0], grad.reshape(ids.numel(), virtual.shape[1])[chosen].double()
    )
    tolerance = 1e-6 if virtual.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(virtual.grad.double(), want, atol=tolerance * 10, rtol=tolerance)


@pytest.mark.parametrize("virtual_dtype", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 17), (1,), (), (0, 4), (2, 3, 4)])
def test_equals_the_concatenated_table(
    shape: tuple[int, ...], dtype: torch.dtype, virtual_dtype: torch.dtype | None
) -> None:
    check(*problem(shape, V=11, N=5, E=24, dtype=dtype, virtual_dtype=virtual_dtype or dtype))


@pytest.mark.parametrize("E", [1, 32, 70, 300])  # rows of whole cache lines and others
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype, E: int) -> None:
    for virtual_dtype in {dtype, torch.float32}:
        check(*problem((3, 40), V=90, N=4, E=E, dtype=dtype, virtual_dtype=virtual_dtype))


def test_an_output_lives_as_long_as_it_is_used() -> None:
    """No cycle keeps it until the garbage collector comes by: the next call would have to take fresh memory."""
    ids, weight, virtual = problem((2, 5), V=11, N=3, E=4, dtype=torch.float32, virtual_dtype=torch.float32)
    gc.collect()
    gc.disable()
    try:
        out = prefixcore.soft_embedding(ids, weight, virtual.requires_grad_())
        torch.autograd.grad(out.sum(), virtual)
        output = weakref.ref(out)
        del out
        assert output() is None
    finally:
        gc.enable()


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(0, 9), max_size=3).map(tuple), V=st.integers(1, 40), N=st.integers(1, 20),
    E=st.integers(0, 70), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_anything(shape: tuple[int, ...], V: int, N: int, E: int, dtype: torch.dtype, seed: int) -> None:
    check(*problem(shape, V, N, E, dtype, dtype, seed))


def test_strided_and_int32() -> None:
    ids, weight, virtual = problem((4, 6), 9, 3, 8, torch.float32, torch.float32)
    check(ids.t(), weight, virtual)
    check(ids.int(), weight, virtual)
    check(ids, torch.randn(9, 16)[:, ::2], virtual)
    check(ids, torch.randn(9, 16)[:, :8], torch.randn(8, 3).t())


def test_same_bits_for_any_number_of_threads() -> None:
    ids, weight, virtual = problem((64, 300), 10, 7, 96, torch.float32, torch.float32)
    before, grads = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaf = virtual.clone().requires_grad_()
            prefixcore.soft_embedding(ids, weight, leaf).sin().sum().backward()
            grads.append(leaf.grad)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [-1, 14, 2**40])
def test_an_id_out_of_range_names_its_place(bad: int, backend: str) -> None:
    ids, weight, virtual = problem((2, 5), V=11, N=3, E=4, dtype=torch.float32, virtual_dtype=torch.float32)
    ids[1, 3] = bad
    with (
        prefixcore.use_backend(backend),
        pytest.raises(IndexError, match=rf"input_ids\[1, 3\] is {bad}, expected 0 <= id < 14"),
    ):
        prefixcore.soft_embedding(ids, weight, virtual)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"input_ids": [1, 2]}, TypeError, "input_ids: expected a tensor, got list"),
        ({"weight": None}, TypeError, "weight: expected a tensor, got NoneType"),
        ({"virtual": None}, TypeError, "virtual: expected a tensor, got NoneType"),
        ({"input_ids": torch.zeros(3)}, TypeError, r"\.long\(\)"),
        ({"weight": torch.randn(4)}, ValueError, "weight"),
        ({"virtual": torch.randn(2, 5)}, ValueError, "E = 4"),
        ({"virtual": torch.randn(2, 4).half()}, TypeError, "virtual"),
        ({"weight": torch.randn(6, 4).requires_grad_()}, ValueError, "freeze"),
    ],
)
def test_bad_arguments(changes: dict, kind: type[Exception], message: str) -> None:
    good = {"input_ids": torch.zeros(3, dtype=torch.long), "weight": torch.randn(6, 4), "virtual": torch.randn(2, 4)}
    with pytest.raises(kind, match=message):
        prefixcore.soft_embedding(**{**good, **changes})


def test_the_registered_ops_refuse_rows_of_another_length() -> None:
    """Whoever calls them without the checks of the public function must not read beyond a tensor."""
    ids = torch.tensor([1, 2])
    with pytest.raises((ValueError, RuntimeError), match="virtual: expected rows as long as those of weight"):
        torch.ops.prefixcore.soft_embedding(ids, torch.randn(2, 8), torch.randn(2, 4))
    with pytest.raises((ValueError, RuntimeError), match="grad: expected one row for each of input_ids"):
        torch.ops.prefixcore.soft_embedding_backward(torch.randn(1, 8), ids, 2, 2)


def test_opcheck_and_compile() -> None:
    ids, weight, virtual = problem((2, 5), V=11, N=3, E=4, dtype=torch.float32, virtual_dtype=torch.float32)
    virtual.requires_grad_()
    torch.library.opcheck(torch.ops.prefixcore.soft_embedding.default, (ids, weight, virtual))
    torch.library.opcheck(torch.ops.prefixcore.soft_embedding_backward.default, (torch.randn(2, 5, 4), ids, 11, 3))
    compiled = torch.compile(prefixcore.soft_embedding, fullgraph=True)
    assert torch.equal(compiled(ids, weight, virtual), prefixcore.soft_embedding(ids, weight, virtual))
    with pytest.raises(IndexError):
        compiled(ids + 14, weight, virtual)


def test_gradcheck_of_the_reference() -> None:
    ids, weight, virtual = problem((2, 5), V=4, N=3, E=2, dtype=torch.float64, virtual_dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: prefixcore.soft_embedding(ids, weight, v), [virtual.requires_grad_()])
