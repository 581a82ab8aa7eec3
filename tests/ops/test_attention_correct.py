"""prefix_attention against the float64 reference: output, log-sum-exp and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.device import examples

from .problems import Problem, check

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "Hkv"), [(4, 1), (6, 2), (3, 3)])
@pytest.mark.parametrize("P", [0, 1, 20, 63, 130])
@pytest.mark.parametrize("T", [1, 3, 111])
def test_shapes(isa: str, T: int, P: int, H: int, Hkv: int, dtype: torch.dtype) -> None:
    check(Problem(T=T, P=P, H=H, Hkv=Hkv, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("D", "Dv"), [(32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (48, 80), (20, 7)]
)
def test_head_dims(isa: str, D: int, Dv: int, dtype: torch.dtype) -> None:
    check(Problem(B=1, T=70, P=20, H=2, Hkv=1, D=D, Dv=Dv, dtype=dtype, heads_last=True))


@pytest.mark.parametrize(("B", "T", "H"), [(16, 1, 2), (4, 4, 2), (2, 8, 2), (2, 16, 2), (8, 8, 4), (2, 64, 2)])
def test_rows_that_fill_every_lane(isa: str, B: int, T: int, H: int) -> None:
    """Blocks of whole registers: of one sequence they are read where they lie, of several they must not be."""
    check(Problem(B=B, T=T, H=H, Hkv=2, P=20, D=64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sequence(isa: str, dtype: torch.dtype) -> None:
    check(Problem(B=1, T=1000, P=64, H=3, Hkv=1, D=64, dtype=dtype, heads_last=True))


OPTIONS = {
    "bidirectional": {"is_causal": False},
    "more keys than queries": {"S": 131},
    "more keys, bidirectional": {"S": 131, "is_causal": False},
    "fewer keys than queries": {"S": 9},
    "no keys": {"S": 0},
    "padding": {"mask": "padding", "B": 5},
    "padding, bidirectional": {"mask": "padding", "B": 5, "is_causal": False},
    "padding, cached keys": {"mask": "padding", "B": 5, "S": 131},
    "bool mask": {"mask": "bool", "is_causal": False},
    "bool mask, causal": {"mask": "bool"},
    "additive mask": {"mask": "additive"},
    "mask a head": {"mask": "heads"},
    "window": {"sliding_window": 7},
    "window, bidirectional": {"sliding_window": 20, "is_causal": False},
    "window, padding": {"sliding_window": 7, "mask": "padding", "B": 4},
    "window of one": {"sliding_window": 1},
    "softcap": {"softcap": 3.0, "gain": 4.0},
    "softcap, mask": {"softcap": 3.0, "mask": "additive"},
    "sinks": {"sinks": True},
    "sinks, nothing visible": {"sinks": True, "S": 0, "P": 0},
    "scale": {"scale": 0.9},
    "bank": {"N": 3, "index": True, "B": 7},
    "bank of lengths": {"N": 3, "index": True, "lengths": True, "B": 7},
    "one prefix, some rows without": {"index": True, "B": 7},
    "one prefix, shorter": {"lengths": True},
    "packed": {"packed": (5, 1, 70, 0, 33)},
    "packed, one sequence": {"packed": (40,)},
    "packed, bank": {"packed": (5, 1, 70, 0, 33, 64), "N": 2, "index": True, "lengths": True},
    "packed, window, softcap": {"packed": (5, 1, 70, 33), "sliding_window": 6, "softcap": 2.0},
    "packed, bidirectional": {"packed": (5, 90, 2), "is_causal": False},
    "packed, padding": {"packed": (5, 90, 2), "mask": "padding"},
    "packed, mask": {"packed": (5, 60, 2), "mask": "additive"},
    "float32 prefix": {"prefix_dtype": torch.float32},
    "no prefix": {"P": 0},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [2, 75])
@pytest.mark.parametrize("option", OPTIONS)
def test_options(isa: str, option: str, T: int, dtype: torch.dtype) -> None:
    check(Problem(**{"T": T, "P": 20, "H": 6, "Hkv": 2, "heads_last": True, "dtype": dtype, **OPTIONS[option]}))


@pytest.mark.parametrize(
    "empty", [{"B": 0}, {"T": 0}, {"T": 0, "S": 5}, {"P": 0, "S": 0}, {"N": 2, "P": 0, "index": True}]
)
def test_empty(isa: str, empty: dict) -> None:
    check(Problem(**empty))


problems = st.builds(
    Problem,
    B=st.integers(1, 3), Hkv=st.integers(1, 3), H=st.just(6), T=st.integers(1, 90),
    S=st.none() | st.integers(0, 150), D=st.integers(1, 80), Dv=st.none() | st.integers(1, 80), P=st.integers(0, 70),
    N=st.none() | st.integers(1, 4), lengths=st.booleans(), heads_last=st.booleans(), is_causal=st.booleans(),
    dtype=st.sampled_from(DTYPES), prefix_dtype=st.none() | st.just(torch.float32),
    gain=st.sampled_from([1.0, 8.0]), mask=st.none() | st.sampled_from(["padding", "bool", "additive", "heads"]),
    index=st.just(True), sliding_window=st.none() | st.integers(1, 100), softcap=st.none() | st.floats(1, 50),
    sinks=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip


@settings(
    max_examples=examples(150),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(problem=problems)
def test_anything(problem: Problem) -> None:
    check(problem, slack=4.0)


packed = st.builds(
    Problem,
    Hkv=st.integers(1, 2), H=st.just(4), D=st.sampled_from([16, 64]), P=st.integers(0, 40), N=st.integers(1, 3),
    lengths=st.booleans(), index=st.just(True), packed=st.lists(st.integers(0, 70), min_size=1, max_size=6).map(tuple),
    is_causal=st.booleans(), sliding_window=st.none() | st.integers(1, 50), sinks=st.booleans(),
    mask=st.none() | st.sampled_from(["padding", "bool"]), seed=st.integers(0, 1000),
)  # fmt: skip


@settings(
    max_examples=examples(50),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(problem=packed)
def test_anything_packed(problem: Problem) -> None:
    check(problem)
