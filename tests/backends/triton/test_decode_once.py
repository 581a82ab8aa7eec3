"""Decode in one launch: who does what, in whichever order programs end, against the float64 reference.

In Triton's interpreter, which runs programs one after the other, from the first to the last or the other way round.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import prefixcore
from prefixcore.backends.problem import AttentionProblem
from prefixcore.backends.triton import use_path
from prefixcore.ops.reference import prefix_attention_reference
from tests.backends.triton import stand_in
from tests.device import triton_backend
from tests.ops.problems import TOLERANCE, Problem, relative_error

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="its tensors are on the CPU, and a GPU is under test")

if INTERPRETED:
    from triton.runtime.interpreter import interpreter_builder

    from prefixcore.backends.triton.kernels import counters, decode_once, decode_schedule, launch


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles and splits, so that small problems have several; scratch is full of NaN."""

    def poisoned(*sizes: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return like.new_full(sizes, torch.nan, dtype=dtype)

    monkeypatch.setattr(launch, "blocks_for", lambda kernel, p: launch.Blocks(32, 16, 4, 1))
    monkeypatch.setattr(launch, "PROGRAMS", 1000)
    monkeypatch.setattr(launch, "empty", poisoned)
    monkeypatch.setattr(decode_schedule, "KEYS_PER_SPLIT", 32)
    monkeypatch.setattr(decode_schedule, "SHARED_KEYS", 16)
    monkeypatch.setattr(counters, "_rooms", {})


def turn_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs run from the last to the first: those that share a prefix end last, and merge."""
    real = type(interpreter_builder).create_get_program_id

    def reversed_id(builder: Any, axis: int) -> Any:
        number = real(builder, axis)
        number.data = builder.grid_dim[axis] - 1 - number.data
        return number

    monkeypatch.setattr(type(interpreter_builder), "create_get_program_id", reversed_id)


@pytest.fixture(params=["first to last", "last to first"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "last to first":
        turn_round(monkeypatch)
    return request.param


def decoded(p: AttentionProblem) -> tuple[Tensor, Tensor]:
    out = torch.full((p.batch, p.heads, p.queries, p.value_dim), torch.nan, dtype=p.query.dtype)
    lse = torch.full((p.batch, p.heads, p.queries), torch.nan)
    decode_once.launch_decode_once(p, out, lse)
    for room in counters._rooms.values():
        assert all(not x.any() for x in room.of_streams.values()), "a counter was not put back to zero"
    return out, lse


def check(p: AttentionProblem) -> None:
    wide = (x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in p)
    want, want_lse = prefix_attention_reference(AttentionProblem(*wide))
    out, lse = decoded(p)
    assert relative_error(out, want) < TOLERANCE[p.query.dtype] * (1 if p.query.dtype == torch.float32 else 2)
    assert relative_error(lse, want_lse) < TOLERANCE[p.query.dtype]


BASE = Problem(B=3, H=2, Hkv=1, T=1, S=36, P=34, D=16, heads_last=True)
SHARED: dict[str, dict[str, Any]] = {
    "shared": {},
    "one split each": {"P": 17, "S": 12},
    "no keys of its own": {"S": 0},
    "few queries": {"T": 3, "H": 4, "Hkv": 2},
    "owners that do not fill a tile": {"B": 5, "H": 9, "Hkv": 3, "S": 9},
    "several tiles of owners": {"B": 9, "H": 7, "Hkv": 1, "S": 9},
    "window": {"sliding_window": 9, "T": 2},
    "window, softcap, sinks": {"sliding_window": 20, "softcap": 3.0, "sinks": True, "gain": 3.0},
    "padding": {"mask": "padding", "B": 4},
    "mask, sinks": {"mask": "additive", "sinks": True, "T": 2},
    "mask a head": {"mask": "heads"},
    "lengths": {"lengths": True},
    "bank": {"B": 8, "N": 2, "index": True, "lengths": True, "S": 9},
    "rows without a prefix": {"B": 8, "index": True, "S": 9},
    "head of 80, value of 96": {"D": 80, "Dv": 96},
    "bidirectional": {"is_causal": False, "T": 2},
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "short prefix": {"P": 9},
    "two owners a row": {"B": 2, "H": 8, "Hkv": 1, "T": 5, "S": 23},
    "one row": {"B": 1, "P": 63},
    "large bank": {"N": 5, "index": True, "lengths": True},
    "no prefix": {"P": 0, "S": 70},
    "the prefix ends inside a split": {"B": 1, "P": 45, "S": 61, "T": 2},
    "one split, window": {"B": 1, "P": 3, "S": 30, "sliding_window": 5, "sinks": True},
}  # fmt: skip


BOTH_WAYS = ("shared", "bank", "rows without a prefix", "window, softcap, sinks", "the prefix ends inside a split")


@pytest.mark.parametrize(
    ("case", "turned"), [*((case, True) for case in (*SHARED, *OWN)), *((case, False) for case in BOTH_WAYS)]
)
def test_against_the_reference(monkeypatch: pytest.MonkeyPatch, case: str, turned: bool) -> None:
    if turned:
        turn_round(monkeypatch)
    p = Problem(**{**vars(BASE), **(SHARED | OWN)[case]}).record()
    work, _, shared_m = decode_schedule.shared_out(p, launch.blocks_for("", p))
    assert (work.shared > 0) == (shared_m > 0) == (case in SHARED)
    check(p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precisions(dtype: torch.dtype) -> None:
    check(Problem(**{**vars(BASE), "dtype": dtype}).record())


@pytest.mark.parametrize("D", [64, 96, 128, 256])
def test_head_dims(D: int) -> None:
    check(Problem(**{**vars(BASE), "D": D, "B": 2}).record())


def test_an_index_out_of_range_does_not_upset_the_count(order: str) -> None:
    """How many programs arrive at a counter depends on shapes alone: what is left for the next launch is zeros."""
    p = Problem(**{**vars(BASE), "B": 8, "N": 2, "index": True, "S": 9}).record()
    wild = p._replace(prefix_index=torch.tensor([7, -9, 2**40, *p.prefix_index[3:].tolist()]))
    tame = p._replace(prefix_index=torch.tensor([1, -1, 1, *p.prefix_index[3:].tolist()]))
    for x, y in zip(decoded(wild), decoded(tame), strict=True):
        assert torch.equal(x, y)


def test_the_order_in_which_programs_end_does_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    p = Problem(**{**vars(BASE), "B": 5, "P": 70, "S": 70}).record()
    forwards = decoded(p)
    real = type(interpreter_builder).create_get_program_id
    seen: list[Callable[..., Any]] = []

    def shuffled_id(builder: Any, axis: int) -> Any:
        number = real(builder, axis)
        count = builder.grid_dim[axis]
        number.data = (number.data * 7 + 3) % count if count % 7 else count - 1 - number.data
        seen.append(number)
        return number

    monkeypatch.setattr(type(interpreter_builder), "create_get_program_id", shuffled_id)
    for x, y in zip(decoded(p), forwards, strict=True):
        assert torch.equal(x, y)
    assert seen


def test_one_launch_whatever_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    real = launch.launch

    def watched(kernel: Any, *arguments: Any, **named: Any) -> None:
        launched.append(kernel.__name__)
        real(kernel, *arguments, **named)

    monkeypatch.setattr(launch, "launch", watched)
    for case in ({}, {"P": 9, "S": 9}, {"N": 5, "index": True}, {"S": 0, "P": 0}):
        decoded(Problem(**{**vars(BASE), **case}).record())
    assert len(launched) == 4


def test_a_stream_has_counters_of_its_own_and_a_capture_some_that_nobody_else_gets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, which is told here where it is."""
    now = {"stream": 1, "capturing": False}

    class OnGpu:
        device, is_cuda = torch.device("cpu"), True

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("S", (), {"cuda_stream": now["stream"]}))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now["capturing"])
    monkeypatch.setattr(counters, "CAPTURED", 100)

    def given(count: int, **changes: Any) -> Tensor:
        now.update(changes)
        x = counters.zeroed_counters(OnGpu(), count)  # type: ignore[arg-type]
        assert x.numel() >= count
        assert x.dtype == torch.int32
        assert not x.any()
        return x

    first_capture = given(60, capturing=True)  # before anything has run: its own, set to zero in the graph
    one = given(50, capturing=False)
    room = counters._rooms[torch.device("cpu")]
    room.for_captures = torch.zeros(100, dtype=torch.int32)
    assert given(50) is one
    two = given(50, stream=2)
    larger = given(10_000)
    assert larger is given(50)
    captured = [given(60, capturing=True), given(40), given(1)]  # the room is full, so the last is on its own
    assert captured[0].untyped_storage().data_ptr() == captured[1].untyped_storage().data_ptr()
    spans = [(x.data_ptr(), x.data_ptr() + 4 * x.numel()) for x in (first_capture, one, two, larger, *captured)]
    for a in spans:
        for b in spans:
            assert a is b or a[1] <= b[0] or b[1] <= a[0]


