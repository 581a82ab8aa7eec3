"""The Triton kernels against the float64 reference, in Triton's interpreter: no GPU is needed.

``tests/conftest.py`` chooses the interpreter, before anything imports Triton. On a device, ``test_on_device.py`` has
the cases. The tiles are small, so that small problems have several, with edges.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixcore.backends.problem import AttentionProblem
from prefixcore.ops.reference import prefix_attention_reference

from ...ops.problems import TOLERANCE, Problem, relative_error

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="its tensors are on the CPU, and a GPU is under test")

if INTERPRETED:
    from prefixcore.backends.triton.kernels import (
        decode,
        decode_once,
        decode_schedule,
        forward,
        grad_keys,
        grad_once,
        grad_prefix,
        grad_query,
        launch,
    )
    from prefixcore.backends.triton.kernels.delta import compute_delta


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(launch, "blocks_for", lambda kernel, p: launch.Blocks(16, 16, 4, 1))
        monkeypatch.setattr(launch, "PROGRAMS", 8)
        monkeypatch.setattr(decode, "KEYS_PER_SPLIT", 16)
        monkeypatch.setattr(decode_schedule, "KEYS_PER_SPLIT", 32)
        monkeypatch.setattr(decode_schedule, "SHARED_KEYS", 8)
        monkeypatch.setattr(grad_prefix, "TILES_PER_SPLIT", 1)


def reference(p: AttentionProblem, **changes: Any) -> tuple[Tensor, Tensor]:
    wide = (x.double() if _floating(x) else x for x in p._replace(**changes))
    return prefix_attention_reference(AttentionProblem(*wide))


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def without_prefix(p: AttentionProblem) -> AttentionProblem:
    return p._replace(prefix_key=p.prefix_key[..., :0, :], prefix_value=p.prefix_value[..., :0, :], prefix_lengths=None)


def poisoned(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.full_like(like, torch.nan, dtype=dtype)


class Expected:
    """The reference's output, lse and gradients, and the gradients that lead to them."""

    def __init__(self, p: AttentionProblem) -> None:
        names = ("query", "key", "value", "prefix_key", "prefix_value")
        leaves = {name: getattr(p, name).double().requires_grad_() for name in names}
        out, lse = reference(p, **leaves)
        g = torch.Generator().manual_seed(1)
        self.grad_out = torch.randn(out.shape, generator=g).to(p.query.dtype)
        self.grad_lse = torch.randn(lse.shape, generator=g)
        loss = (out * self.grad_out).sum() + torch.where(lse.isfinite(), lse * self.grad_lse, 0).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        self.out, self.lse, self.grads = out.detach(), lse.detach(), dict(zip(names, grads, strict=True))


def close(name: str, got: Tensor, want: Tensor, dtype: torch.dtype, slack: float = 2.0) -> None:
    """``slack``: here the half precisions' probabilities are rounded before they meet the values, too."""
    if want.numel() == 0 or want.nan_to_num(neginf=0).norm() < 1e-6:
        assert got.isfinite().logical_or(got.isinf() & want.isinf()).all(), name
        assert got.nan_to_num(neginf=0).double().norm() < 1e-5, name
        return
    tolerance = TOLERANCE[dtype] * (1.0 if dtype == torch.float32 else slack)
    error = relative_error(got.reshape(want.shape), want)
    assert error < tolerance, f"{name}: relative error {error:.2e} exceeds {tolerance}"


def check_forward(p: AttentionProblem, expected: Expected) -> tuple[Tensor, Tensor]:
    out, lse = poisoned(expected.out, p.query.dtype), poisoned(expected.lse, torch.float32)
    forward.launch_forward(p, out, lse)
    close("out", out, expected.out, p.query.dtype)
    close("lse", lse, expected.lse, p.query.dtype)
    return out, lse


def check_decode(p: AttentionProblem, expected: Expected) -> None:
    for launcher in (decode.launch_decode, decode_once.launch_decode_once):
        out, lse = poisoned(expected.out, p.query.dtype), poisoned(expected.lse, torch.float32)
        launcher(p, out, lse)
        close(f"{launcher.__name__}'s out", out, expected.out, p.query.dtype)
        close(f"{launcher.__name__}'s lse", lse, expected.lse, p.query.dtype)


