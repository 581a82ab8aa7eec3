"""A plan as it is written down: what of a launch it can hold, and the words that the C++ reads."""

from __future__ import annotations

import struct
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prefixcore.backends import library
from prefixcore.backends.triton.plan_kernel import kernel_of
from prefixcore.backends.triton.plan_words import Address, Constant, Kernel, Memory, NotKept, Plan, View


def test_a_launch_that_needs_more_than_a_grid_is_not_kept() -> None:
    plain: dict[str, Any] = {"num_warps": 4, "shared": 1024, "num_ctas": 1}

    def launch(signature: dict[str, Any] | None = None, **needs: Any) -> Kernel:
        compiled = SimpleNamespace(
            metadata=SimpleNamespace(**plain | needs),
            src=SimpleNamespace(signature={"x": "*fp32", "n": "i32"} if signature is None else signature),
            function=7,
        )
        kernel = SimpleNamespace(fn=SimpleNamespace(__name__="kernel"))
        arguments = {"x": torch.ones(1), "n": 5, "pair": (1.5, None)}
        return kernel_of(kernel, compiled, 3, arguments, lambda x: Address(0, 16))

    known = launch()
    assert (known.function, known.programs, known.threads, known.shared) == (7, 3, 128, 1024)
    assert known.parameters == (Address(0, 16), Constant(5), Constant(0), Constant(0))
    pair = launch({"pair": ("fp32", "constexpr"), "n": "constexpr"})
    assert pair.parameters[0] == Constant(int.from_bytes(struct.pack("<f", 1.5), "little"))
    for needs in (
        {"launch_cooperative_grid": True}, {"launch_pdl": True}, {"num_ctas": 2}, {"global_scratch_size": 64},
        {"profile_scratch_size": 64}, {"shared": 229 * 1024}, {"tensordesc_meta": [{}]},
        {"instrumentation_mode": "gsan"},
    ):  # fmt: skip
        with pytest.raises(NotKept, match="kernel needs"):
            launch(**needs)
    with pytest.raises(NotKept, match="kernel takes a nvTmaDesc"):
        launch({"n": "nvTmaDesc"})
    with pytest.raises(NotKept, match="kernel takes y, which it was not given by name"):
        launch({"y": "i32"})


def test_words_that_spell_no_plan_are_refused() -> None:
    host = library.host()
    good = Plan(1, 2, (Memory(1, torch.float32, (3,), (1,)),), (View(1),)).words()
    assert host.plan_keep(0, array("q", good).tobytes()) == 0, "a plan, for which nobody has asked"
    for number in range(len(good)):
        with pytest.raises(ValueError, match="a plan: expected"):
            host.plan_keep(0, array("q", good[:number] or [-1]).tobytes())
    for bad in ([-1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 1, 7, 1], [*good, 0], [1, 1, 1, 9, 0, 0]):
        with pytest.raises(ValueError, match="a plan: expected"):
            host.plan_keep(0, array("q", bad).tobytes())
