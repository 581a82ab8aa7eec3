"""The folded path: a vendor's fused attention on the prefix, the batch in its rows, against the float64 reference.

Where there is no GPU, PyTorch's CPU flash attention stands in a vendor's place, called by the same code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import prefixcore
from prefixcore.backends.problem import attention_problem
from prefixcore.backends.triton import choose, folded, fused_attention, use_path, vendors
from prefixcore.backends.triton.fused_attention import FusedAttention
from prefixcore.backends.triton.kernels import merge
from tests.device import DEVICE, triton_backend
from tests.ops.problems import GRADIENTS, Problem, check, output_alone, relative_error, run

ON_A_GPU = DEVICE.type == "cuda"
DTYPES = (torch.bfloat16, torch.float16) if ON_A_GPU else (torch.float32,)


@pytest.fixture(autouse=True)
def folded_path(monkeypatch: pytest.MonkeyPatch, without_flash4: None) -> Iterator[None]:
    monkeypatch.setattr(choose, "MERGED_KEYS", 16)
    with triton_backend(), use_path("folded"):
        yield


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch, ordinary_way: None) -> list[tuple[str, bool]]:
    """The paths of the backwards that have run, and whether a vendor did the sequence, too."""
    seen: list[tuple[str, bool]] = []
    choice = choose.backward

    def watched(*arguments: Any, **options: Any) -> choose.Path:
        path = choice(*arguments, **options)
        seen.append((path.name, path.fused is not None))
        return path

    monkeypatch.setattr(choose, "backward", watched)
    return seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "Hkv", "heads_last"), [(4, 1, True), (6, 2, False), (3, 3, True)])
@pytest.mark.parametrize("P", [2, 33])
@pytest.mark.parametrize("T", [1, 19])
def test_shapes(taken: list[Any], T: int, P: int, H: int, Hkv: int, heads_last: bool, dtype: torch.dtype) -> None:
    check(Problem(T=T, P=P, H=H, Hkv=Hkv, dtype=dtype, heads_last=heads_last), attention=output_alone)
    assert taken == [("folded", T == 19)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [64, 80, 128, 256])
def test_head_dims(taken: list[Any], D: int, dtype: torch.dtype) -> None:
    check(Problem(B=2, T=17, P=5, H=2, Hkv=1, D=D, dtype=dtype, heads_last=True), attention=output_alone)
    assert taken == [("folded", True)]


VENDORS_DO_BOTH: dict[str, dict[str, Any]] = {
    "bidirectional, more keys": {"is_causal": False, "S": 50},
    "one row": {"B": 1},
    "scale": {"scale": 0.9},
    "large scores": {"gain": 4.0},
    "float32 prefix": {"prefix_dtype": torch.float32},
    "sinks": {"sinks": True},
    "a bank of one entry": {"N": 1},
}
OURS_DO_THE_SEQUENCE: dict[str, dict[str, Any]] = {
    "one query over a cache": {"T": 1, "S": 9},
    "a chunk after a cache": {"T": 9, "S": 30},
    "more queries than keys": {"T": 30, "S": 20},
    "padding, and a row of nothing but padding": {"mask": "padding", "B": 4},
    "bool mask": {"mask": "bool"},
    "additive mask": {"mask": "additive"},
    "window": {"sliding_window": 7},
    "window, sinks, padding": {"sliding_window": 7, "sinks": True, "mask": "padding", "B": 4},
    "packed": {"packed": (5, 1, 17)},
    "packed, window": {"packed": (9, 12), "sliding_window": 4},
    "no keys": {"T": 7, "S": 0, "is_causal": False},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", [*VENDORS_DO_BOTH, *OURS_DO_THE_SEQUENCE])
def test_options(taken: list[Any], option: str, dtype: torch.dtype) -> None:
    """What only our kernels can do to a sequence is no obstacle: the prefix is always seen whole."""
    options = VENDORS_DO_BOTH.get(option) or OURS_DO_THE_SEQUENCE[option]
    check(Problem(**{"T": 17, "P": 6, "dtype": dtype, **options}), attention=output_alone)
    assert taken == [("folded", option in VENDORS_DO_BOTH)]


@pytest.mark.parametrize("wanted", [("prefix_key", "prefix_value"), ("query",), ("key", "value"), ("query", "key"),
                                    ("query", "prefix_key"), ("value", "prefix_value")])  # fmt: skip
def test_only_what_is_wanted(wanted: tuple[str, ...]) -> None:
    problem = Problem(T=17, P=6, dtype=DTYPES[0])
    whole = run(problem, output_alone)
    tensors, _ = problem.tensors()
    leaves = {name: x.requires_grad_(name in wanted) for name, x in tensors.items()}
    out, _ = output_alone(**leaves, return_lse=True)
    g = torch.Generator().manual_seed(problem.seed + 1)
    out.backward(torch.randn(out.shape, generator=g).to(out))
    for name in GRADIENTS:
        if name in wanted:
            assert relative_error(leaves[name].grad, whole[f"grad_{name}"]) < (1e-2 if ON_A_GPU else 1e-5), name
        else:
            assert leaves[name].grad is None


@pytest.mark.parametrize("repeatable", [(), vendors.REPEATABLE], ids=["forward alone", "both ways"])
def test_unforced(monkeypatch: pytest.MonkeyPatch, taken: list[Any], repeatable: tuple[str, ...]) -> None:
    """Where a vendor's gradients may vary, what it has done forward is differentiated by the merged path."""
    monkeypatch.setattr(choose, "FOLDED_PREFIX", ((256, 3),))
    monkeypatch.setattr(vendors, "REPEATABLE", repeatable)
    monkeypatch.setattr(vendors, "FOLDED_VENDORS", (*vendors.FOLDED_VENDORS, "FlashAttention"))
    forwards: list[str] = []
    choice = choose.forward

    def watched(*arguments: Any) -> choose.Path:
        path = choice(*arguments)
        forwards.append(path.name)
        return path

    monkeypatch.setattr(choose, "forward", watched)
    with use_path(None):
        check(Problem(T=20, P=6, B=3, dtype=DTYPES[0]), attention=output_alone)
    assert "folded" in forwards
    if not ON_A_GPU:
        assert taken == [("folded" if repeatable else "merged", True)]


