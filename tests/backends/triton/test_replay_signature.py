"""A plan is never used for a call that differs, and the number of plans is bounded, whatever threads and forks do.

Where there is no GPU, `stand_in` takes the driver's place and Triton's interpreter runs what is launched.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import prefixcore
from prefixcore.backends import gradients, library
from prefixcore.backends.problem import attention_problem
from prefixcore.backends.triton import recording, replay, use_path
from tests.backends.triton import stand_in
from tests.backends.triton.replaying import LEAST, WITHOUT_GPU, count, small_tensors

pytestmark = WITHOUT_GPU


def _shifted(x: Tensor) -> Tensor:
    """The same numbers and strides, four bytes further on: no multiple of 16."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    return room[1:].view(x.shape).copy_(x)


CHANGES: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "a shape": lambda t: t | small_tensors(T=6),
    "a batch": lambda t: t | small_tensors(B=3),
    "virtual tokens": lambda t: t | small_tensors(P=4),
    "strides": lambda t: t | small_tensors(heads_last=True),
    "alignment": lambda t: t | {"query": _shifted(t["query"])},
    "dtype": lambda t: {name: x.half() for name, x in t.items()},
    "the prefix's dtype": lambda t: t | {name: x.half() for name, x in t.items() if not name.startswith("prefix")},
    "causal": lambda t: t | {"is_causal": False},
    "scale": lambda t: t | {"scale": 0.5},
    "window": lambda t: t | {"sliding_window": 3},
    "softcap": lambda t: t | {"softcap": 5.0},
    "a bank": lambda t: t | {name: x[None] for name, x in t.items() if name.startswith("prefix")},
    "lengths": lambda t: t | {"prefix_lengths": torch.tensor([2])},
    "lengths in int32": lambda t: t | {"prefix_lengths": torch.tensor([2], dtype=torch.int32)},
    "an index": lambda t: t | {"prefix_index": torch.tensor([0, -1])},
    "sinks": lambda t: t | {"sinks": torch.zeros(2)},
    "padding": lambda t: t | {"attn_mask": torch.ones(2, 5, dtype=torch.bool)},
    "a mask": lambda t: t | {"attn_mask": torch.ones(1, 1, 5, 5, dtype=torch.bool)},
    "packed": lambda t: t | small_tensors(packed=(2, 3)) | {"cu_seqlens": torch.tensor([0, 2, 5])},
}


def test_whatever_differs_has_a_plan_of_its_own(plans: stand_in.Interpreted, nothing_computed: None) -> None:
    base = small_tensors()
    prefixcore.prefix_attention(**base)
    for number, (what, change) in enumerate(CHANGES.items()):
        prefixcore.prefix_attention(**change(base))
        assert count() == number + 2, what
    before = len(plans.launches)
    assert before == 0
    for change in CHANGES.values():
        prefixcore.prefix_attention(**change(base))
    assert count() == len(CHANGES) + 1
    assert len(plans.launches) >= len(CHANGES)
    assert replay.not_kept() == []


def test_which_gradients_are_wanted_is_part_of_it(plans: stand_in.Interpreted, nothing_computed: None) -> None:
    p = attention_problem(**small_tensors())
    out, lse = torch.ops.prefixcore.prefix_attention(*p)
    known = count()
    for needs in ((True, True, True), (True, False, True), (False, False, True), (False, True, False)):
        torch.ops.prefixcore.prefix_attention_backward(torch.ones_like(out), None, out, lse, *p, *needs)
        known += 1
        assert count() == known
    torch.ops.prefixcore.prefix_attention_backward(torch.ones_like(out), lse, out, lse, *p, True, True, True)
    assert count() == known + 1, "a gradient of the log-sum-exp"


