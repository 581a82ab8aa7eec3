"""How the op behaves as a citizen of PyTorch: opcheck, compile, autocast, gradcheck, strides."""

from __future__ import annotations

import math
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import prefixcore
from prefixcore.backends.problem import DIFFERENTIABLE, AttentionProblem, attention_problem, is_off
from prefixcore.ops.reference import prefix_attention_reference

from .problems import Problem, relative_error, run


def as_bank(p: AttentionProblem) -> AttentionProblem:
    """With a single prefix as a bank of one entry."""
    prefix_key, prefix_value = p.bank
    return p._replace(prefix_key=prefix_key, prefix_value=prefix_value)


def wanting_gradients(p: AttentionProblem) -> AttentionProblem:
    return p._replace(**{name: getattr(p, name).detach().requires_grad_() for name in DIFFERENTIABLE})


OPS = torch.ops.prefixcore

PROBLEMS = {
    "plain": Problem(T=9),
    "bank and padding": Problem(T=9, N=2, index=True, lengths=True, mask="padding"),
    "packed, window, cap, sinks": Problem(packed=(3, 9, 1), sliding_window=4, softcap=2.0, sinks=True),
    "bfloat16": Problem(T=9, dtype=torch.bfloat16, prefix_dtype=torch.float32),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_opcheck(problem: str) -> None:
    p = as_bank(PROBLEMS[problem].record())
    torch.library.opcheck(OPS.prefix_attention.default, wanting_gradients(p), atol=1e-2, rtol=1e-2)
    out, lse = OPS.prefix_attention(*p)
    backward = (torch.randn_like(out), torch.randn_like(lse), out, lse, *p, True, True, True)
    torch.library.opcheck(OPS.prefix_attention_backward.default, backward)


def test_opcheck_of_a_prefix_without_a_bank() -> None:
    p = PROBLEMS["plain"].record()
    torch.library.opcheck(OPS.prefix_attention.default, wanting_gradients(p))
    assert torch.equal(OPS.prefix_attention(*p)[0], OPS.prefix_attention(*as_bank(p))[0])


def test_the_record_and_the_schemas_have_the_same_arguments() -> None:
    """Whoever adds an option to one of them and not to the others learns it here."""
    names, kinds = AttentionProblem._fields, get_type_hints(AttentionProblem).values()
    forward = OPS.prefix_attention.default._schema.arguments
    assert tuple(argument.name for argument in forward) == names
    schema_kinds = {Tensor: "Tensor", Tensor | None: "Optional[Tensor]", bool: "bool", int: "int", float: "float"}
    assert [str(argument.type) for argument in forward] == [schema_kinds[kind] for kind in kinds]
    backward = OPS.prefix_attention_backward.default._schema.arguments
    before, after = ("grad_out", "grad_lse", "out", "lse"), ("needs_query", "needs_sequence", "needs_prefix")
    assert tuple(argument.name for argument in backward) == (*before, *names, *after)
    assert [str(x.type) for x in backward[len(before) :][: len(names)]] == [str(x.type) for x in forward]
    assert len(OPS.prefix_attention_backward.default._schema.returns) == len(DIFFERENTIABLE)


def test_a_record_is_its_tensors_and_its_options() -> None:
    p = PROBLEMS["packed, window, cap, sinks"].record()
    again = AttentionProblem(*p.tensors, *p.options)
    assert all(x is y for x, y in zip(again, p, strict=True))
    assert all(x is None or isinstance(x, Tensor) for x in p.tensors)
    assert not any(isinstance(x, Tensor) for x in p.options)
    q = attention_problem(p.query, p.key, p.value)
    assert q.virtual_tokens == 0
    assert q.options[:2] == (True, 1 / math.sqrt(p.query.shape[3]))
    on = (*DIFFERENTIABLE, "is_causal", "scale")
    assert all(is_off(getattr(q, name)) for name in q._fields if name not in on)
    with pytest.raises(TypeError, match="no_such_option"):
        attention_problem(p.query, p.key, p.value, no_such_option=1)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_of_the_reference(softcap: float | None) -> None:
    """The reference's own gradients against finite differences: the ground that the kernels stand on."""
    p = Problem(
        B=2,
        H=4,
        Hkv=2,
        T=3,
        D=3,
        P=2,
        N=2,
        index=True,
        mask="padding",
        dtype=torch.float64,
        softcap=softcap,
        sinks=True,
    )
    tensors, options = p.tensors()
    leaves = [x.requires_grad_() for x in tensors.values()]
    finite = prefixcore.prefix_attention(*leaves, **options, return_lse=True)[1].isfinite()

    def f(*leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = prefixcore.prefix_attention(*leaves, **options, return_lse=True)
        return out, torch.where(finite, lse, 0)

    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.filterwarnings("ignore:Input #.* requires gradient and is not a double")
def test_gradcheck_of_the_kernels() -> None:
    """Finite differences in float32 are coarse, but independent of any reference."""
    p = Problem(B=1, H=2, Hkv=1, T=4, D=4, P=3)
    tensors, options = p.tensors()
    leaves = [x.requires_grad_() for x in tensors.values()]
    assert torch.autograd.gradcheck(
        lambda *x: prefixcore.prefix_attention(*x, **options), leaves, eps=1e-2, atol=2e-3, rtol=2e-2
    )


@pytest.mark.parametrize("problem", ["plain", "bank and padding", "packed, window, cap, sinks"])
def test_compile_fullgraph(problem: str) -> None:
    p = PROBLEMS[problem]
    eager = run(p)
    compiled = run(p, torch.compile(prefixcore.prefix_attention, fullgraph=True))
    for name, expected in eager.items():
        torch.testing.assert_close(compiled[name], expected)


def test_compile_with_dynamic_length() -> None:
    f = torch.compile(prefixcore.prefix_attention, fullgraph=True, dynamic=True)
    for T in (5, 9, 33):
        tensors, _ = Problem(T=T).tensors()
        torch.testing.assert_close(f(**tensors), prefixcore.prefix_attention(**tensors))


def test_autocast_computes_in_the_autocast_dtype() -> None:
    tensors, options = Problem(T=40).tensors()
    leaves = {n: x.requires_grad_() for n, x in tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = prefixcore.prefix_attention(**leaves, **options)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in leaves.values())
    assert relative_error(out, prefixcore.prefix_attention(**tensors, **options)) < 2e-2


def test_no_grad_saves_nothing() -> None:
    tensors, _ = Problem().tensors()
    with torch.no_grad():
        out = prefixcore.prefix_attention(**{n: x.requires_grad_() for n, x in tensors.items()})
    assert not out.requires_grad


def test_lse_alone_may_be_differentiated() -> None:
    tensors, options = Problem(T=9, P=3).tensors()
    grads = {}
    for backend in ("cpu", "reference"):
        leaves = {n: x.detach().clone().requires_grad_() for n, x in tensors.items()}
        with prefixcore.use_backend(backend):
            prefixcore.prefix_attention(**leaves, **options, return_lse=True)[1].sum().backward()
        grads[backend] = leaves
    for name in ("query", "key", "prefix_key"):
        torch.testing.assert_close(grads["cpu"][name].grad, grads["reference"][name].grad, atol=1e-5, rtol=1e-5)


def test_second_derivative_is_refused() -> None:
    tensors, _ = Problem().tensors()
    key = tensors["prefix_key"].requires_grad_()
    (grad,) = torch.autograd.grad(prefixcore.prefix_attention(**tensors).sum(), key, create_graph=True)
    if grad.requires_grad:
        with pytest.raises(NotImplementedError, match="reference"):
            grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_views(dtype: torch.dtype) -> None:
    """Slices of a fused projection, an expanded batch, a last dimension that is not contiguous."""
    qkv = torch.randn(2, 33, 3, 4, 16, dtype=dtype)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    pk, pv = torch.randn(4, 7, 16, dtype=dtype), torch.randn(7, 4, 16, dtype=dtype).transpose(0, 1)
    want = prefixcore.prefix_attention(*(x.contiguous() for x in (q, k, v, pk, pv)))
    assert torch.equal(prefixcore.prefix_attention(q, k, v, pk, pv), want)
    flipped = k.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(prefixcore.prefix_attention(q, flipped, v, pk, pv), want)
    one = q[:1].expand(2, -1, -1, -1)
    want = prefixcore.prefix_attention(one.contiguous(), k, v, pk, pv)
    assert torch.equal(prefixcore.prefix_attention(one, k, v, pk, pv), want)


def test_equals_scaled_dot_product_attention_without_a_prefix() -> None:
    tensors, _ = Problem(T=50, P=0).tensors()
    q, k, v = (tensors[n] for n in ("query", "key", "value"))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(prefixcore.prefix_attention(q, k, v), want, atol=1e-6, rtol=1e-5)


def test_backends_can_be_asked_and_forced() -> None:
    for op in ("prefix_attention", "soft_embedding"):
        assert prefixcore.which_backend(op, "cpu", torch.float32).name == "cpu"
        assert prefixcore.which_backend(op, "cpu", torch.float64).name == "reference"
        with prefixcore.use_backend("reference"):
            assert prefixcore.which_backend(op, "cpu", torch.float32) == ("reference", "forced")
    with prefixcore.use_backend("cpu"), pytest.raises(ValueError, match="float64"):
        prefixcore.prefix_attention(*(torch.randn(1, 1, 2, 4, dtype=torch.float64) for _ in range(3)))
    for backend, reason in (("cuda", "no kernel for prefix_attention"), ("triton", "on NVIDIA GPUs, not on cpu")):
        with prefixcore.use_backend(backend), pytest.raises(ValueError, match=reason):
            prefixcore.prefix_attention(*(torch.randn(1, 1, 2, 4) for _ in range(3)))
    with pytest.raises(ValueError, match="unknown backend"), prefixcore.use_backend("tpu"):
        pass
    with pytest.raises(ValueError, match="unknown op"):
        prefixcore.which_backend("attention", "cpu", torch.float32)


def test_reference_is_the_forced_reference() -> None:
    p = PROBLEMS["bank and padding"].record()
    out, lse = prefix_attention_reference(p)
    got, got_lse = OPS.prefix_attention(*p)
    torch.testing.assert_close(got, out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_lse, lse, atol=1e-5, rtol=1e-5)


def test_scale_and_softcap_may_vary_in_compiled_code() -> None:
    """Numbers that change become symbols, which the argument checks must be able to compare."""
    torch._dynamo.reset()
    t, _ = Problem(T=9).tensors()
    compiled = torch.compile(
        lambda t, scale, cap: prefixcore.prefix_attention(**t, scale=scale, softcap=cap),
        fullgraph=True,
        backend="eager",
    )
    for scale, cap in ((0.1, 1.0), (0.2, 2.0), (0.3, 3.0)):
        want = prefixcore.prefix_attention(**t, scale=scale, softcap=cap)
        torch.testing.assert_close(compiled(t, scale, cap), want)


@pytest.mark.parametrize("window", [2**31, 2**62, 2**63 - 1, 2**70])
def test_a_window_without_end_is_no_window(window: int) -> None:
    t, _ = Problem(T=9).tensors()
    with_window = prefixcore.prefix_attention(**t, sliding_window=window)
    torch.testing.assert_close(with_window, prefixcore.prefix_attention(**t))


def _attend(t: dict[str, torch.Tensor]) -> Any:
    return lambda prefix_key: prefixcore.prefix_attention(**{**t, "prefix_key": prefix_key}).sin().sum()


def _embed(t: dict[str, torch.Tensor]) -> Any:
    return lambda rows: prefixcore.soft_embedding(torch.arange(4), torch.ones(2, t["prefix_key"].shape[2]), rows).sum()


@pytest.mark.parametrize("op", [_attend, _embed])
@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "dual", "vmap of grad"])
def test_derivatives_that_would_be_lost_are_refused(op: Any, transform: str) -> None:
    """Forward mode would take every derivative for zero; the reference has them all."""
    t, _ = Problem(T=9).tensors()
    f, x = op(t), t["prefix_key"] if op is _attend else t["prefix_key"][0, :2]

    def derivative() -> Any:
        if transform == "grad":
            return torch.func.grad(f)(x)
        if transform == "vjp":
            return torch.func.vjp(f, x)[0]
        if transform == "jvp":
            return torch.func.jvp(f, (x,), (x,))[1]
        if transform == "vmap of grad":
            return torch.func.vmap(torch.func.grad(f))(torch.stack([x, x]))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            return torch.autograd.forward_ad.unpack_dual(f(dual)).tangent

    with pytest.raises(NotImplementedError, match=r"use_backend\(\"reference\"\)"):
        derivative()
    with prefixcore.use_backend("reference"):
        assert derivative().abs().max() > 0


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("op", [_attend, _embed])
@pytest.mark.parametrize("how", ["jvp", "grad", "a dual number"])
def test_compiled_code_refuses_them_too(op: Any, how: str) -> None:
    """Compiled, a derivative in forward mode was zero in silence: the argument checks are not run in that mode."""
    torch._dynamo.reset()
    t, _ = Problem(T=9).tensors()
    f, x = op(t), t["prefix_key"] if op is _attend else t["prefix_key"][0, :2]

    def derivative() -> Any:
        if how == "a dual number":
            compiled = torch.compile(f, backend="aot_eager")
            compiled(x)
            with torch.autograd.forward_ad.dual_level():
                dual = compiled(torch.autograd.forward_ad.make_dual(x, x))
                return torch.autograd.forward_ad.unpack_dual(dual).tangent
        transform = torch.func.grad(f) if how == "grad" else lambda x: torch.func.jvp(f, (x,), (x,))[1]
        return torch.compile(transform, fullgraph=True, backend="aot_eager")(x)

    with pytest.raises((NotImplementedError, torch._dynamo.exc.Unsupported), match=r"use_backend\(\"reference\"\)"):
        derivative()
    with prefixcore.use_backend("reference"):
        assert derivative().abs().max() > 0


