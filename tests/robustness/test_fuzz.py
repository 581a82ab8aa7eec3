"""Random calls of both ops: good ones are right, malformed ones are errors with words, and none ends the process.

What is right is computed here, in float64 and one head after another, without the project's own reference. Every call
follows from its seed: ``python -m tests.robustness.test_fuzz malformed 17 1`` makes number 17 again.
"""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import prefixcore
from prefixcore.backends.problem import attention_problem

ROOT = Path(__file__).resolve().parents[2]
OPS = torch.ops.prefixcore
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-10}
"""Of a difference, beside the largest number there is, or beside 1."""


# --- random tensors ---------------------------------------------------------------------------------


def laid_out(r: random.Random, x: Tensor) -> Tensor:
    """Numbers of the shape and dtype of `x`, in memory in one of the ways that PyTorch knows."""
    way = r.choice(("contiguous", "permuted", "sliced", "stepped", "expanded", "overlapping"))
    if way == "permuted":
        order = r.sample(range(x.dim()), x.dim())
        back = [order.index(d) for d in range(x.dim())]
        return x.permute(order).contiguous().permute(back)
    if way == "sliced" and x.dim():
        before = [r.randint(0, 2) for _ in x.shape]
        room = x.new_full([a + n + r.randint(0, 2) for a, n in zip(before, x.shape, strict=True)], 1)
        inside = room[tuple(slice(a, a + n) for a, n in zip(before, x.shape, strict=True))]
        return inside.copy_(x)
    if way == "stepped" and x.dim():
        d = r.randrange(x.dim())
        room = torch.stack([x, torch.ones_like(x)], d + 1).flatten(d, d + 1)
        return room[(slice(None),) * d + (slice(None, None, 2),)]
    if way == "expanded" and x.dim() and x.numel():
        d = r.randrange(x.dim())
        return x.narrow(d, 0, 1).expand(x.shape)
    if way == "overlapping" and x.dim() > 1 and x.numel():
        strides = [r.randint(0, 3) for _ in x.shape[:-1]] + [1]
        room = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) + 3
        return x.flatten()[torch.arange(room) % x.numel()].as_strided(x.shape, strides, 2)
    return x


