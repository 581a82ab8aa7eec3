"""What a path may do to be recorded, and what is said where it cannot be.

Where there is no GPU, `stand_in` takes the driver's place and Triton's interpreter runs what is launched.
"""

from __future__ import annotations

import argparse
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixcore.backends import triton
from prefixcore.backends.triton import recording, replay, replay_check
from prefixcore.cli import doctor
from tests.backends.triton import stand_in
from tests.backends.triton.replaying import NOT_KEPT, WITHOUT_GPU, count, run_recorded
from tests.device import DEVICE

pytestmark = WITHOUT_GPU


@pytest.mark.parametrize("case", NOT_KEPT)
def test_what_cannot_be_replayed_runs_and_is_not_kept_and_says_why(plans: stand_in.Interpreted, case: str) -> None:
    path, why = NOT_KEPT[case]
    for value in (1.0, 2.0, 3.0):
        x = torch.full((3,), value)
        assert torch.equal(run_recorded(path, x), path(x))
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
        assert torch.equal(run_recorded(KEPT[case], x), KEPT[case](x))
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
        assert torch.equal(run_recorded(path, x), torch.stack([x[:3] + 3 * x[3:], 2 * (x[:3] + 3 * x[3:])]))
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
        assert torch.equal(run_recorded(path, x), 5 * value + x)
    ((_, _, steps, replays),) = replay.kept()
    assert (steps, replays) == ("aten::copy_, aten::sum, aten::add", 2)
    (known,) = replay._plans.values()
    assert [type(step).__name__ for step in known.plan.steps].count("Release") == 2


def test_doctor_tries_it_and_lists_what_is_kept(
    plans: stand_in.Interpreted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it looks where a GPU is: the CPU stands for it."""
    monkeypatch.setattr(replay_check, "_PROBLEMS", {"decoding": (1, 3)})
    monkeypatch.setattr(triton, "refuses", lambda op, device, dtype: None)
    monkeypatch.setattr(doctor, "gpu_paths", list)
    monkeypatch.setattr(torch, "device", lambda name: DEVICE)
    run_recorded(NOT_KEPT["looks at a value"][0], torch.ones(3))
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