def test_the_registered_op_refuses_them_too() -> None:
    p = PROBLEMS["plain"].record()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: OPS.prefix_attention(*p._replace(query=x))[0], (p.query,), (p.query,))


def test_vmap_is_a_loop() -> None:
    t, _ = Problem(T=9).tensors()
    queries = torch.stack([t["query"], 2 * t["query"]])
    mapped = torch.func.vmap(lambda query: prefixcore.prefix_attention(**{**t, "query": query}))(queries)
    torch.testing.assert_close(mapped[1], prefixcore.prefix_attention(**{**t, "query": queries[1]}))


def test_on_the_meta_device_there_are_shapes_alone() -> None:
    t, _ = Problem(T=9).tensors()
    out = prefixcore.prefix_attention(**{name: x.to("meta") for name, x in t.items()})
    assert out.is_meta
    assert out.shape == prefixcore.prefix_attention(**t).shape
    rows = prefixcore.soft_embedding(*(x.to("meta") for x in (torch.arange(3), torch.ones(2, 8), torch.ones(1, 8))))
    assert rows.is_meta
    assert rows.shape == (3, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_packed_bank_on_the_meta_device(dtype: torch.dtype) -> None:
    t, options = Problem(packed=(3, 9, 1), N=2, index=True, lengths=True, dtype=dtype).tensors()
    want = prefixcore.prefix_attention(**t, **options, return_lse=True)
    meta = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in (t | options).items()}
    got = prefixcore.prefix_attention(**meta, return_lse=True)
    assert [(x.shape, x.dtype, x.stride()) for x in got] == [(x.shape, x.dtype, x.stride()) for x in want]


