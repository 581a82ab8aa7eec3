"""What holds beyond the plain comparison: the same bits, large scores, what must not leak."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import prefixcore
from tests.device import NAME, cpu_backend

from .problems import Problem, check, run

KERNELS = "triton" if NAME == "cuda" else "cpu"  # interpreted kernels stand in the CPU backend's place

WORK = {
    "many rows": Problem(B=5, H=6, Hkv=2, T=130, P=20),
    "one long row": Problem(B=1, H=2, Hkv=1, T=1500, P=63, heads_last=True),
    "bank": Problem(B=6, N=3, index=True, lengths=True, T=70),
    "packed": Problem(packed=(5, 300, 1, 77), P=9),
    "decode": Problem(B=8, H=8, Hkv=2, T=1, S=300, P=200),
    "bfloat16": Problem(B=5, H=6, Hkv=2, T=131, P=21, D=40, dtype=torch.bfloat16, prefix_dtype=torch.float32),
}


@pytest.mark.parametrize("work", WORK)
def test_same_bits_for_any_number_of_threads_and_on_every_run(isa: str, work: str) -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(WORK[work]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, expected in results[0].items():
            assert torch.equal(other[name], expected), name


@pytest.mark.parametrize("gain", [100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores_are_right(isa: str, gain: float, dtype: torch.dtype) -> None:
    """At a gain of 10^4 rounding of the scores themselves decides, so only finiteness is asked there."""
    problem = Problem(T=130, P=20, gain=gain, dtype=dtype)
    if gain == 100.0 and dtype == torch.float32:
        check(Problem(T=130, P=20, gain=gain, dtype=dtype, scale=0.02))  # scores around 10
    for name, x in run(problem).items():
        assert x.isfinite().all(), name


@cpu_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_scores_are_not_slow(isa: str, dtype: torch.dtype) -> None:
    """Denormals in the exponential once cost a factor of twenty. Processor time: others do not lengthen it, except by
    what the two share of a core, so they take turns."""
    threads = torch.get_num_threads()
    problems = [Problem(B=2, H=4, Hkv=4, T=256, D=64, P=20, gain=gain, dtype=dtype) for gain in (1.0, 32.0)]

    def seconds(problem: Problem) -> float:
        start = time.process_time()
        run(problem)
        return time.process_time() - start

    torch.set_num_threads(1)
    try:
        plain, large = (min(times) for times in zip(*([seconds(p) for p in problems] for _ in range(7)), strict=True))
        assert large < 1.5 * plain
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [32, 33])
def test_hidden_garbage_does_not_leak(isa: str, D: int, dtype: torch.dtype) -> None:
    """Keys and values that no query sees may hold anything, NaN and infinities included."""
    tensors, _ = Problem(B=2, T=71, P=5, D=D, dtype=dtype).tensors()
    padding = torch.arange(71) < torch.tensor([[51], [71]])
    clean = prefixcore.prefix_attention(**tensors, attn_mask=padding)
    dirty = {n: x.clone() for n, x in tensors.items()}
    dirty["key"][0, :, 51:], dirty["value"][0, :, 51:] = torch.nan, torch.inf
    leaves = {n: x.requires_grad_() for n, x in dirty.items()}
    out = prefixcore.prefix_attention(**leaves, attn_mask=padding)
    assert torch.equal(out, clean)
    out.sum().backward()
    for name, x in leaves.items():
        assert x.grad is not None
        assert x.grad.isfinite().all(), name
    assert (leaves["key"].grad[0, :, 51:] == 0).all()


@pytest.mark.parametrize("gap", [0, 1, 2])
@pytest.mark.parametrize(("T", "D"), [(35, 32), (64, 33), (33, 40)])
def test_what_lies_beside_a_view_does_not_leak(isa: str, T: int, D: int, gap: int) -> None:
    """Rows are read in whole vectors and bfloat16 in pairs: NaN stands wherever one could reach too far.

    Rows lie `gap` numbers apart, heads one more, so that heads begin at odd places.
    """
    tensors, _ = Problem(B=2, H=3, Hkv=3, T=T, D=D, P=3, dtype=torch.bfloat16).tensors()
    views = {}
    for name, x in tensors.items():
        length = x.shape[-2]
        strides = (3 * (length * (D + gap) + 1), length * (D + gap) + 1, D + gap, 1)[-x.dim() :]
        room = torch.full((x.shape[0] * strides[0] + 1,), torch.nan, dtype=x.dtype)
        views[name] = room.as_strided(x.shape, strides, 1).copy_(x).requires_grad_()
        x.requires_grad_()
    for arguments in (tensors, views):
        prefixcore.prefix_attention(**arguments).float().square().sum().backward()
    for name, x in tensors.items():
        assert torch.equal(views[name].grad, x.grad), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"mask": "padding"}, {"sliding_window": 70}], ids=str)
@pytest.mark.parametrize(("T", "H", "Hkv", "D"), [(300, 2, 2, 64), (300, 4, 2, 48), (130, 3, 3, 32)])
def test_where_rows_lie_changes_no_bit(
    isa: str, T: int, H: int, Hkv: int, D: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Rows far apart are put together if there are many; sums of gradients collect in place or in scratch."""
    tensors, arguments = Problem(B=2, T=T, H=H, Hkv=Hkv, D=D, P=20, dtype=dtype, **options).tensors()
    apart = {}
    for name, x in tensors.items():
        room = torch.full((*x.transpose(-3, -2).shape[:-1], 2 * D), torch.nan, dtype=dtype)
        apart[name] = room[..., :D].transpose(-3, -2).copy_(x).requires_grad_()
        x.requires_grad_()
    outs = [prefixcore.prefix_attention(**x, **arguments) for x in (tensors, apart)]
    assert torch.equal(*outs)
    grad_out = torch.randn(2, T, H, D).to(dtype).transpose(1, 2)
    for out in outs:
        out.backward(grad_out)
    for name, x in tensors.items():
        assert torch.equal(apart[name].grad, x.grad), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_lie_as_their_tensors_do(dtype: torch.dtype) -> None:
    """Heads outside tokens or inside: otherwise autograd would copy them."""
    tensors, _ = Problem(B=2, T=33, H=4, Hkv=2, D=16, P=3, dtype=dtype).tensors()
    inside = {n: x.transpose(-3, -2).contiguous().transpose(-3, -2) for n, x in tensors.items()}
    for kind in (tensors, inside):
        leaves = [x.requires_grad_() for x in kind.values()]
        out = prefixcore.prefix_attention(*leaves)
        for name, x, grad in zip(kind, leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
            assert name.startswith("prefix") or grad.stride() == x.stride(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_virtual_tokens_beyond_an_entrys_length_do_not_leak(isa: str, dtype: torch.dtype) -> None:
    tensors, _ = Problem(B=2, T=40, P=8, N=2, dtype=dtype, prefix_dtype=torch.float32).tensors()
    tensors["prefix_key"][1, :, 3:], tensors["prefix_value"][1, :, 3:] = torch.nan, torch.inf
    leaves = {n: x.requires_grad_() for n, x in tensors.items()}
    out = prefixcore.prefix_attention(**leaves, prefix_index=torch.tensor([0, 1]), prefix_lengths=torch.tensor([8, 3]))
    out.sum().backward()
    assert out.isfinite().all()
    for name, x in leaves.items():
        assert x.grad is not None
        assert x.grad.isfinite().all(), name


def test_a_query_that_sees_nothing_yields_zeros(isa: str) -> None:
    tensors, _ = Problem(B=1, T=5, P=0).tensors()
    mask = torch.ones(1, 5, dtype=torch.bool)
    mask[0, :2] = False
    out, lse = prefixcore.prefix_attention(**tensors, attn_mask=mask, return_lse=True)
    assert (out[:, :, :2] == 0).all()
    assert (lse[:, :, :2] == -torch.inf).all()
    assert (out[:, :, 2:] != 0).any()


@pytest.mark.parametrize("prefix_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("D", "Dv"), [(256, 128), (192, 64), (64, 256)])
def test_decode_with_keys_and_values_of_different_sizes(isa: str, D: int, Dv: int, prefix_dtype: torch.dtype) -> None:
    """Units in float32 and units in bfloat16 share one scratch."""
    check(Problem(B=16, H=2, Hkv=2, T=1, S=40, D=D, Dv=Dv, P=100, dtype=torch.bfloat16, prefix_dtype=prefix_dtype))


@pytest.mark.parametrize("T", [5, 260, 2100])
def test_keys_that_nobody_sees_get_zeros(isa: str, T: int) -> None:
    """The window of every query lies in the padding, in sequences that workers share out among them, too."""
    tensors, _ = Problem(B=1, H=8, Hkv=1, T=T, S=T + 200, P=3).tensors()
    mask = (torch.arange(T + 200) < 100)[None]
    leaves = {n: x.requires_grad_() for n, x in tensors.items()}
    prefixcore.prefix_attention(**leaves, attn_mask=mask, sliding_window=7).square().sum().backward()
    assert (leaves["key"].grad == 0).all()
    assert (leaves["value"].grad == 0).all()
    assert (leaves["prefix_value"].grad != 0).any()


@pytest.mark.parametrize("backend", [KERNELS, "reference"])
def test_the_lowest_finite_number_hides_as_minus_infinity_does(isa: str, backend: str) -> None:
    tensors, _ = Problem(B=1, T=5, P=0).tensors()
    hide = torch.ones(1, 1, 5, 5).tril(-1) == 0  # the first query sees nothing at all
    with prefixcore.use_backend(backend):
        low, infinite = (
            prefixcore.prefix_attention(**tensors, attn_mask=torch.zeros(1, 1, 5, 5).masked_fill(hide, value))
            for value in (torch.finfo(torch.float32).min, -torch.inf)
        )
    assert torch.equal(low, infinite)
    assert (low[:, :, 0] == 0).all()


def test_memory_of_the_output_is_heads_last(isa: str) -> None:
    tensors, _ = Problem(T=9).tensors()
    assert prefixcore.prefix_attention(**tensors).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("wanted", [("prefix_key", "prefix_value"), ("query",), ("key", "value"), ("prefix_value",)])
def test_only_wanted_gradients(isa: str, wanted: tuple[str, ...]) -> None:
    """Layer 0 of a frozen model wants the prefix's gradient alone; each subset equals the whole."""
    problem = Problem(B=3, T=90, P=20)
    whole = run(problem)
    tensors, options = problem.tensors()
    leaves = {n: x.requires_grad_(n in wanted) for n, x in tensors.items()}
    out, lse = prefixcore.prefix_attention(**leaves, **options, return_lse=True)
    g = torch.Generator().manual_seed(problem.seed + 1)
    grad_out, grad_lse = (torch.randn(x.shape, generator=g, device="cpu").to(x) for x in (out, lse))
    torch.autograd.backward([out, lse], [grad_out, grad_lse])
    for name, x in leaves.items():
        if name in wanted:
            assert torch.equal(x.grad, whole[f"grad_{name}"]), name
        else:
            assert x.grad is None
