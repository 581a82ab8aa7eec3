"""The registered ops, called directly, check what they are given: in C++, in the GPU's checks, in the same words."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import prefixcore
from prefixcore.backends import checks
from prefixcore.backends.problem import AttentionProblem, attention_problem

from .op_calls import OPS, freed, good

ROOT = Path(__file__).resolve().parents[2]


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
