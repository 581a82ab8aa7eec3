"""A bad input is an error that says what was expected, what came and how to mend it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import prefixcore
from prefixcore.backends import gradients


def good() -> dict[str, Any]:
    return {
        "query": torch.randn(2, 4, 5, 8), "key": torch.randn(2, 2, 5, 8), "value": torch.randn(2, 2, 5, 8),
        "prefix_key": torch.randn(2, 3, 8), "prefix_value": torch.randn(2, 3, 8),
    }  # fmt: skip


def bank(**more: Any) -> dict[str, Any]:
    return {"prefix_key": torch.randn(3, 2, 4, 8), "prefix_value": torch.randn(3, 2, 4, 8), **more}


packed = {"query": torch.randn(1, 4, 5, 8), "key": torch.randn(1, 2, 5, 8), "value": torch.randn(1, 2, 5, 8)}

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "query of three dimensions": ({"query": torch.randn(4, 5, 8)}, ValueError, "query: expected four dimensions"),
    "heads that do not divide": ({"query": torch.randn(2, 5, 5, 8)}, ValueError, "divides query's 5"),
    "another head dim": ({"key": torch.randn(2, 2, 5, 9)}, ValueError, "key: expected"),
    "another batch": ({"key": torch.randn(3, 2, 5, 8)}, ValueError, "key: expected"),
    "fewer values than keys": ({"value": torch.randn(2, 2, 4, 8)}, ValueError, "value: expected"),
    "mixed dtypes": ({"key": torch.randn(2, 2, 5, 8).bfloat16()}, TypeError, "key: expected"),
    "integers": ({"query": torch.ones(2, 4, 5, 8, dtype=torch.long)}, TypeError, "query: expected"),
    "half a prefix": ({"prefix_value": None}, ValueError, "both or neither"),
    "prefix of other heads": ({"prefix_key": torch.randn(4, 3, 8)}, ValueError, "prefix_key: expected"),
    "prefix of unequal lengths": ({"prefix_value": torch.randn(2, 4, 8)}, ValueError, "prefix_value: expected"),
    "prefix in another half": ({"prefix_key": torch.randn(2, 3, 8).half()}, TypeError, "prefix_key: expected"),
    "bank without index": (bank(), ValueError, "prefix_index"),
    "index out of the bank": (bank(prefix_index=torch.tensor([0, 3])), IndexError, r"prefix_index\[1\].*got 3"),
    "index below -1": (bank(prefix_index=torch.tensor([-2, 0])), IndexError, r"prefix_index\[0\].*got -2"),
    "index of floats": (bank(prefix_index=torch.tensor([0.0, 1.0])), TypeError, "prefix_index"),
    "index too short": (bank(prefix_index=torch.tensor([0])), ValueError, "prefix_index"),
    "length beyond P": ({"prefix_lengths": torch.tensor([4])}, ValueError, r"prefix_lengths\[0\].*got 4"),
    "negative length": ({"prefix_lengths": torch.tensor([-1])}, ValueError, r"prefix_lengths\[0\]"),
    "mask of integers": ({"attn_mask": torch.ones(2, 5, dtype=torch.long)}, TypeError, r"mask\.bool\(\)"),
    "mask [T, S]": ({"attn_mask": torch.ones(5, 5, dtype=torch.bool)}, ValueError, r"mask\[None, None\]"),
    "padding in numbers": ({"attn_mask": torch.ones(2, 5)}, TypeError, r"mask\.bool\(\).*mask\[:, None, None\]"),
    "padding of the prefix too": ({"attn_mask": torch.ones(2, 8).bool()}, ValueError, r"attn_mask\[\.\.\., 3:\]"),
    "mask of the prefix too": ({"attn_mask": torch.ones(2, 1, 5, 8)}, ValueError, r"attn_mask\[\.\.\., 3:\]"),
    "mask that does not broadcast": ({"attn_mask": torch.ones(2, 3, 5, 5)}, ValueError, "broadcasts"),
    "mask with a gradient": ({"attn_mask": torch.ones(2, 1, 5, 5).requires_grad_()}, ValueError, "detach"),
    "sinks a KV head": ({"sinks": torch.randn(2)}, ValueError, "sinks"),
    "sinks with a gradient": ({"sinks": torch.randn(4).requires_grad_()}, ValueError, "sinks"),
    "window of zero": ({"sliding_window": 0}, ValueError, "sliding_window"),
    "negative softcap": ({"softcap": -1.0}, ValueError, "softcap"),
    "endless softcap": ({"softcap": float("inf")}, ValueError, "softcap"),
    "softcap not a number": ({"softcap": float("nan")}, ValueError, "softcap"),
    "softcap beyond float32": ({"softcap": 1e300}, ValueError, "softcap"),
    "softcap in words": ({"softcap": "30"}, TypeError, "softcap: expected a number"),
    "softcap switched on": ({"softcap": True}, TypeError, "softcap: expected a number, or None, got bool"),
    "scale as a tensor": ({"scale": torch.ones(())}, TypeError, "scale: expected a number"),
    "window of a half": ({"sliding_window": 2.5}, TypeError, "sliding_window: expected an integer"),
    "causal in words": ({"is_causal": "no"}, TypeError, "is_causal: expected True or False"),
    "no query": ({"query": None}, TypeError, "query: expected a tensor, got NoneType"),
    "key as a list": ({"key": [1.0]}, TypeError, "key: expected a tensor, got list"),
    "prefix as a list": ({"prefix_key": [1.0]}, TypeError, "prefix_key: expected a tensor, got list"),
    "mask as a list": ({"attn_mask": [[1] * 5] * 2}, TypeError, "attn_mask: expected a tensor, got list"),
    "index without a prefix": (
        {"prefix_key": None, "prefix_value": None, "prefix_index": torch.tensor([0, 0])},
        ValueError,
        "prefix_index: expected None where there is no prefix.*give prefix_key",
    ),
    "lengths without a prefix": (
        {"prefix_key": None, "prefix_value": None, "prefix_lengths": torch.tensor([0])},
        ValueError,
        "prefix_lengths: expected None where there is no prefix.*give prefix_key",
    ),
    "query of integers": (
        {"query": torch.ones(2, 4, 5, 8).long()},
        TypeError,
        "query: expected a floating-point dtype",
    ),
    "index as a list": (bank(prefix_index=[0, 1]), TypeError, "prefix_index: expected a tensor, got list"),
    "lengths as a list": ({"prefix_lengths": [3]}, TypeError, "prefix_lengths: expected a tensor, got list"),
    "sinks as a list": ({"sinks": [1.0] * 4}, TypeError, "sinks: expected a tensor, got list"),
    "packed as a list": ({**packed, "cu_seqlens": [0, 5]}, TypeError, "cu_seqlens: expected a tensor, got list"),
    "scale not finite": ({"scale": float("nan")}, ValueError, "scale"),
    "packed batch": ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "batch of 1"),
    "packed, not to the end": ({**packed, "cu_seqlens": torch.tensor([0, 4])}, ValueError, "cu_seqlens"),
    "packed, falling": ({**packed, "cu_seqlens": torch.tensor([0, 4, 3, 5])}, ValueError, "cu_seqlens"),
    "packed, empty": ({**packed, "cu_seqlens": torch.tensor([0])}, ValueError, "cu_seqlens"),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str, backend: str) -> None:
    changes, kind, message = BAD[case]
    arguments = {**good(), **changes}
    before = {n: x.clone() for n, x in arguments.items() if isinstance(x, Tensor)}
    with prefixcore.use_backend(backend), pytest.raises(kind, match=message):
        prefixcore.prefix_attention(**arguments)
    for name, x in before.items():
        assert torch.equal(arguments[name], x), name


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (RuntimeError("cu_seqlens: expected a sequence rising from 0 to 5"), ValueError),
        (RuntimeError("prefix_lengths[0]: expected 0 to 3, got 4"), ValueError),
        (RuntimeError("scale / softcap: expected 0, or a size from 1e-30 to 1e+30, got 1e-40"), ValueError),
        (RuntimeError("vocabulary and num_virtual: expected sizes of at least 0, got 3 and -1"), ValueError),
        (RuntimeError("T: expected at most 2^31 - 1, got 2147483648"), ValueError),
        (RuntimeError("prefixcore: expected a PyTorch with CUDA"), RuntimeError),
        (RuntimeError("prefixcore: out of memory"), RuntimeError),
        (RuntimeError("Found dtype Half (got Float): expected another"), RuntimeError),
        (NotImplementedError("query: expected another device"), NotImplementedError),
    ],
)
def test_a_bad_argument_that_the_library_finds(raised: Exception, kind: type[Exception]) -> None:
    """torch 2.15 makes a RuntimeError of every error of C++ but that of an index."""

    def op() -> None:
        raise raised

    with pytest.raises(kind) as caught:
        gradients._call(op, ())
    assert (type(caught.value), str(caught.value)) == (kind, str(raised))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({**packed, "cu_seqlens": torch.tensor([0, 4, 3, 5])}, "cu_seqlens: expected"),
        ({"prefix_lengths": torch.tensor([4])}, r"prefix_lengths\[0\].*got 4"),
    ],
    ids=["cu_seqlens", "prefix_lengths"],
)
def test_compiled_code_says_it_too(bad: dict[str, Any], words: str, trained: bool) -> None:
    arguments = {**good(), **bad}
    arguments["prefix_key"].requires_grad_(trained)
    attention = torch.compile(prefixcore.prefix_attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=words):
        attention(**arguments)


def test_jit_trace_says_how_to_trace() -> None:
    class Attention(torch.nn.Module):
        def forward(self, query: Tensor, prefix: Tensor) -> Tensor:
            return prefixcore.prefix_attention(query, query, query, prefix, prefix)

    query, prefix = torch.randn(1, 2, 5, 8), torch.randn(2, 3, 8, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"trace inside torch.no_grad\(\)"):
        torch.jit.trace(Attention(), (query, prefix))
    with torch.no_grad():
        traced = torch.jit.trace(Attention(), (query, prefix))
        assert torch.equal(traced(query, prefix), Attention()(query, prefix))