def test_a_gradient_of_the_log_sum_exp_takes_the_single_path(taken: list[Any]) -> None:
    check(Problem(T=17, P=6, dtype=DTYPES[0]))
    assert taken == [("single", False)]


def test_what_is_written_is_laid_out_as_promised() -> None:
    """Compiled code relies on the strides that the fake kernels gave."""
    for heads_last in (False, True):
        tensors, _ = Problem(T=17, P=6, dtype=DTYPES[0], heads_last=heads_last).tensors()
        p = attention_problem(**{name: x.requires_grad_() for name, x in tensors.items()})
        out, lse = torch.ops.prefixcore.prefix_attention(*p)
        grads = torch.ops.prefixcore.prefix_attention_backward(
            torch.randn_like(out), None, out, lse, *p, True, True, True
        )
        for x, grad in zip(p.differentiable, grads, strict=True):
            assert grad.stride() == x.stride()
        assert [grad.dtype for grad in grads[3:]] == [torch.float32] * 2
        assert out.transpose(1, 2).is_contiguous()
        assert lse.is_contiguous()


def test_folding_copies_nothing_where_the_heads_are_inside() -> None:
    slices = torch.randn(3, 5, 3, 4, 8)[:, :, 1].transpose(1, 2)  # of a fused projection [B, T, 3, H, D]
    for x in (torch.randn(3, 5, 4, 8).transpose(1, 2), slices):
        flat = folded.fold(x)
        assert flat.shape == (1, 4, 15, 8)
        assert flat.data_ptr() == x.data_ptr()
        assert torch.equal(folded.unfold(flat, 3), x)
    x = torch.randn(3, 4, 5, 8)
    assert torch.equal(folded.unfold(folded.fold(x), 3), x)