def attention_call(seed: int, empty: bool = True) -> dict[str, Any]:
    """The arguments of a good call of ``prefix_attention``."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = r.choice(DTYPES)
    packed = [r.randint(0, 9) for _ in range(r.randint(1, 4))] if r.random() < 0.2 else None
    if packed is not None and not empty:
        packed[0] += 1
    least = 0 if empty and r.random() < 0.1 else 1
    B, Hkv, group = r.randint(least, 3), r.randint(1, 3), r.randint(1, 3)
    T, S = r.choice((1, r.randint(least, 24))), r.choice((r.randint(least, 40), 70))
    D, Dv = r.choice((1, 3, 8, 16, 20, 33)), r.choice((1, 5, 8, 16, 40))
    P, N = r.choice((least, 1, 3, 20, 66)), r.choice((None, None, 1, 3))
    if packed is not None:
        B, T, S = 1, sum(packed), sum(packed)

    def numbers(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return laid_out(r, torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype))

    prefix_dtype = r.choice((dtype, torch.float32))
    bank = () if N is None else (N,)
    call: dict[str, Any] = {
        "query": numbers(B, Hkv * group, T, D), "key": numbers(B, Hkv, S, D), "value": numbers(B, Hkv, S, Dv),
        "is_causal": r.random() < 0.6,
    }  # fmt: skip
    if N is not None or r.random() < 0.8:
        call["prefix_key"] = numbers(*bank, Hkv, P, D, dtype=prefix_dtype)
        call["prefix_value"] = numbers(*bank, Hkv, P, Dv, dtype=prefix_dtype)
        integer = r.choice((torch.int64, torch.int32))
        rows = B if packed is None else len(packed)
        if (N or 1) > 1 or r.random() < 0.3:
            call["prefix_index"] = laid_out(r, torch.randint(-1, N or 1, (rows,), generator=g, dtype=integer))
        if r.random() < 0.3:
            call["prefix_lengths"] = laid_out(r, torch.randint(0, P + 1, (N or 1,), generator=g, dtype=integer))
    if packed is not None:
        call["cu_seqlens"] = torch.tensor([0, *packed]).cumsum(0).to(r.choice((torch.int64, torch.int32)))
    shape = [r.choice((1, n)) for n in (B, Hkv * group, T, S)][r.choice((0, 0, 1)) :]
    mask = r.choice((None, None, "padding", "bool", "additive"))
    if mask == "padding":
        call["attn_mask"] = laid_out(r, torch.rand(r.choice((1, B)), S, generator=g) < 0.7)
    elif mask == "bool":
        call["attn_mask"] = laid_out(r, torch.rand(shape, generator=g) < 0.7)
    elif mask == "additive":
        bias = torch.randn(shape, generator=g).masked_fill(torch.rand(shape, generator=g) < 0.2, -torch.inf)
        call["attn_mask"] = laid_out(r, bias.to(r.choice((dtype, torch.float32))))
    if r.random() < 0.3:
        call["sinks"] = numbers(Hkv * group, dtype=r.choice((dtype, torch.float32)))
    call["scale"] = r.choice((None, None, 0.3, 1.0, -0.5, 0))
    call["softcap"] = r.choice((None, None, 0.5, 2.0, 30.0))
    call["sliding_window"] = r.choice((None, None, 1, 3, 17, 2**40))
    return call


def embedding_call(seed: int) -> dict[str, Any]:
    """The arguments of a good call of ``soft_embedding``."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = r.choice(DTYPES)
    V, N, E = r.choice((1, 7, 50)), r.choice((1, 4, 20)), r.choice((1, 5, 16, 33))
    shape = [r.randint(0 if r.random() < 0.1 else 1, 9) for _ in range(r.randint(0, 3))]
    ids = torch.randint(0, V + N, shape, generator=g, dtype=r.choice((torch.int64, torch.int32)))
    weight = torch.randn(V, E, generator=g).to(dtype)
    virtual = torch.randn(N, E, generator=g).to(r.choice((dtype, torch.float32)))
    return {name: laid_out(r, x) for name, x in (("input_ids", ids), ("weight", weight), ("virtual", virtual))}


# --- what is right ----------------------------------------------------------------------------------


