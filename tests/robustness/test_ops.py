"""What an attack on the ops found, kind by kind: each is an error that says how to mend it, or has one right answer."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import prefixcore
from prefixcore.backends import checks, library
from prefixcore.backends.problem import AttentionProblem, attention_problem
from tests.device import triton_backend

ROOT = Path(__file__).resolve().parents[2]
OPS = torch.ops.prefixcore
BACKENDS = ("cpu", "reference", "triton")
"""The triton backend stands in the cpu backend's place, interpreted."""


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param != "triton":
        with prefixcore.use_backend(request.param):
            yield request.param
        return
    pytest.importorskip("triton")
    with triton_backend():
        yield "triton"


def good(**changes: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    shapes = {"query": (2, 4, 5, 8), "key": (2, 2, 5, 8), "value": (2, 2, 5, 8), "prefix_key": (2, 3, 8)}
    call = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return {**call, "prefix_value": torch.randn(2, 3, 8, generator=g), **changes}


def freed(x: Tensor, left: int = 0) -> Tensor:
    """`x` as FSDP leaves what it has sharded: its shape, and no memory, or too little."""
    x = x.clone()
    x.untyped_storage().resize_(left)
    return x


OPTIONAL = {
    "attn_mask": torch.zeros(2, 1, 5, 5), "sinks": torch.zeros(4), "prefix_lengths": torch.tensor([2]),
    "prefix_index": torch.tensor([0, -1]),
}  # fmt: skip
MASKS = {
    "padding": torch.ones(2, 5, dtype=torch.bool), "bool": torch.ones(2, 4, 5, 5, dtype=torch.bool),
    "float64": torch.zeros(2, 1, 5, 5, dtype=torch.float64), "whole": torch.zeros(2, 4, 5, 5),
}  # fmt: skip

GONE = r"{}: expected memory for the shape .*freed or shrunk; if FSDP shards it, unshard\(\) it first"


# --- storage that is gone ---------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 8])
@pytest.mark.parametrize("name", [*good(), *OPTIONAL])
def test_attention_of_freed_memory(backend: str, name: str, left: int) -> None:
    call = good(**OPTIONAL)
    with pytest.raises(ValueError, match=GONE.format(name)):
        prefixcore.prefix_attention(**{**call, name: freed(call[name], left if name not in ("prefix_lengths",) else 0)})


@pytest.mark.parametrize("mask", MASKS)
def test_every_kind_of_mask_whose_memory_is_freed(backend: str, mask: str) -> None:
    with pytest.raises(ValueError, match=GONE.format("(attn_mask|mask|padding)")):
        prefixcore.prefix_attention(**good(attn_mask=freed(MASKS[mask])))


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_autocast_does_not_read_freed_memory(name: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=GONE.format(name)):
        prefixcore.prefix_attention(**good(**{name: freed(good()[name])}))


@pytest.mark.parametrize("backend", ["cpu", "triton"], indirect=True)
def test_memory_freed_between_forward_and_backward(backend: str) -> None:
    call = good()
    leaf = call["prefix_key"].requires_grad_()
    out = prefixcore.prefix_attention(**call)
    call["key"].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=GONE.format("key")):
        out.sum().backward()
    assert leaf.grad is None


@pytest.mark.parametrize("name", ["input_ids", "weight", "virtual"])
def test_embedding_of_freed_memory(backend: str, name: str) -> None:
    call = {"input_ids": torch.arange(4), "weight": torch.randn(3, 8), "virtual": torch.randn(2, 8)}
    for left in (0, 8):
        with pytest.raises(ValueError, match=GONE.format(name)):
            prefixcore.soft_embedding(**{**call, name: freed(call[name], left)})


def test_memory_that_is_large_enough_is_enough(backend: str) -> None:
    """Views that end where their storage ends, overlapping ones, and empty tensors without any storage."""
    room = torch.randn(2 * 4 * 5 * 8 + 7)
    last = room.as_strided((2, 4, 5, 8), (160, 40, 8, 1), 7)
    overlapping = room.as_strided((2, 2, 5, 8), (0, 3, 1, 1), 2)
    want = prefixcore.prefix_attention(**good(query=last.clone(), key=overlapping.clone()))
    torch.testing.assert_close(prefixcore.prefix_attention(**good(query=last, key=overlapping)), want)
    empty = good(prefix_key=freed(torch.empty(2, 0, 8)), prefix_value=freed(torch.empty(2, 0, 8)))
    assert prefixcore.prefix_attention(**empty).isfinite().all()