@pytest.mark.parametrize("switch", ["path", "deterministic", "flash", "cudnn", "named"])
def test_switches_are_part_of_it(
    plans: stand_in.Interpreted, nothing_computed: None, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    tensors = small_tensors()

    def call() -> None:
        prefixcore.prefix_attention(**tensors)

    named = ["off"]
    monkeypatch.setattr(recording, "_state", dict(recording._state))
    monkeypatch.setattr(recording, "_readers", recording._readers)
    recording.depends_on("a switch of the test's", lambda: named[0])
    call()
    if switch == "path":
        with use_path("single"):
            call()
    elif switch == "deterministic":
        torch.use_deterministic_algorithms(True)
        try:
            call()
        finally:
            torch.use_deterministic_algorithms(False)
    elif switch == "named":
        named[0] = "on"
        call()
        named[0] = "off"
    else:
        enable = getattr(torch.backends.cuda, f"enable_{switch}_sdp")
        enable(False)
        try:
            call()
        finally:
            enable(True)
    assert count() == 2
    assert not plans.launches
    call()
    assert count() == 2
    assert plans.launches


def test_the_number_is_bounded_and_the_longest_unused_goes(plans: stand_in.Interpreted, nothing_computed: None) -> None:
    host, limit = library.host(), replay.limit()
    assert limit == 512
    host.plans_set_limit(2)
    try:
        for T in (3, 4):
            prefixcore.prefix_attention(**small_tensors(T=T))
        prefixcore.prefix_attention(**small_tensors(T=3))  # used again: T = 4 goes
        prefixcore.prefix_attention(**small_tensors(T=5))
        assert ["[2,2,5,16]" in plan.signature for plan in replay.kept()] == [True, False]
        before = len(plans.launches)
        prefixcore.prefix_attention(**small_tensors(T=3))
        assert len(plans.launches) > before
        assert len(replay._plans) == 2, "Python lets go of what the C++ has"
    finally:
        host.plans_set_limit(limit)


def test_threads(plans: stand_in.Interpreted) -> None:
    """Many at once, of some signatures, while plans are made, used and forgotten."""
    problems = [replace(LEAST, H=1, T=1, S=3, P=P, seed=P) for P in (1, 2)]
    with replay.use_replay(False):
        wants = [prefixcore.prefix_attention(**problem.tensors()[0]) for problem in problems]
    lock = threading.Lock()  # the interpreter's state is the process's
    real = stand_in.Interpreted.run
    plans.run = lambda launch: real(plans, launch)  # type: ignore[method-assign]
    errors: list[str] = []

    def work(seed: int) -> None:
        for turn in range(4):
            which = (seed + turn) % len(problems)
            tensors, _ = problems[which].tensors()
            with lock:
                got = prefixcore.prefix_attention(**tensors)
            if not torch.equal(got, wants[which]):
                errors.append(f"thread {seed}, turn {turn}")
            library.host().plans()
            if turn == 2 and seed == 0:
                library.host().plans_forget()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert plans.launches


def test_each_thread_launches_on_its_own_stream(plans: stand_in.Interpreted) -> None:
    tensors = small_tensors(T=1, S=3)
    prefixcore.prefix_attention(**tensors)

    def work(stream: int) -> None:
        stand_in.driver().stand_in_set_stream(stream)
        prefixcore.prefix_attention(**tensors)

    for stream in (5, 9):
        thread = threading.Thread(target=work, args=(stream,))
        thread.start()
        thread.join()
    assert {launch.stream for launch in plans.launches} == {5, 9}


def test_the_child_of_a_fork_begins_with_none(plans: stand_in.Interpreted) -> None:
    prefixcore.prefix_attention(**small_tensors(T=1, S=3))
    assert count() == 1
    child = os.fork()
    if child == 0:
        os._exit(0 if library.host().plans() == [] and replay.kept() == [] and replay._plans == {} else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert count() == 1


def test_it_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in.replaying() as heard:
        for word, on in (("", replay.BY_DEFAULT), ("0", False), ("1", True)):
            monkeypatch.setenv(replay.SWITCH, word)
            replay._turn(None)
            assert replay.is_on() is on
            assert (gradients.shortcut is not None) is on
        monkeypatch.setenv(replay.SWITCH, "yes")
        replay._turn(None)
        with pytest.raises(ValueError, match="PREFIXCORE_REPLAY: expected 0 or 1, got 'yes'"):
            replay.is_on()
        with replay.use_replay(False):
            for _ in range(2):
                prefixcore.prefix_attention(**small_tensors(T=1, S=3))
        assert heard.launches == []
        assert count() == 0
    assert replay.BY_DEFAULT is False, "until a GPU has run the tests with it"