def test_the_reference_looks_at_no_values_of_fake_tensors() -> None:
    t, options = Problem(N=2, index=True, lengths=True, dtype=torch.float64).tensors()
    want = prefixcore.prefix_attention(**t, **options)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in (t | options).items()}
        assert prefixcore.prefix_attention(**fake).shape == want.shape
        ids = mode.from_tensor(torch.arange(3))
        assert prefixcore.soft_embedding(ids, fake["key"][0, 0], fake["value"][0, 0]).shape == (3, t["key"].shape[3])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_vmap_over_who_sees_which_prefix(backend: str) -> None:
    t, _ = Problem(T=9, N=2).tensors()
    index = torch.tensor([[0, 1], [1, -1]])
    with prefixcore.use_backend(backend):
        mapped = torch.func.vmap(lambda index: prefixcore.prefix_attention(**t, prefix_index=index))
        for one, got in zip(index, mapped(index), strict=True):
            torch.testing.assert_close(got, prefixcore.prefix_attention(**t, prefix_index=one))
        with pytest.raises(IndexError, match="got 2"):
            mapped(index + 1)


def test_which_backend_wants_a_dtype() -> None:
    with pytest.raises(TypeError, match=r"dtype: expected a torch\.dtype, got 'float32'"):
        prefixcore.which_backend("prefix_attention", "cpu", "float32")  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", ["padding", "bool", "additive"])
def test_a_mask_comes_first_after_lengths_that_vary(mask: str) -> None:
    """The keys' length is a symbol by then and the mask's a number: compiled code tells whether they are equal."""
    torch._dynamo.reset()
    compiled = torch.compile(prefixcore.prefix_attention, fullgraph=True, backend="eager")
    for T, kind in ((5, None), (9, None), (12, mask), (17, mask)):
        t, options = Problem(T=T, mask=kind).tensors()
        torch.testing.assert_close(compiled(**t, **options), prefixcore.prefix_attention(**t, **options))