# --- the registered ops, called directly ------------------------------------------------------------


def record(**changes: Any) -> AttentionProblem:
    return attention_problem(**good())._replace(**changes)


def packed(cu_seqlens: Tensor, **changes: Any) -> dict[str, Any]:
    p = record()
    return {"query": p.query[:1], "key": p.key[:1], "value": p.value[:1], "cu_seqlens": cu_seqlens, **changes}


ZERO, LONG = torch.zeros(2, dtype=torch.long), {"dtype": torch.long}
DIRECT: dict[str, dict[str, Any]] = {
    "no key/value heads": {"key": torch.randn(2, 0, 5, 8), "value": torch.randn(2, 0, 5, 8),
                           "prefix_key": torch.randn(0, 3, 8), "prefix_value": torch.randn(0, 3, 8)},
    "heads that do not divide": {"query": torch.randn(2, 3, 5, 8)},
    "query of three dimensions": {"query": torch.randn(4, 5, 8)},
    "query of none": {"query": torch.randn(())},
    "a head dim of zero": {"query": torch.randn(2, 4, 5, 0), "key": torch.randn(2, 2, 5, 0),
                           "prefix_key": torch.randn(2, 3, 0)},
    "another head dim": {"key": torch.randn(2, 2, 5, 9)},
    "another batch": {"key": torch.randn(1, 2, 5, 8)},
    "fewer values": {"value": torch.randn(2, 2, 4, 8)},
    "a prefix of two dimensions": {"prefix_key": torch.randn(3, 8)},
    "an empty bank": {"prefix_key": torch.randn(0, 2, 3, 8), "prefix_value": torch.randn(0, 2, 3, 8)},
    "half a bank": {"prefix_key": torch.randn(1, 2, 3, 8)},
    "a shorter prefix_value": {"prefix_value": torch.randn(2, 2, 8)},
    "mixed dtypes": {"key": torch.randn(2, 2, 5, 8).bfloat16()},
    "float64": {name: x.double() for name, x in good().items()},
    "integers": {"query": torch.ones(2, 4, 5, 8, **LONG)},
    "half a prefix in float16": {"prefix_key": torch.randn(2, 3, 8).half()},
    "a short index": {"prefix_index": torch.zeros(1, **LONG)},
    "an index of floats": {"prefix_index": torch.zeros(2)},
    "an index of two dimensions": {"prefix_index": torch.zeros(2, 1, **LONG)},
    "long lengths": {"prefix_lengths": ZERO},
    "a padding of floats": {"padding": torch.ones(2, 5)},
    "a short padding": {"padding": torch.ones(2, 4, dtype=torch.bool)},
    "a mask that would broadcast": {"mask": torch.ones(1, 1, 5, 5)},
    "a mask of integers": {"mask": torch.ones(2, 4, 5, 5, **LONG)},
    "sinks a key/value head": {"sinks": torch.zeros(2)},
    "sinks of integers": {"sinks": torch.zeros(4, **LONG)},
    "packed rows": {"cu_seqlens": torch.tensor([0, 5])},
    "no packed rows": packed(torch.tensor([0])),
    "no numbers at all": packed(torch.zeros(0, **LONG)),
    "packed, with more keys": packed(torch.tensor([0, 5]), key=torch.randn(1, 2, 6, 8), value=torch.randn(1, 2, 6, 8)),
}  # fmt: skip
NUMBERS: dict[str, dict[str, Any]] = {
    "no scale": {"scale": math.nan},
    "an infinite scale": {"scale": -math.inf},
    "a scale that float32 has as zero": {"scale": 1e-300},
    "a scale that overflows": {"scale": 3.4e38},
    "a softcap below 0": {"softcap": -1.0},
    "no softcap": {"softcap": math.nan},
    "a softcap that float32 has as zero": {"softcap": 1e-45},
    "a softcap that overflows": {"softcap": 3.4e38},
    "a quotient that float32 has as zero": {"scale": 1e-20, "softcap": 1e20},
    "a quotient that overflows": {"scale": -1e20, "softcap": 1e-20},
    "a window below 0": {"sliding_window": -(2**63)},
}
"""What the front refuses too; it has no other numbers."""
VALUES: dict[str, dict[str, Any]] = {
    "an index beyond the bank": {"prefix_index": ZERO + 1},
    "a huge index": {"prefix_index": ZERO - 2**62},
    "a length beyond P": {"prefix_lengths": torch.tensor([4])},
    "packed, falling": packed(torch.tensor([0, 4, 3, 5])),
    "packed, far beyond": packed(torch.tensor([0, 2**62, 5])),
    "more tokens than 32 bits count": {"query": torch.randn(2, 4, 1, 8).expand(2, 4, 2**31, 8)},
}
"""What the CPU's op refuses, and the GPU's clamps or never sees."""


