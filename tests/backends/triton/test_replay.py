"""Plans: what is replayed is what the ordinary way does, values and all, and never for a call that differs.

Where there is no GPU, `stand_in` takes the driver's place and Triton's interpreter runs what is launched.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import prefixcore
from prefixcore.backends import gradients, library, triton
from prefixcore.backends.problem import attention_problem
from prefixcore.backends.triton import recording, replay, replay_check, use_path
from prefixcore.backends.triton.plan_words import Memory
from prefixcore.cli import doctor
from tests.backends.triton import stand_in
from tests.device import DEVICE, triton_backend
from tests.ops.problems import Problem, check, run

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="test_replay_on_device.py runs where there is a GPU")

SMALL = Problem(B=2, H=2, Hkv=1, T=5, P=3, D=16)
LEAST = replace(SMALL, B=1, T=3, P=2)


@pytest.fixture(scope="module", autouse=True)
def backend() -> Iterator[None]:
    with triton_backend():
        yield


def count() -> int:
    return len(replay.kept())


# --- what is replayed ------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "odd, head of 20, value of 7": {"D": 20, "Dv": 7, "P": 1, "H": 3},
    "more keys, window, sinks": {"S": 7, "sliding_window": 4, "sinks": True},
    "bank of lengths": {"N": 2, "index": True, "lengths": True, "B": 2},
    "packed, bank": {"packed": (3, 0, 2), "N": 2, "index": True},
    "padding": {"mask": "padding", "heads_last": True},
    "additive mask, softcap, scale": {"mask": "additive", "softcap": 3.0, "scale": 0.7},
    "bool mask, bidirectional": {"mask": "bool", "is_causal": False},
    "no prefix": {"P": 0},
    "no query": {"T": 0, "S": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_a_replay_gives_the_same_bits_as_the_ordinary_way(plans: stand_in.Interpreted, case: str) -> None:
    problem = replace(LEAST, **CASES[case])
    with replay.use_replay(False):
        want = run(problem)
    recorded = run(problem)
    assert not plans.launches, "the first call goes the ordinary way"
    assert replay.not_kept() == []
    got = run(problem)
    assert plans.launches or problem.T == 0
    for name, expected in want.items():
        for found in (recorded[name], got[name]):
            assert torch.equal(found, expected), name
            assert found.stride() == expected.stride(), name
    assert [plan.replays for plan in replay.kept()] == [1, 1]


@pytest.mark.parametrize("path", ["merged", "decode", "single"])
def test_every_path_is_replayed_with_new_values(plans: stand_in.Interpreted, path: str) -> None:
    def attention(**arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = prefixcore.prefix_attention(**arguments)
        return out, lse.detach()

    with use_path(path):
        for seed in range(3):  # other numbers each time, at other addresses
            check(replace(LEAST, seed=seed), attention=attention)
    assert [plan.replays for plan in replay.kept()] == [2, 2]


def test_the_soft_embedding_is_replayed(plans: stand_in.Interpreted) -> None:
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        weight, virtual = torch.randn(11, 20, generator=g), torch.randn(3, 20, generator=g).requires_grad_()
        ids = torch.randint(0, 14, (2, 9), generator=g)
        out = prefixcore.soft_embedding(ids, weight, virtual)
        (grad,) = torch.autograd.grad(out.square().sum(), virtual)
        with prefixcore.use_backend("reference"):
            want = prefixcore.soft_embedding(ids, weight, virtual)
            (want_grad,) = torch.autograd.grad(want.square().sum(), virtual)
        assert torch.equal(out, want)
        torch.testing.assert_close(grad, want_grad)
    replays = {plan.op: plan.replays for plan in replay.kept()}
    assert replays == {"soft_embedding": 2, "soft_embedding_backward": 2}


def test_a_tensor_given_twice_and_memory_shared_are_no_part_of_a_signature(plans: stand_in.Interpreted) -> None:
    """Keys that are values, or parts of one tensor, as a fused projection gives them: later ones need not be."""
    x = torch.randn(2, 2, 5, 16)
    prefix = torch.randn(2, 3, 16)
    prefixcore.prefix_attention(x, x, x, prefix, prefix)
    tensors, _ = replace(SMALL, Hkv=2).tensors()
    got = prefixcore.prefix_attention(**tensors)
    assert plans.launches
    with prefixcore.use_backend("reference"):
        torch.testing.assert_close(got, prefixcore.prefix_attention(**tensors))

    fused = torch.randn(2, 2, 5, 48)
    parts = fused.split(16, -1)
    prefixcore.prefix_attention(*parts, prefix, prefix)
    apart = [torch.randn(2, 2, 5, 48)[..., 16:32] for _ in range(3)]
    before = len(plans.launches)
    got = prefixcore.prefix_attention(*apart, prefix, prefix)
    assert len(plans.launches) > before
    with prefixcore.use_backend("reference"):
        torch.testing.assert_close(got, prefixcore.prefix_attention(*apart, prefix, prefix))


def test_many_gradients_at_once_are_replayed_one_by_one(plans: stand_in.Interpreted) -> None:
    """`vmap` has a batch of them for one tensor: none of the op's own business, and no tensor that a plan is for."""
    leaves = {name: x.requires_grad_() for name, x in replace(LEAST, H=1, T=1, S=2).tensors()[0].items()}
    for _ in range(2):
        out = prefixcore.prefix_attention(**leaves)
        grads = torch.stack([torch.ones_like(out), 2 * torch.ones_like(out)])
        once, twice = torch.autograd.grad(out, leaves["query"], grads, is_grads_batched=True)[0]
        assert once.norm() > 0
        torch.testing.assert_close(twice, 2 * once)
    assert plans.launches