def check_backward(p: AttentionProblem, expected: Expected, out: Tensor, lse: Tensor) -> None:
    dtype, grad_out = p.query.dtype, expected.grad_out
    d = compute_delta(grad_out, out, expected.grad_lse)
    dq, dk, dv = (poisoned(x, dtype) for x in (p.query, p.key, p.value))
    grad_query.launch_grad_query(p, grad_out, lse, d, dq)
    grad_keys.launch_grad_keys(p, grad_out, lse, d, dk, dv)
    prefix_grads = grad_prefix.launch_grad_prefix(p, grad_out, lse, d)
    for name, got in zip(expected.grads, (dq, dk, dv, *prefix_grads), strict=True):
        close(f"gradient of {name}", got, expected.grads[name], dtype)
    check_grad_once(p, expected, out, lse)


def check_grad_once(p: AttentionProblem, expected: Expected, out: Tensor, lse: Tensor) -> None:
    grads = [poisoned(x, p.query.dtype) for x in (p.query, p.key, p.value)]
    arguments = p, expected.grad_out, out, lse, expected.grad_lse
    of_bank = grad_once.launch_grad_once(*arguments, *grads, needs_prefix=True)
    assert of_bank is not None
    for name, got in zip(expected.grads, (*grads, *of_bank), strict=True):
        close(f"gradient of {name}, in one launch", got, expected.grads[name], p.query.dtype)


def check_from_state(p: AttentionProblem, expected: Expected) -> None:
    """The sequence by the reference, the prefix by us; then the queries' gradient in the same two parts."""
    dtype, sequence = p.query.dtype, without_prefix(p)
    out, lse = reference(sequence, sinks=None)
    out, lse = out.to(dtype), lse.float()
    forward.launch_forward(p, out, lse, from_state=True)
    close("merged out", out, expected.out, dtype)
    close("merged lse", lse, expected.lse, dtype)
    d = compute_delta(expected.grad_out, out, expected.grad_lse)
    dq = poisoned(p.query, dtype)
    grad_query.launch_grad_query(sequence, expected.grad_out, lse, d, dq)
    grad_query.launch_grad_query(p, expected.grad_out, lse, d, dq, prefix_only=True)
    close("merged gradient of query", dq, expected.grads["query"], dtype)


BASE = Problem(B=1, H=2, Hkv=1, T=37, P=20, heads_last=True)

