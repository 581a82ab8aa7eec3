"""Scales and softcaps that float32 does not hold, and NaN in a mask: an error in words, or the one right answer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import prefixcore
from prefixcore.backends import library

from .op_calls import good


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"scale": 1e-300}, "scale"), ({"scale": 1e-45}, "scale"), ({"scale": 3.4e38}, "scale"),
        ({"scale": -1e-40}, "scale"), ({"scale": -1e31}, "scale"), ({"scale": 10**400}, "scale"),
        ({"softcap": 1e-300}, "softcap"), ({"softcap": 1e-45}, "softcap"), ({"softcap": 3.4e38}, "softcap"),
        ({"softcap": 1e30}, "scale / softcap"), ({"scale": 1e-20, "softcap": 1e20}, "scale / softcap"),
        ({"scale": 1e20, "softcap": 1e-20}, "scale / softcap"), ({"scale": -1e20, "softcap": 1e-20}, "scale / softcap"),
    ],
)  # fmt: skip
def test_what_float32_does_not_hold_is_refused(backend: str, options: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .* 1e-30 to 1e\\+30"):
        prefixcore.prefix_attention(**good(**options))


@pytest.mark.parametrize(
    "options",
    [{"scale": 1e-30}, {"scale": 0}, {"scale": 1e30, "softcap": 1.0}, {"scale": 1e-15, "softcap": 1e15},
     {"softcap": 1e-30}, {"softcap": 1e29}, {"scale": -1.0, "softcap": 1e-30}],
)  # fmt: skip
def test_at_the_edges_the_answer_is_right(backend: str, options: dict[str, float]) -> None:
    call = good(**options)
    got = prefixcore.prefix_attention(**call)
    with prefixcore.use_backend("reference"):
        want = prefixcore.prefix_attention(**{n: x.double() if isinstance(x, Tensor) else x for n, x in call.items()})
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8], ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_autocast_casts_no_integers(name: str, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=f"{name}: expected a floating"):
        prefixcore.prefix_attention(**good(**{name: good()[name].to(dtype)}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("queries", [5, 70, 1])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_nan_in_a_mask_is_seen_where_it_stands(
    backend: str, queries: int, softcap: float | None, dtype: torch.dtype
) -> None:
    """It makes the output of each query that sees it NaN, as in PyTorch's SDPA, and no other; so with the gradients."""
    g = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=g).to(dtype)  # noqa: E731
    keys = queries + 2
    call = {"query": make(2, 2, queries, 16), "key": make(2, 1, keys, 16), "value": make(2, 1, keys, 16),
            "prefix_key": make(1, 3, 16), "prefix_value": make(1, 3, 16)}  # fmt: skip
    mask = torch.randn(2, 1, queries, keys, generator=g).to(dtype)
    mask[1, 0, queries // 2, 1] = torch.nan  # seen by one query of the second row
    mask[0, 0, 0, keys - 1] = torch.nan if queries > 1 else 0  # of a key that is_causal hides from the first query
    results = {}
    for name in (backend, "reference"):
        leaves = {n: x.detach().clone().requires_grad_() for n, x in call.items()}
        if name == "reference":
            leaves = {n: x.detach().double().requires_grad_() for n, x in leaves.items()}
        with prefixcore.use_backend("reference" if name == "reference" else None):
            out, lse = prefixcore.prefix_attention(**leaves, attn_mask=mask.to(leaves["query"].dtype), softcap=softcap,
                                                   return_lse=True)  # fmt: skip
            (out[:1].sum() + out[1:].sum()).backward()
        results[name] = (out, lse, leaves)
    out, lse, leaves = results[backend]
    assert out[1, :, queries // 2].isnan().all()
    assert lse[1, :, queries // 2].isnan().all()
    assert int(out.isnan().sum()) == 2 * 16
    want_out, want_lse, want = results["reference"]
    for got, expected in ((out, want_out), (lse, want_lse)):
        torch.testing.assert_close(got.double(), expected, atol=3e-2, rtol=3e-2, equal_nan=True)
    assert torch.equal(leaves["query"].grad.isnan(), want["query"].grad.isnan())
    assert int(leaves["query"].grad.isnan().sum()) == 2 * 16
    for name in ("prefix_key", "prefix_value"):
        assert leaves[name].grad.isnan().all()
    for name in ("key", "value"):
        seen = want[name].grad.isnan()
        assert seen[1].any()
        assert leaves[name].grad[seen].isnan().all()
        assert not leaves[name].grad[0].isnan().any()


@pytest.fixture
def every_isa() -> Iterator[Iterator[str]]:
    """The instruction sets that this machine can run, each in use when it is reached."""
    before = library.host().isa()
    yield (library.host().select_isa(isa) or isa for isa in library.host().runnable_isas())
    library.host().select_isa(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("queries", [1, 40])
def test_nan_in_a_mask_on_every_instruction_set(every_isa: Iterator[str], queries: int, dtype: torch.dtype) -> None:
    """Each has an exponential of its own, and blocks and decode a softmax each."""
    mask = torch.zeros(1, 1, queries, queries)
    mask[..., -1, 0] = torch.nan
    for isa in every_isa:
        x = torch.randn(1, 2, queries, 16).to(dtype)
        leaf = x.clone().requires_grad_()
        out, lse = prefixcore.prefix_attention(leaf, x, x, attn_mask=mask, return_lse=True)
        out.float().sum().backward()
        for got in (out, leaf.grad, lse[..., None]):
            assert got[:, :, -1].isnan().all(), isa
            assert not got[:, :, :-1].isnan().any(), isa