def test_who_looks_on_sees_the_op_itself(plans: stand_in.Interpreted) -> None:
    """Dispatch modes, and tensors with a dispatch of their own, are never handed an op that they do not know."""

    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(func.name())
            return func(*args, **kwargs or {})

    tensors = _tensors(T=1, S=2)
    for _ in range(2):
        prefixcore.prefix_attention(**tensors)
    with Seen() as seen:
        prefixcore.prefix_attention(**tensors)
    assert seen.names == ["prefixcore::prefix_attention"]
    assert [plan.replays for plan in replay.kept()] == [2]


# --- what a plan depends on ------------------------------------------------------------------------------


def _tensors(**changes: Any) -> dict[str, Tensor]:
    return replace(SMALL, **changes).tensors()[0]


def _shifted(x: Tensor) -> Tensor:
    """The same numbers and strides, four bytes further on: no multiple of 16."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    return room[1:].view(x.shape).copy_(x)


CHANGES: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "a shape": lambda t: t | _tensors(T=6),
    "a batch": lambda t: t | _tensors(B=3),
    "virtual tokens": lambda t: t | _tensors(P=4),
    "strides": lambda t: t | _tensors(heads_last=True),
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
    "packed": lambda t: t | _tensors(packed=(2, 3)) | {"cu_seqlens": torch.tensor([0, 2, 5])},
}


def test_whatever_differs_has_a_plan_of_its_own(plans: stand_in.Interpreted, nothing_computed: None) -> None:
    base = _tensors()
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
    p = attention_problem(**_tensors())
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
    tensors = _tensors()

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


# --- what is not kept ------------------------------------------------------------------------------------


def _run_recorded(path: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    def as_embedding_backward(grad: Tensor, ids: Tensor, vocabulary: int, num_virtual: int) -> Tensor:
        return path(grad)

    result: Tensor = replay.run("soft_embedding_backward", as_embedding_backward, (x, torch.zeros(1).long(), 1, 1))
    return result


KEPT_ELSEWHERE = torch.ones(3)

NOT_KEPT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "looks at a value": (lambda x: x + x.sum().item(), "aten::_local_scalar_dense looks at what is in a tensor"),
    "uses another tensor": (lambda x: x + KEPT_ELSEWHERE, "neither an argument nor made by the call"),
    "returns an argument": (lambda x: x, "it returns an argument"),
}


@pytest.mark.parametrize("case", NOT_KEPT)
def test_what_cannot_be_replayed_runs_and_is_not_kept_and_says_why(plans: stand_in.Interpreted, case: str) -> None:
    path, why = NOT_KEPT[case]
    for value in (1.0, 2.0, 3.0):
        x = torch.full((3,), value)
        assert torch.equal(_run_recorded(path, x), path(x))
    assert count() == 0
    ((op, reason, times),) = replay.not_kept()
    assert (op, times) == ("soft_embedding_backward", 1), "it is recorded once, and from then on goes the ordinary way"
    assert why in reason


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "a tensor made of nothing": lambda x: x + torch.arange(3),
    "strides looked at on the meta device": lambda x: x * torch.empty_like(x, device="meta").stride(0),
    "in place": lambda x: x.clone().mul_(3).add_(x),
    "views": lambda x: torch.stack([x[:2], x[1:]]).t().contiguous()[0] + x.view(1, 3).expand(2, 3)[1, 2],
}


@pytest.mark.parametrize("case", KEPT)
def test_whatever_a_path_does_with_pytorch_is_replayed(plans: stand_in.Interpreted, case: str) -> None:
    for value in (1.0, 2.0, 3.0):
        x = torch.arange(3.0) + value
        assert torch.equal(_run_recorded(KEPT[case], x), KEPT[case](x))
    assert [plan.replays for plan in replay.kept()] == [2], replay.not_kept()


def test_calls_of_a_vendor_are_made_again(plans: stand_in.Interpreted) -> None:
    seen: list[tuple[Any, ...]] = []

    def vendor(parts: list[Tensor], factor: float, *, out: Tensor) -> tuple[Tensor, None, int]:
        seen.append((len(parts), factor))
        torch.add(parts[0], parts[1], alpha=factor, out=out)
        return out * 2, None, 7

    def path(x: Tensor) -> Tensor:
        room = recording.empty(3, like=x)
        doubled, none, seven = recording.call(vendor, [x[:3], x[3:]], 3.0, out=room)
        assert none is None
        assert seven == 7
        return torch.stack([room, doubled])

    for value in (1.0, 2.0, 3.0):
        x = torch.arange(6.0) * value
        assert torch.equal(_run_recorded(path, x), torch.stack([x[:3] + 3 * x[3:], 2 * (x[:3] + 3 * x[3:])]))
    assert seen == [(2, 3.0)] * 3
    assert count() == 1


def test_what_is_recorded_is_freed_as_ever(plans: stand_in.Interpreted) -> None:
    """A first call needs no more memory than any other."""
    scratch: list[weakref.ref[Tensor]] = []

    def path(x: Tensor) -> Tensor:
        room = recording.empty(5, like=x)
        scratch.append(weakref.ref(room))
        total = room.copy_(x[:5]).sum(0, keepdim=True)
        del room
        assert scratch[-1]() is None
        return total + x

    for value in (1.0, 2.0, 3.0):
        x = torch.full((6,), value)
        assert torch.equal(_run_recorded(path, x), 5 * value + x)
    ((_, _, steps, replays),) = replay.kept()
    assert (steps, replays) == ("aten::copy_, aten::sum, aten::add", 2)
    (known,) = replay._plans.values()
    assert [type(step).__name__ for step in known.plan.steps].count("Release") == 2


def test_a_replay_that_fails_goes_the_ordinary_way_and_says_so(
    plans: stand_in.Interpreted, capfd: pytest.CaptureFixture[str]
) -> None:
    working = [True]

    def path(x: Tensor) -> Tensor:
        def vendor(x: Tensor) -> Tensor:
            if not working[0]:
                raise RuntimeError("out of memory, say")
            return x + 1

        return recording.call(vendor, x)

    _run_recorded(path, torch.zeros(3))
    working[0] = False
    with pytest.raises(RuntimeError, match="out of memory, say"):  # its own words, from the ordinary way
        _run_recorded(path, torch.zeros(3))
    working[0] = True
    assert torch.equal(_run_recorded(path, torch.zeros(3)), torch.ones(3))
    assert [plan.replays for plan in replay.kept()] == [1], "it was short of memory, and is not any more"
    working[0] = False
    for _ in range(3):
        with pytest.raises(RuntimeError, match="out of memory, say"):
            _run_recorded(path, torch.zeros(3))
    working[0] = True
    assert torch.equal(_run_recorded(path, torch.zeros(3)), torch.ones(3))
    assert [has_plan for _, _, has_plan in library.host().plans()] == [False], "nobody tries for ever"
    assert any("its replay failed" in why for _, why, _ in replay.not_kept())
    capfd.readouterr()


def test_what_the_ordinary_way_refuses_is_refused_all_the_same(plans: stand_in.Interpreted) -> None:
    tensors = _tensors()
    prefixcore.prefix_attention(**tensors)
    tensors["key"].untyped_storage().resize_(8)  # as FSDP leaves what it has sharded
    with pytest.raises(ValueError, match="its storage was freed or shrunk"):
        prefixcore.prefix_attention(**tensors)
    assert not plans.launches


# --- keeping ---------------------------------------------------------------------------------------------


def test_the_number_is_bounded_and_the_longest_unused_goes(plans: stand_in.Interpreted, nothing_computed: None) -> None:
    host, limit = library.host(), replay.limit()
    assert limit == 512
    host.plans_set_limit(2)
    try:
        for T in (3, 4):
            prefixcore.prefix_attention(**_tensors(T=T))
        prefixcore.prefix_attention(**_tensors(T=3))  # used again: T = 4 goes
        prefixcore.prefix_attention(**_tensors(T=5))
        assert ["[2,2,5,16]" in plan.signature for plan in replay.kept()] == [True, False]
        before = len(plans.launches)
        prefixcore.prefix_attention(**_tensors(T=3))
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
    tensors = _tensors(T=1, S=3)
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
    prefixcore.prefix_attention(**_tensors(T=1, S=3))
    assert count() == 1
    child = os.fork()
    if child == 0:
        os._exit(0 if library.host().plans() == [] and replay.kept() == [] and replay._plans == {} else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert count() == 1


# --- the switch ------------------------------------------------------------------------------------------


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
                prefixcore.prefix_attention(**_tensors(T=1, S=3))
        assert heard.launches == []
        assert count() == 0
    assert replay.BY_DEFAULT is False, "until a GPU has run the tests with it"


# --- what it costs ---------------------------------------------------------------------------------------


class Calls:
    """Counts the Python functions, and those of C that Python calls, that a thread goes through."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.python = self.c = 0
        work()
        sys.setprofile(self._count)
        try:
            work()
        finally:
            sys.setprofile(None)

    def _count(self, frame: Any, event: str, what: Any) -> None:
        self.python += event == "call"
        self.c += event == "c_call"