CASES = {
    "plain": {},
    "bidirectional, more keys": {"S": 50, "is_causal": False},
    "more keys than queries": {"T": 20, "S": 53},
    "fewer keys than queries": {"S": 9},
    "no keys": {"S": 0},
    "no prefix": {"P": 0},
    "padding": {"mask": "padding", "B": 4, "H": 1, "T": 20},
    "bool mask": {"mask": "bool"},
    "additive mask, softcap": {"mask": "additive", "softcap": 3.0, "gain": 4.0},
    "mask a head": {"mask": "heads", "is_causal": False},
    "window": {"sliding_window": 7, "S": 45},
    "window, bidirectional, sinks": {"sliding_window": 20, "is_causal": False, "sinks": True},
    "sinks, nothing visible": {"sinks": True, "S": 0, "P": 0, "T": 3},
    "bank of lengths": {"N": 3, "index": True, "lengths": True, "B": 5, "T": 12},
    "one prefix, shorter, a group of three": {"lengths": True, "H": 3, "T": 20},
    "packed, bank, window": {"packed": (5, 1, 0, 33), "N": 2, "index": True, "lengths": True, "sliding_window": 9},
    "packed, padding, bidirectional": {"packed": (5, 34, 2), "mask": "padding", "is_causal": False},
    "packed, mask, softcap": {"packed": (3, 20), "mask": "additive", "softcap": 2.0},
    "one query": {"T": 1, "S": 40, "B": 3, "H": 4, "Hkv": 2},
    "head of 20, value of 7": {"D": 20, "Dv": 7, "T": 20},
    "head of 80": {"D": 80, "T": 20, "Dv": 96},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(case: str) -> None:
    p = replace(BASE, **CASES[case]).record()
    expected = Expected(p)
    out, lse = check_forward(p, expected)
    check_backward(p, expected, out, lse)
    if p.virtual_tokens:
        check_from_state(p, expected)
    if p.cu_seqlens is None:
        check_decode(p, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prefix_dtype", [None, torch.float32], ids=["", "float32 prefix"])
def test_half_precisions(dtype: torch.dtype, prefix_dtype: torch.dtype | None) -> None:
    p = replace(BASE, T=20, dtype=dtype, prefix_dtype=prefix_dtype).record()
    expected = Expected(p)
    out, lse = check_forward(p, expected)
    check_backward(p, expected, out, lse)
    check_from_state(p, expected)
    check_decode(p, expected)


@pytest.mark.parametrize("empty", [{"B": 0}, {"T": 0}, {"T": 0, "S": 5}, {"P": 0, "S": 0}, {"N": 2, "P": 0}])
def test_empty(empty: dict) -> None:
    p = replace(BASE, **empty).record()
    expected = Expected(p)
    check_backward(p, expected, *check_forward(p, expected))
    check_decode(p, expected)


def test_hidden_garbage_does_not_leak() -> None:
    """Padded keys and virtual tokens beyond an entry's length may hold anything."""
    p = replace(BASE, B=2, T=18, N=2).record()
    padding = torch.arange(18) < torch.tensor([[11], [18]])
    clean = p._replace(padding=padding, prefix_index=torch.tensor([0, 1]), prefix_lengths=torch.tensor([20, 3]))
    dirty = {name: getattr(p, name).clone() for name in ("key", "value", "prefix_key", "prefix_value")}
    dirty["key"][0, :, 11:], dirty["value"][0, :, 11:] = torch.nan, torch.inf
    dirty["prefix_key"][1, :, 3:], dirty["prefix_value"][1, :, 3:] = torch.nan, torch.inf
    p, expected = clean._replace(**dirty), Expected(clean)
    check_backward(p, expected, *check_forward(p, expected))
    check_decode(p, expected)


def test_infinities_of_other_kernels_mean_nothing_seen() -> None:
    p = replace(BASE, T=5).record()
    for infinity in (torch.inf, -torch.inf):
        out, lse = torch.zeros(1, 2, 5, 32), torch.full((1, 2, 5), infinity)
        forward.launch_forward(p, out, lse, from_state=True)
        want, want_lse = reference(p._replace(key=p.key[:, :, :0], value=p.value[:, :, :0]))
        close("out", out, want, torch.float32)
        close("lse", lse, want_lse, torch.float32)


def test_offsets_beyond_32_bits() -> None:
    """A row more than 2^31 elements from the tensor's start is read and written there: the room between is never
    touched, so it costs no memory."""
    stride = 2**31 + 2**20

    def far(x: Tensor) -> Tensor:
        room = torch.empty_strided(x.shape, (stride, *x[0].contiguous().stride()), dtype=torch.float32)
        return room.copy_(x)

    torch.use_deterministic_algorithms(False)  # which would fill the room
    p = replace(BASE, B=2, T=5, P=3, H=1, D=16).record()
    expected = Expected(p)
    p = p._replace(query=far(p.query), key=far(p.key), value=far(p.value))
    out = far(torch.full(expected.out.shape, torch.nan))
    lse = torch.full(expected.lse.shape, torch.nan)
    forward.launch_forward(p, out, lse)
    close("out", out, expected.out, torch.float32)


def same_bits(p: AttentionProblem, q: AttentionProblem) -> None:
    """Output and the prefix's gradients of both."""
    expected = Expected(q)
    results = []
    for problem in (p, q):
        out, lse = check_forward(problem, expected)
        d = compute_delta(expected.grad_out, out, None)
        results.append((out, lse, *grad_prefix.launch_grad_prefix(problem, expected.grad_out, lse, d)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_values_out_of_range_are_clamped() -> None:
    """Nobody can look at them without waiting for the GPU; they must not lead outside of a tensor."""
    p = replace(BASE, B=3, N=2, T=20, index=True, lengths=True).record()
    wild = p._replace(prefix_index=torch.tensor([-7, 9, 2**40]), prefix_lengths=torch.tensor([-3, 2**40]))
    tame = p._replace(prefix_index=torch.tensor([-1, 1, 1]), prefix_lengths=torch.tensor([0, 20]))
    same_bits(wild._replace(prefix_index=tame.prefix_index), tame)
    same_bits(tame._replace(prefix_lengths=None), tame._replace(prefix_lengths=torch.tensor([20, 20])))
    out, lse = check_forward(wild, Expected(tame))
    grad_prefix.launch_grad_prefix(wild, torch.zeros_like(out), lse, torch.zeros_like(lse))
    packed = replace(BASE, packed=(30, 40)).record()
    same_bits(
        packed._replace(cu_seqlens=torch.tensor([-5, 30, 10**9])), packed._replace(cu_seqlens=torch.tensor([0, 30, 70]))
    )


def test_decode_refuses_packed_sequences() -> None:
    p = replace(BASE, packed=(3, 2)).record()
    with pytest.raises(ValueError, match="use forward"):
        decode.launch_decode(p, torch.empty(1, 2, 5, 32), torch.empty(1, 2, 5))