@pytest.mark.parametrize("case", [*DIRECT, *NUMBERS, *VALUES])
def test_the_registered_attention_checks_what_it_is_given(case: str) -> None:
    p = record(**{**DIRECT, **NUMBERS, **VALUES}[case])
    with pytest.raises((ValueError, IndexError), match=": expected"):
        OPS.prefix_attention(*p)
    out, lse = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 5)
    with pytest.raises((ValueError, IndexError), match=": expected"):
        OPS.prefix_attention_backward(out, None, out, lse, *p, True, True, True)


@pytest.mark.parametrize("case", [*DIRECT, *NUMBERS])
def test_the_triton_backend_checks_the_same(case: str) -> None:
    with pytest.raises(ValueError, match=": expected"):
        checks.check_attention(record(**{**DIRECT, **NUMBERS}[case]))


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_are_refused_in_the_same_words_everywhere(case: str) -> None:
    """By the front, the registered op of the CPU, in C++, and that of GPUs, which must not run to say it."""
    options = NUMBERS[case]
    said = []
    for call in (
        lambda: prefixcore.prefix_attention(**good(**options)),
        lambda: OPS.prefix_attention(*record(**options)),
        lambda: checks.check_attention(record(**options)),
    ):
        with pytest.raises(ValueError, match=": expected") as refusal:
            call()
        said.append(str(refusal.value).splitlines()[0].rpartition(", got ")[0])
    assert len(set(said)) == 1, said


BACKWARD: dict[str, tuple[Any, Any, Any, Any]] = {
    "an output of another shape": (torch.zeros(2, 4, 5, 8), None, torch.zeros(2, 4, 4, 8), torch.zeros(2, 4, 5)),
    "a gradient of another shape": (torch.zeros(2, 4, 5, 7), None, torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 5)),
    "a gradient of none": (torch.zeros(()), None, torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 5)),
    "a short lse": (torch.zeros(2, 4, 5, 8), None, torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 4)),
    "an lse in float64": (torch.zeros(2, 4, 5, 8), None, torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 5).double()),
    "half a gradient": (torch.zeros(2, 4, 5, 8).half(), None, torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 5)),
    "a short gradient of lse": (torch.zeros(2, 4, 5, 8), torch.zeros(1), torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 5)),
    "a freed output": (torch.zeros(2, 4, 5, 8), None, freed(torch.zeros(2, 4, 5, 8)), torch.zeros(2, 4, 5)),
    "a freed lse": (torch.zeros(2, 4, 5, 8), None, torch.zeros(2, 4, 5, 8), freed(torch.zeros(2, 4, 5))),
    "a freed gradient": (freed(torch.zeros(2, 4, 5, 8)), None, torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 5)),
}


@pytest.mark.parametrize("case", BACKWARD)
def test_the_registered_backward_checks_what_it_is_given(case: str) -> None:
    grad_out, grad_lse, out, lse = BACKWARD[case]
    with pytest.raises(ValueError, match="(grad_out|grad_lse|out|lse): expected"):
        OPS.prefix_attention_backward(grad_out, grad_lse, out, lse, *record(), True, True, True)
    with pytest.raises(ValueError, match="(grad_out|grad_lse|out|lse): expected"):
        checks.check_outputs(record(), grad_out, grad_lse, out, lse)


