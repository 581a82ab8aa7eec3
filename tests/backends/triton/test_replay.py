"""What a plan replays is what the ordinary way does, values and all.

Where there is no GPU, `stand_in` takes the driver's place and Triton's interpreter runs what is launched.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import prefixcore
from prefixcore.backends import library
from prefixcore.backends.triton import PATHS, recording, replay, use_path
from tests.backends.triton import stand_in
from tests.backends.triton.replaying import LEAST, SMALL, WITHOUT_GPU, run_recorded, small_tensors
from tests.ops.problems import check, output_alone, run

pytestmark = WITHOUT_GPU


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


@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_replayed_with_new_values(plans: stand_in.Interpreted, with_flash4: None, path: str) -> None:
    with use_path(path):
        for seed in range(3):  # other numbers each time, at other addresses
            check(replace(LEAST, seed=seed), attention=output_alone)
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

    tensors = small_tensors(T=1, S=2)
    for _ in range(2):
        prefixcore.prefix_attention(**tensors)
    with Seen() as seen:
        prefixcore.prefix_attention(**tensors)
    assert seen.names == ["prefixcore::prefix_attention"]
    assert [plan.replays for plan in replay.kept()] == [2]


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

    run_recorded(path, torch.zeros(3))
    working[0] = False
    with pytest.raises(RuntimeError, match="out of memory, say"):  # its own words, from the ordinary way
        run_recorded(path, torch.zeros(3))
    working[0] = True
    assert torch.equal(run_recorded(path, torch.zeros(3)), torch.ones(3))
    assert [plan.replays for plan in replay.kept()] == [1], "it was short of memory, and is not any more"
    working[0] = False
    for _ in range(3):
        with pytest.raises(RuntimeError, match="out of memory, say"):
            run_recorded(path, torch.zeros(3))
    working[0] = True
    assert torch.equal(run_recorded(path, torch.zeros(3)), torch.ones(3))
    assert [has_plan for _, _, has_plan in library.host().plans()] == [False], "nobody tries for ever"
    assert any("its replay failed" in why for _, why, _ in replay.not_kept())
    capfd.readouterr()


def test_what_the_ordinary_way_refuses_is_refused_all_the_same(plans: stand_in.Interpreted) -> None:
    tensors = small_tensors()
    prefixcore.prefix_attention(**tensors)
    tensors["key"].untyped_storage().resize_(8)  # as FSDP leaves what it has sharded
    with pytest.raises(ValueError, match="its storage was freed or shrunk"):
        prefixcore.prefix_attention(**tensors)
    assert not plans.launches