def test_packed_sequences_are_refused() -> None:
    p = Problem(packed=(3, 2)).record()
    with pytest.raises(ValueError, match="use forward"):
        decode_once.launch_decode_once(p, torch.empty(1, 4, 5, 32), torch.empty(1, 4, 5))


def test_a_replay_is_given_counters_of_its_stream_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan keeps no counters: it asks for them at each replay, for the stream that it is replayed on."""
    monkeypatch.undo()  # memory as it comes: a plan has to see it allocated
    for name, value in (("KEYS_PER_SPLIT", 32), ("SHARED_KEYS", 16)):
        monkeypatch.setattr(decode_schedule, name, value)
    asked: list[int] = []
    real = decode_once.zeroed_counters

    def watched(on: Tensor, count: int) -> Tensor:
        asked.append(count)
        return real(on, count)

    monkeypatch.setattr(decode_once, "zeroed_counters", watched)
    problem = Problem(**{**vars(BASE), "B": 2, "H": 1, "P": 70, "S": 70})
    with triton_backend(), stand_in.replaying() as heard, use_path("decode_once"), torch.no_grad():
        for seed in range(3):
            tensors, options = Problem(**{**vars(problem), "seed": seed}).tensors()
            got = prefixcore.prefix_attention(**tensors, **options)
            with prefixcore.use_backend("reference"):
                assert relative_error(got, prefixcore.prefix_attention(**tensors, **options)) < 1e-5
        assert len(heard.launches) == 2
    assert len(asked) == 3
