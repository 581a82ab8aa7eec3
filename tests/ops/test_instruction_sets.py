"""What the instruction sets share and where they differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from prefixcore.backends import library

from .problems import Problem, run

PAIRS, TILES = "avx512_bf16", "amx"


def results_of(problem: Problem, isa: str) -> dict[str, Tensor]:
    host = library.host()
    before = host.isa()
    try:
        host.select_isa(isa)
        return run(problem)
    finally:
        host.select_isa(before)


def needs(isa: str) -> None:
    if isa not in library.host().runnable_isas():
        pytest.skip(f"this CPU has no {isa}")


@pytest.mark.parametrize("isa", [PAIRS, TILES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_some_are_for_bfloat16_alone(dtype: torch.dtype, isa: str) -> None:
    """The sets with bfloat16 products compute everything else bit for bit as plain AVX-512 does."""
    needs(isa)
    problem = Problem(T=75, P=20, H=6, Hkv=2, dtype=dtype)
    results = results_of(problem, isa)
    for name, expected in results_of(problem, "avx512").items():
        assert torch.equal(results[name], expected) == (dtype != torch.bfloat16), name


def test_tiles_are_left_as_others_want_them() -> None:
    """PyTorch multiplies bfloat16 matrices in the same tile registers, with shapes of its own."""
    needs(TILES)
    a, b = (torch.randn(300, 300).bfloat16() for _ in range(2))
    want, problem = a @ b, Problem(T=75, P=20, H=6, Hkv=2, dtype=torch.bfloat16)
    first = results_of(problem, TILES)
    for _ in range(3):
        assert torch.equal(a @ b, want)
        for name, result in results_of(problem, TILES).items():
            assert torch.equal(result, first[name]), name


def test_the_best_set_comes_first() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    intel = cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text()  # its products of pairs are no faster
    order = [TILES, *(["avx512", PAIRS] if intel else [PAIRS, "avx512"]), "avx2", "baseline"]
    runnable = library.host().runnable_isas()
    assert runnable == [isa for isa in order if isa in runnable]
    assert "baseline" in runnable