def test_a_replay_costs_few_calls(plans: stand_in.Interpreted, nothing_computed: None) -> None:
    """A count, and no clock: each of these calls is a tenth of a microsecond, or a few."""
    tensors = _tensors()
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    grad = torch.ones(2, 2, 5, 16)

    def forward() -> object:
        return prefixcore.prefix_attention(**tensors)

    def both() -> object:
        return torch.autograd.grad(prefixcore.prefix_attention(**leaves), list(leaves.values()), grad)

    counted = {}
    for name, work in (("forward", forward), ("both", both)):
        work()
        stand_in.driver().stand_in_on_launch(None)  # of which nothing is counted
        with replay.use_replay(False):
            ordinary = Calls(work)
        replayed = Calls(work)
        counted[name] = (replayed.python, replayed.c)
        assert replayed.python + replayed.c < (ordinary.python + ordinary.c) / 5, (vars(replayed), vars(ordinary))
    assert sum(counted["forward"]) <= CEILING["forward"], counted
    assert sum(counted["both"]) <= CEILING["both"], counted


CEILING = {"forward": 75, "both": 190}


def test_a_replay_allocates_what_the_ordinary_way_does(plans: stand_in.Interpreted, nothing_computed: None) -> None:
    """And frees it as early: scratch is gone before the next is needed."""
    tensors = _tensors()
    for path, forward in (("single", 2), ("decode", 4)):
        with use_path(path):
            prefixcore.prefix_attention(**tensors)
        steps = next(iter(reversed(replay._plans.values()))).plan.steps
        assert sum(isinstance(step, Memory) for step in steps) == forward, path