@pytest.mark.parametrize("infinity", [torch.inf, -torch.inf])
def test_merging_with_what_sees_nothing(infinity: float) -> None:
    """Its log-sum-exp is an infinity of either sign, its output may be anything."""
    g = torch.Generator().manual_seed(0)
    out, part = torch.randn(2, 2, 3, 5, 24, generator=g).to(DEVICE)
    lse, part_lse = torch.randn(2, 2, 3, 5, generator=g).to(DEVICE)
    want, want_lse = out.clone(), lse.clone()
    want[0, 1], want_lse[0, 1] = part[0, 1], part_lse[0, 1]
    want[1, 2], want_lse[1, 2] = 0, -torch.inf
    lse[0, 1] = lse[1, 2] = part_lse[1] = part_lse[0, 0] = part_lse[0, 2] = infinity
    out[0, 1], out[1, 2] = torch.nan, torch.inf
    part[1] = part[0, 0] = part[0, 2] = torch.nan
    merge.launch_merge(out, lse, part, part_lse)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("sinks", [True, False])
def test_merging(shift: float, sinks: bool) -> None:
    """Odd sizes and strides of all kinds, and log-sum-exps of any size."""
    g = torch.Generator().manual_seed(0)
    B, H, T, D = 3, 5, 7, 20
    out = torch.randn(B, T, H, D, generator=g).to(DEVICE).transpose(1, 2)
    part = torch.randn(H, B, T, 2 * D, generator=g).to(DEVICE)[..., :D].transpose(0, 1)
    lse, part_lse = torch.randn(B, H, T, generator=g), torch.randn(H, B, T, generator=g).transpose(0, 1)
    lse, part_lse = (lse + shift).to(DEVICE), (part_lse + shift).to(DEVICE)
    sink = torch.randn(H, generator=g).to(DEVICE) + shift if sinks else None
    logits = [lse.double(), part_lse.double(), *([sink.double()[None, :, None].expand(B, H, T)] if sinks else [])]
    want_lse = torch.logsumexp(torch.stack(logits), 0)
    want = sum((x.double() * (y - want_lse).exp()[..., None]) for x, y in zip((out, part), logits, strict=False))
    merge.launch_merge(out, lse, part, part_lse, sink)
    torch.testing.assert_close(out.double(), want, atol=2e-3 if shift else 1e-6, rtol=1e-6)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-3 if shift else 1e-6, rtol=1e-6)
    total = torch.randn(B, H, T, D, generator=g).to(DEVICE)
    want = total + part
    merge.launch_add(total, part)
    assert torch.equal(total, want)


@pytest.mark.parametrize("option", [{"softcap": 3.0}, {"Dv": 16}, {"D": 20}, {"index": True}, {"lengths": True},
                                    {"P": 0}])  # fmt: skip
def test_what_cannot_be_folded_is_refused_where_it_is_forced(option: dict[str, Any]) -> None:
    tensors, options = Problem(**{"T": 33, "dtype": DTYPES[0], **option}).tensors()
    with pytest.raises(ValueError, match="the folded path was forced, but .*; stop forcing it, or force 'single'"):
        prefixcore.prefix_attention(**tensors, **options)


@pytest.mark.skipif(ON_A_GPU, reason="on a GPU PyTorch's GPU kernels themselves run")
def test_one_call_does_the_prefix_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is expanded: the vendor gets the prefix as it is, and all rows as one."""
    calls: list[tuple[Any, ...]] = []
    real = fused_attention.STAND_IN

    def forward(p: Any) -> Any:
        calls.append((tuple(p.query.shape), tuple(p.key.shape), p.is_causal))
        return real.forward(p)

    def backward(p: Any, *arguments: Any) -> Any:
        calls.append((tuple(p.query.shape), tuple(p.key.shape), p.is_causal))
        return real.backward(p, *arguments)

    monkeypatch.setattr(fused_attention, "STAND_IN", FusedAttention(real.name, forward, backward))
    run(Problem(B=3, T=20, P=6), output_alone)
    sequence, prefix = ((3, 4, 20, 32), (3, 2, 20, 32), True), ((1, 4, 60, 32), (1, 2, 6, 32), False)
    assert calls == [sequence, prefix, sequence, prefix]
