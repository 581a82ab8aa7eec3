"""Plans of kernels that Triton has compiled: what is replayed is what Triton's own launcher launches, byte for byte.

Compiled for sm_90 where no GPU is; Triton's launcher and ours both speak to the stand-in for the driver, which hears
the kernel, grid, block, shared memory, stream and parameters. How many parameters there are, and of what size, is read
from the compiled code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.backends.triton.stand_in.compiled import CASES
from tests.device import NAME

pytestmark = pytest.mark.skipif(NAME == "cuda", reason="a stand-in for a GPU, where there is one")

QUICK = ("single", "merged")
ALIKE = ("kernel", "function", "grid", "block", "shared", "stream", "attributes", "sizes")


def launched(*names: str) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.backends.triton.stand_in.compiled", *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def same_launches(ordinary: dict[str, Any], replayed: dict[str, Any]) -> None:
    """Every word alike but for addresses; of those, each stands for the same tensor, or for scratch of both.

    Scratch may lie where a result is put later, when it is free again.
    """
    of = {address: name for name, address in ordinary["known"].items() if address}
    met: set[str] = set()
    assert len(ordinary["launches"]) == len(replayed["launches"]) > 0
    for a, b in zip(ordinary["launches"], replayed["launches"], strict=True):
        for what in ALIKE:
            assert a[what] == b[what], (a["kernel"], what)
        assert a["attributes"] == 0, "a plain launch, as cuLaunchKernel makes it"
        for number, (size, word, other) in enumerate(zip(a["sizes"], a["words"], b["words"], strict=True)):
            where = f"{a['kernel']}, parameter {number}"
            name = of.get(word) if size == 8 else None
            if name is not None and other == replayed["known"][name]:
                met.add(name)
            elif name is not None and name.startswith("given"):
                pytest.fail(f"{where}: {name}")
            elif word != other:
                assert size == 8, where
                assert word % 16 == other % 16 == 0, f"{where}: scratch"
                assert min(word, other) > 2**20, f"{where}: scratch"
        assert a["words"][-2:] == [0, 0], "no scratch of Triton's"
    assert met >= {"given query", "given prefix_key", "out", "lse"}
    assert "grad of query" in met or "grad of query" not in ordinary["known"]


def check_cases(names: tuple[str, ...]) -> None:
    found = launched(*names)
    assert found["refused"] == []
    lengths = [len(CASES[name].get("then", ())) for name in reversed(names)]
    assert [plan[3] for plan in found["kept"] if plan[0] == "prefix_attention_backward"] == [2] * len(names)
    assert [plan[3] for plan in found["kept"] if plan[0] == "prefix_attention"] == [2 + more for more in lengths]
    for ordinary, *replays in found["cases"].values():
        for replayed in replays:
            same_launches(ordinary, replayed)


def test_what_is_replayed_is_what_triton_launches() -> None:
    check_cases(QUICK)


@pytest.mark.slow
def test_of_every_option_and_path() -> None:
    check_cases(tuple(name for name in CASES if name not in QUICK))
