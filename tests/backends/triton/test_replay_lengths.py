"""Plans of calls that decode: one for all lengths of a bucket, and what it replays is what the ordinary way does there.

Where there is no GPU, `stand_in` takes the driver's place and Triton's interpreter runs what is launched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import prefixcore
from prefixcore.backends import library
from prefixcore.backends.triton import replay, use_path
from prefixcore.backends.triton.kernels.launch import length_bucket
from prefixcore.backends.triton.plan_words import Call, Kernel, Measure
from tests.backends.triton import stand_in
from tests.device import DEVICE, triton_backend
from tests.ops.problems import Problem

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="a stand-in for a GPU, where there is one")

DECODING = Problem(B=2, H=2, Hkv=1, T=1, S=9, P=3, D=16)
PATHS = ("decode", "decode_once")


@pytest.fixture(scope="module", autouse=True)
def backend() -> Iterator[None]:
    with triton_backend():
        yield


def attention(problem: Problem) -> tuple[Tensor, ...]:
    tensors, options = problem.tensors()
    out: tuple[Tensor, ...] = prefixcore.prefix_attention(**tensors, **options, return_lse=True)
    return out


def replays() -> list[int]:
    return [plan.replays for plan in replay.kept()]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "some queries, bank": {"T": 3, "N": 2, "index": True, "lengths": True},
    "window, sinks": {"sliding_window": 5, "sinks": True},
    "padding, heads last": {"mask": "padding", "heads_last": True},
    "additive mask": {"mask": "additive", "T": 2},
    "bool mask, softcap": {"mask": "bool", "softcap": 3.0},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES)
def test_one_plan_for_all_lengths_of_a_bucket(plans: stand_in.Interpreted, case: str, path: str) -> None:
    with use_path(path):
        for turn, length in enumerate((9, 23, 11, 62)):
            problem = replace(DECODING, **CASES[case], S=length, seed=turn)
            with replay.use_replay(False):
                want = attention(problem)
            got = attention(problem)
            for found, expected in zip(got, want, strict=True):
                assert torch.equal(found, expected), length
                assert found.stride() == expected.stride()
    assert replays() == [3], replay.kept()
    assert replay.kept()[0].signature.endswith("and other lengths")


@pytest.mark.parametrize("path", PATHS)
def test_a_growing_cache(plans: stand_in.Interpreted, nothing_computed: None, path: str) -> None:
    """Each token makes it longer. A bucket has two plans: one for lengths that are multiples of 16."""
    with use_path(path):
        for length in range(2, 257):
            attention(replace(DECODING, S=length))
    assert len(replays()) == 2 * 4
    assert sum(replays()) == 255 - 2 * 4


def words(problem: Problem, path: str) -> list[int]:
    """The plan of a call, without the numbers by which the stand-in knows kernels and Python knows calls."""
    replay.forget()
    with use_path(path):
        attention(problem)
    (known,) = replay._plans.values()
    assert known.plan.any_length
    steps: list[Any] = list(known.plan.steps)
    for place, step in enumerate(steps):
        if isinstance(step, Kernel):
            steps[place] = step._replace(function=0)
        elif isinstance(step, Call):
            steps[place] = step._replace(number=0)
    return known.plan._replace(steps=tuple(steps)).words()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "shape", [{}, {"T": 16, "H": 8, "Hkv": 2, "B": 3}, {"P": 300, "B": 8}, {"sliding_window": 700}]
)
def test_nothing_else_in_a_plan_depends_on_the_length(
    plans: stand_in.Interpreted, nothing_computed: None, path: str, shape: dict[str, Any]
) -> None:
    """What is recorded at one length of a bucket is, word for word, what is recorded at any other."""
    for low, high in ((1, 64), (65, 128), (513, 576), (577, 640), (1025, 1152), (8193, 9216)):
        assert {length_bucket(low), length_bucket(high)} == {high}
        lengths = (low + 2, (low + high) // 2 + 1, high - 1)
        found = [words(replace(DECODING, **shape, D=16, S=length), path) for length in lengths]
        hidden = [0 < shape.get("sliding_window", 0) < length for length in lengths]
        for a, one in zip(hidden, found, strict=True):
            for b, other in zip(hidden, found, strict=True):
                assert one == other or a != b, (low, high)


def test_the_bucket_of_the_library_is_that_of_the_kernels() -> None:
    bucket = library.host().length_bucket
    buckets = [length_bucket(keys) for keys in range(70_000)]
    assert buckets == [bucket(keys) for keys in range(70_000)]
    assert buckets == sorted(buckets)
    assert all(0 <= b - keys < max(64, keys / 8 + 1) for keys, b in enumerate(buckets))
    for b in set(buckets):
        assert length_bucket(b) == b


def test_tensors_that_do_not_agree_are_refused_all_the_same(plans: stand_in.Interpreted) -> None:
    """One that has another number of keys than the key is no call of any length."""
    problem = replace(DECODING, mask="padding")
    attention(problem)
    tensors, options = replace(problem, S=11).tensors()
    ok = {**tensors, **options}
    shorter = replace(problem, S=9).tensors()
    for name in ("value", "attn_mask"):
        other = {**shorter[0], **shorter[1]}[name]
        with pytest.raises(ValueError, match=f"{'padding|attn_mask' if name == 'attn_mask' else name}"):
            prefixcore.prefix_attention(**ok | {name: other})
    assert replays() == [0]
    prefixcore.prefix_attention(**ok)
    assert replays() == [1]


def test_sizes_that_happen_to_be_the_length_stay_what_they_are(plans: stand_in.Interpreted) -> None:
    """Two keys, two heads, two rows: a plan for that is none for three of each."""
    for size in (2, 3):
        problem = replace(DECODING, B=size, H=size, Hkv=size, S=size, T=1, seed=size)
        with replay.use_replay(False):
            want = attention(problem)
        attention(problem)
        assert torch.equal(attention(problem)[0], want[0])
    assert replays() == [1, 1]


def test_rows_that_are_copied_have_a_plan_for_each_length(plans: stand_in.Interpreted) -> None:
    for length in (9, 11):
        tensors, options = replace(DECODING, S=length).tensors()
        tensors["key"] = tensors["key"].mT.contiguous().mT
        with replay.use_replay(False):
            want = prefixcore.prefix_attention(**tensors, **options)
        for _ in range(2):
            assert torch.equal(prefixcore.prefix_attention(**tensors, **options), want)
    assert replays() == [1, 1]


def test_packed_rows_and_many_queries_have_one_for_each_length(
    plans: stand_in.Interpreted, nothing_computed: None
) -> None:
    for length in (20, 21):
        attention(replace(DECODING, T=17, S=length))
        attention(replace(DECODING, packed=(length,), S=None))
    assert replays() == [0] * 4
    assert not any(
        isinstance(p, Measure) for known in replay._plans.values() for s in known.plan.steps
        for p in getattr(s, "parameters", ())
    )  # fmt: skip
