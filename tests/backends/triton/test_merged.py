"""The merged path: PyTorch's fused attention for the sequence, ours for the prefix, against the float64 reference.

Where there is no GPU, PyTorch's CPU flash attention stands in its place and Triton's interpreter runs ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import prefixcore
from prefixcore.backends.problem import attention_problem
from prefixcore.backends.triton import choose, fused_attention, merged, single, use_path
from prefixcore.backends.triton.kernels import grad_short_prefix
from tests.device import DEVICE, triton_backend
from tests.ops.problems import GRADIENTS, Problem, check, output_alone, relative_error, run

DTYPES = (torch.bfloat16, torch.float16) if DEVICE.type == "cuda" else (torch.float32,)


@pytest.fixture(autouse=True)
def merged_path(without_flash4: None) -> Iterator[None]:
    with triton_backend(), use_path("merged"):
        yield


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch, ordinary_way: None) -> list[str]:
    """The paths of the backwards that have run."""
    seen: list[str] = []
    choice = choose.backward

    def watched(*arguments: Any, **options: Any) -> choose.Path:
        path = choice(*arguments, **options)
        seen.append(path.name)
        return path

    monkeypatch.setattr(choose, "backward", watched)
    return seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "Hkv"), [(4, 1), (6, 2), (3, 3)])
@pytest.mark.parametrize("P", [1, 20, 63])
@pytest.mark.parametrize("T", [1, 3, 70])
def test_shapes(backwards: list[str], T: int, P: int, H: int, Hkv: int, dtype: torch.dtype) -> None:
    check(Problem(T=T, P=P, H=H, Hkv=Hkv, dtype=dtype), attention=output_alone)
    assert backwards == ["merged"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [32, 64, 80, 128, 256])
def test_head_dims(backwards: list[str], D: int, dtype: torch.dtype) -> None:
    check(Problem(B=1, T=40, P=20, H=2, Hkv=1, D=D, dtype=dtype, heads_last=True), attention=output_alone)
    assert backwards == ["merged"]


OPTIONS: dict[str, dict[str, Any]] = {
    "bidirectional": {"is_causal": False},
    "bidirectional, more keys": {"is_causal": False, "S": 70},
    "one query over a cache": {"T": 1, "S": 70},
    "scale": {"scale": 0.9},
    "large scores": {"gain": 4.0},
    "window that hides nothing": {"sliding_window": 33},
    "bank": {"N": 3, "index": True, "lengths": True, "B": 4},
    "some rows without a prefix": {"index": True, "B": 5},
    "shorter prefix": {"lengths": True},
    "float32 prefix": {"prefix_dtype": torch.float32},
    "no prefix": {"P": 0},
    "sinks": {"sinks": True},
    "sinks, no prefix": {"sinks": True, "P": 0},
    "heads last": {"heads_last": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(backwards: list[str], option: str, dtype: torch.dtype) -> None:
    check(Problem(**{"T": 33, "P": 20, "dtype": dtype, **OPTIONS[option]}), attention=output_alone)
    assert backwards == ["merged"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("P", [1, 20, 64])
def test_a_short_prefix_in_many_partial_sums(monkeypatch: pytest.MonkeyPatch, P: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(grad_short_prefix, "TILES_PER_SPLIT", 1)
    check(Problem(B=3, T=70, P=P, H=6, Hkv=2, dtype=dtype), attention=output_alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_of_the_log_sum_exp_takes_the_single_path(backwards: list[str], dtype: torch.dtype) -> None:
    check(Problem(T=33, P=20, dtype=dtype))
    assert backwards == ["single"]


def test_what_is_written_is_laid_out_as_promised() -> None:
    """Compiled code relies on the strides that the fake kernels gave."""
    for heads_last in (False, True):
        tensors, _ = Problem(T=33, P=20, dtype=DTYPES[0], heads_last=heads_last).tensors()
        leaves = {name: x.requires_grad_() for name, x in tensors.items()}
        p = attention_problem(**leaves)
        out, lse = torch.ops.prefixcore.prefix_attention(*p)
        grads = torch.ops.prefixcore.prefix_attention_backward(
            torch.randn_like(out), None, out, lse, *p, True, True, True
        )
        for x, grad in zip(leaves.values(), grads[:3], strict=False):
            assert grad.stride() == x.stride()
        assert out.transpose(1, 2).is_contiguous()
        assert lse.is_contiguous()


@pytest.mark.parametrize("P", [20, 70])
def test_of_what_nobody_wants_nothing_is_computed(monkeypatch: pytest.MonkeyPatch, ordinary_way: None, P: int) -> None:
    """The first layer of a frozen model wants the prefix's gradient alone."""
    problem = Problem(T=33, P=P, dtype=DTYPES[0])
    whole = run(problem, output_alone)
    for module, name in ((merged, "backward"), (single, "grad_query"), (single, "grad_sequence")):
        monkeypatch.setattr(module, name, None)
    tensors, _ = problem.tensors()
    leaves = {name: x.requires_grad_(name.startswith("prefix")) for name, x in tensors.items()}
    out, _ = output_alone(**leaves, return_lse=True)
    g = torch.Generator().manual_seed(problem.seed + 1)
    out.backward(torch.randn(out.shape, generator=g).to(out))
    for name in GRADIENTS:
        if name.startswith("prefix"):
            found, want = leaves[name].grad, whole[f"grad_{name}"]
            if P > grad_short_prefix.LONGEST:  # of fewer another kernel computes it where all gradients are wanted
                assert torch.equal(found, want), name
            assert relative_error(found, want) < (1e-5 if problem.dtype == torch.float32 else 1e-3), name
        else:
            assert leaves[name].grad is None


def test_a_gradient_of_any_strides_may_come_in() -> None:
    """That of a sum is one number, expanded."""
    tensors, _ = Problem(T=33, P=20, dtype=DTYPES[0]).tensors()
    grads = []
    for materialize in (False, True):
        leaves = [x.detach().requires_grad_() for x in tensors.values()]
        out = prefixcore.prefix_attention(*leaves)
        grad = torch.ones((), dtype=out.dtype, device=out.device).expand(out.shape)
        grads.append(torch.autograd.grad(out, leaves, grad.contiguous() if materialize else grad))
    for a, b in zip(*grads, strict=True):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("option", [{"sliding_window": 7}, {"softcap": 3.0}, {"mask": "padding"}, {"S": 50},
                                    {"packed": (5, 28)}, {"Dv": 16}, {"D": 20}])  # fmt: skip
def test_what_fused_attention_cannot_do_is_refused_where_it_is_forced(option: dict[str, Any]) -> None:
    tensors, options = Problem(**{"T": 33, "dtype": DTYPES[0], **option}).tensors()
    with pytest.raises(ValueError, match="the merged path was forced, but .*; stop forcing it, or force 'single'"):
        prefixcore.prefix_attention(**tensors, **options)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU PyTorch's GPU kernels themselves run")
def test_the_stand_in_is_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = fused_attention.STAND_IN

    def forward(*arguments: Any) -> Any:
        calls.append("forward")
        return real.forward(*arguments)

    def backward(*arguments: Any) -> Any:
        calls.append("backward")
        return real.backward(*arguments)

    spy = fused_attention.FusedAttention("spy", forward, backward)
    monkeypatch.setattr(fused_attention, "STAND_IN", spy)
    run(Problem(T=33, P=20), output_alone)
    assert calls == ["forward", "backward"]
