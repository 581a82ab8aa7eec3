"""`prefix_attention` on the shapes that have targets, beside SDPA without a prefix, concatenated (PEFT's way),
two flash calls merged, and FlexAttention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.attention_problem import NAMES, Problem, call, check, matrix_product, rivals
from bench.conftest import Measure
from bench.gates import REFERENCE_TOLERANCE, gate
from bench.reference.flex import make_flex
from bench.scale import pick

ROWS = [
    Problem(4, 8, 8, 256, 64, 20),
    Problem(2, 8, 8, 1024, 64, 64),
    Problem(2, 16, 4, 1024, 128, 64),
    Problem(1, 8, 8, 2048, 64, 512),
    Problem(8, 12, 12, 128, 64, 16),
    Problem(4, 9, 3, 128, 64, 15),
]
TOY = Problem(2, 4, 2, 24, 16, 5)
DECODE = Problem(8, 32, 8, 1, 128, 2048, S=512)


def name(problem: Any) -> str | None:
    if not isinstance(problem, Problem):
        return None
    return "-".join(f"{x}" for x in (problem.B, problem.H, problem.Hkv, problem.T, problem.D, problem.P))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("problem", pick(smoke=[TOY], quick=ROWS, full=ROWS), ids=name)
def test_rows(measure: Measure, problem: Problem, dtype: str, backward: bool) -> None:
    error = check(problem, problem.ours(), NAMES[dtype], backward=backward)
    references = rivals(problem, NAMES[dtype], backward=backward, also={})
    product, flops = matrix_product()
    figures = measure(
        "attention",
        problem.case(dtype=dtype, backward=backward),
        call(problem, problem.ours(), NAMES[dtype], backward=backward),
        {**references, "sgemm": product},
        relative_error=error,
        flops=problem.flops(backward),
        sgemm_flops=flops,
    )
    assert set(figures.get("ratios", ())) in (set(), {"bare", "concatenated", "merged", "sgemm"})


def grouped_for_flex(problem: Problem) -> bool:
    """FlexAttention wants groups of a power of two."""
    group = problem.H // problem.Hkv
    return group & (group - 1) == 0


# Compiling takes a quarter of a minute for a shape and a dtype, so a quick run has one of them and a smoke run none.
FLEX = pick(
    smoke=[],
    quick=[(ROWS[4], "fp32")],
    full=[(row, dtype) for row in ROWS if grouped_for_flex(row) for dtype in ("fp32", "bf16")],
)


@pytest.mark.parametrize(("problem", "dtype"), FLEX, ids=name)
def test_flex_forward(measure: Measure, problem: Problem, dtype: str) -> None:
    """Forward alone: FlexAttention has no backward on the CPU."""
    flex = make_flex(problem.T, problem.P)
    check(problem, flex, NAMES[dtype], backward=False, who="FlexAttention")
    error = check(problem, problem.ours(), NAMES[dtype], backward=False)
    measure(
        "flex",
        problem.case(dtype=dtype),
        call(problem, problem.ours(), NAMES[dtype], backward=False),
        {"flex": call(problem, flex, NAMES[dtype], backward=False)},
        relative_error=error,
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "problem", pick(smoke=[Problem(2, 4, 2, 1, 16, 12, S=7)], quick=[DECODE], full=[DECODE]), ids=name
)
def test_decode(measure: Measure, problem: Problem, dtype: str) -> None:
    """One new token a row, over a shared prefix and each row's own cache. The reference is spared the concatenation:
    its cache has the prefix in it already, once for every row."""
    kind = NAMES[dtype]
    tensors = {n: x.to(kind) for n, x in problem.tensors().items()}
    cache = {
        n: torch.cat([tensors[f"prefix_{n}"].expand(problem.B, -1, -1, -1), tensors[n]], 2) for n in ("key", "value")
    }

    def over_a_concatenated_cache() -> torch.Tensor:
        return scaled_dot_product_attention(tensors["query"], cache["key"], cache["value"], enable_gqa=True)

    error = check(problem, problem.ours(), kind, backward=False)
    concatenated = problem.concatenated()
    check(problem, concatenated, kind, backward=False, who="concatenated")
    want = {"out": concatenated(*tensors.values())}
    gate("SDPA over a concatenated cache", {"out": over_a_concatenated_cache()}, want, REFERENCE_TOLERANCE[kind])

    with torch.no_grad():
        measure(
            "decode",
            problem.case(dtype=dtype),
            call(problem, problem.ours(), kind, backward=False),
            {"cached": over_a_concatenated_cache, "concatenated": call(problem, concatenated, kind, backward=False)},
            relative_error=error,
        )


VARIED: dict[str, Any] = {"strided": {"heads_last": True}, "large scores": {"gain": 32.0}}


@pytest.mark.parametrize("backward", pick(smoke=[False, True], quick=[True], full=[False, True]))
@pytest.mark.parametrize("what", list(VARIED))
@pytest.mark.parametrize("problem", pick(smoke=[TOY], quick=ROWS[1:2], full=ROWS), ids=name)
def test_robustness(measure: Measure, problem: Problem, what: str, backward: bool) -> None:
    """Ours beside ours: strided as transformers gives it over contiguous, scores times 32 over ordinary ones."""
    varied = replace(problem, **VARIED[what])
    error = check(varied, varied.ours(), torch.float32, backward=backward)
    check(problem, problem.ours(), torch.float32, backward=backward)
    measure(
        "robustness",
        problem.case(what=what, backward=backward),
        call(varied, varied.ours(), torch.float32, backward=backward),
        {"plain": call(problem, problem.ours(), torch.float32, backward=backward)},
        relative_error=error,
    )