def expected_attention(c: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of float64 tensors."""
    query, key, value, pk, pv = (c.get(n) for n in ("query", "key", "value", "prefix_key", "prefix_value"))
    (B, H, T, D), (_, Hkv, S, _) = query.shape, key.shape
    scale = 1 / math.sqrt(D) if c["scale"] is None else c["scale"]
    mask = c.get("attn_mask")
    if mask is not None:
        mask = (mask[:, None, None] if mask.dim() == 2 else mask).expand(B, H, T, S)
    ends = None if c.get("cu_seqlens") is None else c["cu_seqlens"].tolist()
    spans = [(b, 0, T, 0, S) for b in range(B)]
    if ends is not None:
        spans = [(0, start, end, start, end) for start, end in zip(ends, ends[1:], strict=False)]
    outs, lses = [], []
    for n, (b, t0, t1, s0, s1) in enumerate(spans):
        entry = 0 if c.get("prefix_index") is None else int(c["prefix_index"][n])
        for h in range(H):
            k, v = key[b, h * Hkv // H, s0:s1], value[b, h * Hkv // H, s0:s1]
            P = 0
            if pk is not None and entry >= 0:
                P = pk.shape[-2] if c.get("prefix_lengths") is None else int(c["prefix_lengths"][entry])
                one_k, one_v = (x[entry] if x.dim() == 4 else x for x in (pk, pv))
                k, v = torch.cat([one_k[h * Hkv // H, :P], k]), torch.cat([one_v[h * Hkv // H, :P], v])
            x = scale * query[b, h, t0:t1] @ k.T
            if c["softcap"] is not None:
                x = c["softcap"] * torch.tanh(x / c["softcap"])
            i, j = torch.arange(t1 - t0)[:, None] + (s1 - s0) - (t1 - t0), torch.arange(s1 - s0)
            seen = (j <= i) if c["is_causal"] else torch.ones(t1 - t0, s1 - s0, dtype=torch.bool)
            if c["sliding_window"] is not None:
                seen = seen & (i - j < c["sliding_window"])
            if mask is not None and mask.dtype == torch.bool:
                seen = seen & mask[b, h, t0:t1, s0:s1]
            elif mask is not None:
                bias = mask[b, h, t0:t1, s0:s1].double()
                seen, bias = seen & (bias > -1e30), bias.clamp(min=-1e30)
                x = torch.cat([x[:, :P], x[:, P:] + bias], 1)
            x = torch.where(torch.cat([torch.ones(t1 - t0, P, dtype=torch.bool), seen], 1), x, -torch.inf)
            sink = query.new_full((t1 - t0, 1), -torch.inf if c.get("sinks") is None else float(c["sinks"][h]))
            m = torch.cat([x.detach(), sink], 1).amax(1).clamp(min=-1e300)
            e = torch.exp(x - m[:, None])
            total = e.sum(1) + torch.exp(sink[:, 0] - m)
            some = torch.where(total == 0, 1, total)
            outs.append(e / some[:, None] @ v)
            lses.append(torch.where(total == 0, -torch.inf, some.log() + m))
    if not outs:
        return query.new_zeros(B, H, T, value.shape[3]), query.new_zeros(B, H, T)
    if ends is None:
        return torch.stack(outs).unflatten(0, (B, H)), torch.stack(lses).unflatten(0, (B, H))
    heads = [slice(h, None, H) for h in range(H)]
    out, lse = (torch.stack([torch.cat(x[h]) for h in heads])[None] for x in (outs, lses))
    return out, lse


def assert_near(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    assert got.shape == want.shape, what
    got, want = got.detach().double(), want.detach()
    assert torch.equal(got.isinf(), want.isinf()), what
    got, want = got.masked_fill(want.isinf(), 0), want.masked_fill(want.isinf(), 0)
    if want.numel():
        worst = float((got - want).abs().max()) / max(1, float(want.abs().max()))
        assert worst <= tolerance, f"{what}: {worst:.1e} exceeds {tolerance}"  # NaN is not below either


def check_attention(seed: int) -> None:
    call = attention_call(seed)
    leaves = {n: call[n].detach().requires_grad_() for n in call if n in _DIFFERENTIABLE}
    wide = {n: x.detach().double().requires_grad_() for n, x in leaves.items()}
    want, want_lse = expected_attention(call | wide)
    got, lse = prefixcore.prefix_attention(**call | leaves, return_lse=True)
    tolerance = TOLERANCE[call["query"].dtype]
    if any(isinstance(x, Tensor) and x.dtype == torch.float32 for x in call.values()):
        tolerance = max(tolerance, TOLERANCE[torch.float32])  # a float32 mask may hold the same numbers, rounded
    assert_near(got, want, tolerance, f"seed {seed}: out")
    assert_near(lse, want_lse, tolerance, f"seed {seed}: lse")
    g = torch.Generator().manual_seed(seed)
    grad = torch.randn(want.shape, generator=g).to(got.dtype)
    grad_lse = torch.randn(want_lse.shape, generator=g) * want_lse.detach().isfinite()
    if not want.requires_grad:
        return  # an empty batch
    torch.autograd.backward([got, lse], [grad, grad_lse.to(lse.dtype)])
    torch.autograd.backward([want, want_lse], [grad.double(), grad_lse.double()])
    for name, x in wide.items():
        want_grad = torch.zeros_like(x) if x.grad is None else x.grad
        assert_near(leaves[name].grad, want_grad, tolerance, f"seed {seed}: gradient of {name}")


_DIFFERENTIABLE = ("query", "key", "value", "prefix_key", "prefix_value")


def check_embedding(seed: int) -> None:
    call = embedding_call(seed)
    ids, weight, virtual = call.values()
    leaf = virtual.detach().requires_grad_()
    got = prefixcore.soft_embedding(ids, weight, leaf)
    V, rows = weight.shape[0], ids.flatten().tolist()
    assert torch.equal(got, torch.cat([weight, virtual.to(weight.dtype)])[ids.long()]), f"seed {seed}"
    grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(seed)).to(got.dtype)
    got.backward(grad)
    want = torch.zeros(virtual.shape, dtype=torch.float64)
    for place, row in enumerate(rows):
        if row >= V:
            want[row - V] += grad.reshape(-1, weight.shape[1])[place].double()
    assert_near(leaf.grad, want, max(TOLERANCE[torch.float32], TOLERANCE[virtual.dtype]), f"seed {seed}: gradient")


# --- malformed calls --------------------------------------------------------------------------------


def freed(x: Tensor, share: float = 0) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(int(x.untyped_storage().nbytes() * share))
    return x


HUGE = (2**31, 2**40, 2**62, -(2**62), 2**63 - 1)


def spoil(r: random.Random, name: str, x: Tensor) -> Any:
    """Something in the place of the tensor `x` that no op takes for `name`."""
    longer = [1] * x.dim()
    if x.dim():
        longer[{"value": -2, "grad": 0}.get(name, -1)] = 97  # longer than any length of a good call
    ways: list[Callable[[], Any]] = [
        lambda: x.to(torch.complex64),
        lambda: freed(x),
        lambda: freed(x, 0.5),
        lambda: x.to_sparse(),
        lambda: torch.nested.nested_tensor([x, x]),
        lambda: x.tolist(),
        lambda: "0",
    ]
    if name != "input_ids":  # which may have any shape
        ways += [lambda: x[None, None, None], lambda: x.flatten() if x.dim() != 1 else x[:, None]]
        ways += [lambda: x.repeat(longer), lambda: torch.empty(0, dtype=x.dtype)]
    if x.is_floating_point():
        ways += [lambda: x.to(torch.int8), lambda: x.float().to_mkldnn()]
        ways += [lambda: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)]
    elif x.dtype != torch.bool:
        ways += [lambda: x.float(), lambda: torch.full_like(x.long(), r.choice(HUGE))]
    if x.dim() > 2 and name != "input_ids":
        ways += [lambda: x[:1].expand(2**45, *x.shape[1:])]
        ways += [lambda: x[..., :1, :].expand(*x.shape[:-2], 2**40, x.shape[-1])]
        ways += [lambda: x[..., :0]] if name not in ("value", "grad") else []
        ways += [lambda: x[:, :0]] if name != "query" else []
    return r.choice(ways)()


def spoil_option(r: random.Random, name: str) -> Any:
    return r.choice({
        "is_causal": ("no", [True]),
        "scale": (math.nan, math.inf, 1e300, 1e-300, -1e-45, 3.4e38, "1", 10**400, 1j),
        "softcap": (math.nan, math.inf, -1.0, 1e300, 1e-300, 1e-45, 3.4e38, "1", 10**400),
        "sliding_window": ("1", 2.5, math.nan, [1]),
    }[name])  # fmt: skip


def record_of(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the registered op for those of ``prefix_attention``."""
    options = {name: x for name, x in call.items() if x is not None and name != "attn_mask"}
    mask, shape = call.get("attn_mask"), (*call["query"].shape[:3], call["key"].shape[2])
    if mask is not None and mask.dim() == 2:
        options["padding"] = mask.expand(shape[0], shape[3])
    elif mask is not None:
        options["mask"] = mask.expand(shape)
    options["sliding_window"] = options.get("sliding_window", 0)
    return attention_problem(**options)._asdict()


def malformed_call(seed: int) -> tuple[str, Callable[[], Any]]:
    """A call that has to fail, and what it is."""
    r = random.Random(f"malformed {seed}")
    op = r.choice(("attention", "attention", "op", "op", "backward", "embedding", "embedding op", "embedding backward"))
    attends = op in ("attention", "op", "backward")
    call = attention_call(seed, empty=False) if attends else embedding_call(seed)
    while not attends and (not call["input_ids"].dim() or not call["input_ids"].numel()):
        seed += 10**6
        call = embedding_call(seed)
    if op in ("op", "backward", "embedding op", "embedding backward"):  # kernels have no float64
        call = {n: x.float() if isinstance(x, Tensor) and x.dtype == torch.float64 else x for n, x in call.items()}
    if op in ("op", "backward"):
        call = record_of(call)
    functions: dict[str, Callable[..., Any]] = {
        "attention": prefixcore.prefix_attention, "op": OPS.prefix_attention,
        "backward": OPS.prefix_attention_backward, "embedding": prefixcore.soft_embedding,
        "embedding op": OPS.soft_embedding, "embedding backward": OPS.soft_embedding_backward,
    }  # fmt: skip
    arguments, function = call, functions[op]
    if op == "backward":
        out, lse = OPS.prefix_attention(**call)
        needs = {f"needs_{what}": r.random() < 0.7 for what in ("query", "sequence", "prefix")}
        arguments = {"grad_out": out.clone(), "grad_lse": lse.clone(), "out": out, "lse": lse, **call, **needs}
    elif op == "embedding backward":
        ids, weight, virtual = call.values()
        grad = OPS.soft_embedding(ids, weight, virtual)
        sizes = {"vocabulary": weight.shape[0], "num_virtual": virtual.shape[0]}
        arguments = {"grad": grad, "input_ids": ids, **sizes}

    named = [n for n, x in arguments.items() if isinstance(x, Tensor) and x.numel()]
    if attends and r.random() < 0.2:
        name = r.choice(("scale", "softcap", "sliding_window", "is_causal"))
        bad = spoil_option(r, name)
    elif "num_virtual" in arguments and r.random() < 0.3:
        name = r.choice(("vocabulary", "num_virtual"))
        bad = r.choice((-1, -(2**62), 2**63 - 1, 2**70, "1", None, 1.5))
        if bad == 2**63 - 1:
            name = "num_virtual"  # as many rows of the vocabulary leave an id no way to be wrong
    else:
        name = r.choice(named)
        bad = spoil(r, name, arguments[name])
    modes = {"grad": nullcontext, "no_grad": torch.no_grad,
             "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16)}  # fmt: skip
    mode = r.choice(list(modes)) if op in ("attention", "embedding") else "grad"
    backend = r.choice((None, "reference")) if op in ("attention", "embedding") else None

    def run() -> Any:
        with modes[mode](), prefixcore.use_backend(backend):
            return function(**{**arguments, name: bad})

    got = f"{list(bad.shape)} {bad.dtype} {bad.layout}" if _has_shape(bad) else f"{type(bad).__name__} {bad!r:.60}"
    return f"seed {seed}: {op}, {mode}, {backend}: {name} = {got}", run


def _has_shape(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_nested


ERRORS = (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError)


def check_malformed(seed: int) -> None:
    what, call = malformed_call(seed)
    print(what.replace("\n", " "), flush=True)  # the last line that a process writes that dies
    with pytest.raises(ERRORS) as error:
        call()
    assert str(error.value), f"{what}: an error without words"


# --- tests ------------------------------------------------------------------------------------------

FEW, MANY = 100, 2000


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_random_attention_is_right(count: int) -> None:
    for seed in range(count):
        check_attention(seed)


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY // 2, marks=pytest.mark.slow)])
def test_random_embeddings_are_right(count: int) -> None:
    for seed in range(count):
        check_embedding(seed)


@pytest.mark.parametrize("count", [2 * FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_malformed_calls_are_errors_and_never_end_the_process(count: int) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.robustness.test_fuzz", "malformed", "0", str(count)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    last = lines[-1] if lines else "nothing"
    assert result.returncode == 0, f"exit status {result.returncode} after {last!r}\n{result.stderr[-2000:]}"
    assert len(lines) == count


def main(kind: str, first: str, count: str) -> None:
    check = {"attention": check_attention, "embedding": check_embedding, "malformed": check_malformed}[kind]
    torch.set_num_threads(1)
    for seed in range(int(first), int(first) + int(count)):
        check(seed)


if __name__ == "__main__":
    main(*sys.argv[1:])