IDS, TABLE, ROWS = torch.arange(4), torch.randn(3, 8), torch.randn(2, 8)
EMBEDDING: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "a table of one dimension": (checks.check_embedding, (IDS, torch.randn(8), ROWS)),
    "a table of three": (checks.check_embedding, (IDS, torch.randn(3, 8, 1), ROWS)),
    "a prompt of one dimension": (checks.check_embedding, (IDS, TABLE, torch.randn(8))),
    "shorter rows": (checks.check_embedding, (IDS, TABLE, torch.randn(2, 4))),
    "ids of floats": (checks.check_embedding, (torch.zeros(3), TABLE, ROWS)),
    "ids of int8": (checks.check_embedding, (IDS.to(torch.int8), TABLE, ROWS)),
    "a table of integers": (checks.check_embedding, (IDS, TABLE.long(), ROWS)),
    "a prompt in another half": (checks.check_embedding, (IDS, TABLE.bfloat16(), ROWS.half())),
    "int32 ids of 2^31 rows": (checks.check_embedding, (IDS.int(), torch.randn(1, 8).expand(2**31, 8), ROWS)),
    "freed ids": (checks.check_embedding, (freed(IDS), TABLE, ROWS)),
    "a gradient of other ids": (checks.check_embedding_backward, (torch.randn(3, 8), IDS, 3, 2)),
    "a gradient without rows": (checks.check_embedding_backward, (torch.randn(8), IDS, 3, 2)),
    "a gradient of no dimension": (checks.check_embedding_backward, (torch.randn(()), IDS, 3, 2)),
    "a gradient of integers": (checks.check_embedding_backward, (torch.ones(4, 8, dtype=torch.long), IDS, 3, 2)),
    "fewer rows than none": (checks.check_embedding_backward, (torch.randn(4, 8), IDS, 3, -1)),
    "a vocabulary below zero": (checks.check_embedding_backward, (torch.randn(4, 8), IDS, -(2**62), 2)),
    "more rows than a number counts": (checks.check_embedding_backward, (torch.randn(4, 8), IDS, 2**63 - 1, 2)),
    "a freed gradient": (checks.check_embedding_backward, (freed(torch.randn(4, 8)), IDS, 3, 2)),
}  # fmt: skip


@pytest.mark.parametrize("case", EMBEDDING)
def test_the_registered_embedding_checks_what_it_is_given(case: str) -> None:
    check, arguments = EMBEDDING[case]
    op = OPS.soft_embedding if check is checks.check_embedding else OPS.soft_embedding_backward
    for function in (check, op):
        with pytest.raises(ValueError, match=": expected"):
            function(*arguments)


