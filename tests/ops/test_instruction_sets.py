"""What the instruction sets share and where they differ."""

from __future__ import annotations

import pytest
import torch

from prefixcore.backends import library

from .problems import Problem, run

PAIRS = "avx512_bf16"


@pytest.mark.skipif(PAIRS not in library.host().runnable_isas(), reason="this CPU has no AVX512_BF16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_pairs_are_for_bfloat16_alone(dtype: torch.dtype) -> None:
    """The set with bfloat16 products computes everything else bit for bit as plain AVX-512 does."""
    problem = Problem(T=75, P=20, H=6, Hkv=2, dtype=dtype)
    before, results = library.host().isa(), {}
    try:
        for isa in ("avx512", PAIRS):
            library.host().select_isa(isa)
            results[isa] = run(problem)
    finally:
        library.host().select_isa(before)
    for name, expected in results["avx512"].items():
        assert torch.equal(results[PAIRS][name], expected) == (dtype != torch.bfloat16), name


def test_the_best_set_comes_first() -> None:
    order = ["avx512_bf16", "avx512", "avx2", "baseline"]
    runnable = library.host().runnable_isas()
    assert runnable == [isa for isa in order if isa in runnable]
    assert "baseline" in runnable