# --- what a person sees ----------------------------------------------------------------------------------


def test_doctor_tries_it_and_lists_what_is_kept(
    plans: stand_in.Interpreted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it looks where a GPU is: the CPU stands for it."""
    monkeypatch.setattr(replay_check, "_PROBLEMS", {"decoding": (1, 3)})
    monkeypatch.setattr(triton, "refuses", lambda op, device, dtype: None)
    monkeypatch.setattr(doctor, "gpu_paths", list)
    monkeypatch.setattr(torch, "device", lambda name: DEVICE)
    _run_recorded(NOT_KEPT["looks at a value"][0], torch.ones(3))
    assert doctor.run(argparse.Namespace()) == 0
    out = capsys.readouterr().out
    for line in (
        r"replay of GPU calls +on; PREFIXCORE_REPLAY=0 turns it off",
        r"  decoding +the same bits as the ordinary way \(2 replays\)",
        r"  plans kept +2 of at most 512, replayed 2 times",
        r"prefix_attention +\[2,4,1,64\] float32 .* decode_kernel, decode_kernel, merge_kernel +1",
        r"soft_embedding_backward +aten::_local_scalar_dense looks at what is in a tensor +1",
    ):
        assert re.search(line, out), (line, out)


def test_doctor_sees_a_replay_that_is_wrong(plans: stand_in.Interpreted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_check, "_PROBLEMS", {"decoding": (1, 3)})
    monkeypatch.setattr(plans, "run", lambda launch: None)  # launches that do nothing
    with stand_in.on_launch(lambda launch: None, plans.count):
        ((_, said),) = replay_check.tried(DEVICE, torch.float32)
    assert said.startswith("differs from the ordinary way")