def test_absurd_sizes_end_no_process() -> None:
    """In a process of its own, whose death is a failure: sizes of which only a few bytes are there."""
    script = """
import torch
import prefixcore
OPS = torch.ops.prefixcore
x = torch.randn(1, 1, 1, 8)
for query, key in (
    (x.expand(1, 1, 2**40, 8), x),
    (x.expand(1, 2**40, 1, 8), x),
    (x.expand(1, 1, 2**28, 8), x.expand(1, 1, 2**33, 8)),
    (x[:, :, :0].expand(2**40, 1, 0, 8), x[:, :, :0].expand(2**40, 1, 0, 8)),
):
    try:
        prefixcore.prefix_attention(query, key, key)
    except (ValueError, RuntimeError) as error:
        print(type(error).__name__, error)
for ids, hidden, rows in ((3, 8, 2**48), (3, 0, 2**62), (2**50, 0, 1)):
    try:
        ids = torch.zeros(1, dtype=torch.long).expand(ids)
        grad = torch.empty(0).expand(len(ids), 0) if hidden == 0 else torch.zeros(len(ids), hidden)
        print("shape", list(OPS.soft_embedding_backward(grad, ids, 1, rows).shape))
    except (ValueError, RuntimeError) as error:
        print(type(error).__name__, error)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(result.stdout.splitlines()) == 7, result.stdout


# --- scale, softcap, NaN in a mask ------------------------------------------------------------------


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
    call = {"query": make(2, 4, queries, 16), "key": make(2, 2, keys, 16), "value": make(2, 2, keys, 16),
            "prefix_key": make(2, 3, 16), "prefix_value": make(2, 3, 16)}  # fmt: skip
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
    assert int(out.isnan().sum()) == 4 * 16
    want_out, want_lse, want = results["reference"]
    for got, expected in ((out, want_out), (lse, want_lse)):
        torch.testing.assert_close(got.double(), expected, atol=3e-2, rtol=3e-2, equal_nan=True)
    assert torch.equal(leaves["query"].grad.isnan(), want["query"].grad.isnan())
    assert int(leaves["query"].grad.isnan().sum()) == 4 * 16
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


# --- words ------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse_coo": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[0]]),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*good(), "attn_mask"])
def test_a_layout_without_strides_is_named(name: str, layout: str) -> None:
    call = good(attn_mask=torch.zeros(2, 1, 5, 5))
    other = LAYOUTS[layout](call[name])
    for chosen in ("cpu", "reference"):
        with prefixcore.use_backend(chosen), pytest.raises(TypeError, match=f"{name}: expected a dense.*{layout}"):
            prefixcore.prefix_attention(**{**call, name: other})


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize(
    ("name", "layout"), [("input_ids", "sparse_coo"), ("input_ids", "nested"),
                         *((name, layout) for name in ("weight", "virtual") for layout in LAYOUTS)],
)  # fmt: skip
def test_the_embedding_names_it_too(name: str, layout: str) -> None:
    call = {"input_ids": torch.arange(4)[None], "weight": torch.randn(3, 8), "virtual": torch.randn(2, 8)}
    for chosen in ("cpu", "reference"):
        with prefixcore.use_backend(chosen), pytest.raises(TypeError, match=f"{name}: expected a dense.*{layout}"):
            prefixcore.soft_embedding(**{**call, name: LAYOUTS[layout](call[name])})


@pytest.mark.filterwarnings("ignore")
def test_quantized_and_meta_tensors_are_named() -> None:
    quantized = torch.quantize_per_tensor(good()["key"], 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"key: expected query's floating-point dtype, got torch\.qint8"):
        prefixcore.prefix_attention(**good(key=quantized))
    for name in ("key", "value", "prefix_key", "prefix_value"):
        with pytest.raises(ValueError, match=f"{name}: expected device cpu as query, got meta"):
            prefixcore.prefix_attention(**good(**{name: good()[name].to("meta")}))
    with pytest.raises(ValueError, match=r"one device, got \['cpu', 'cpu', 'meta'\]"):
        prefixcore.soft_embedding(torch.arange(4), torch.randn(3, 8), torch.randn(2, 8).to("meta"))


def test_out_of_memory_names_what_was_asked_for() -> None:
    wide = good(query=good()["query"][:, :, :1].expand(2, 4, 2**30, 8))
    with pytest.raises(RuntimeError, match=r"out of memory: a tensor \[2, 1073741824, 4, 8\].* 274877906944 bytes"):
        prefixcore.prefix_attention(**wide)
    with pytest.raises(RuntimeError, match=r"out of memory: a tensor \[1125899906842624\].*9007199254740992 bytes"):
        prefixcore.soft_embedding(torch.zeros(1, dtype=torch.long).expand(2**50), torch.randn(3, 8), torch.randn(2, 8))


def test_int32_ids_do_not_name_2_31_rows() -> None:
    table, rows = torch.randn(1, 8).expand(2**31 - 1, 8), torch.randn(2, 8)
    for backend in ("cpu", "reference"):
        with prefixcore.use_backend(backend), pytest.raises(TypeError, match=r"int64 to name 2147483649 rows.*\.long"):
            prefixcore.soft_embedding(torch.arange(3, dtype=torch.int32), table, rows)
    ids = torch.tensor([2**31 - 2, 2**31 - 1, 2**31])
    assert torch.equal(prefixcore.soft_embedding(ids, table, rows)[1:], rows)
