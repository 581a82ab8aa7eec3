"""A few kernels compiled for devices that are not there, and the page of all of them: the quick part of
`test_resources.py`, which compiles every one."""

from __future__ import annotations

import json
import re

import pytest

from . import resource_page
from .test_resources import SPILLED, resources, run_python

pytest.importorskip("triton")


@pytest.mark.parametrize("kernel", ["bf16 64: decode_once", "bf16 64: grad_once"])
def test_what_has_fewer_launches_fits_the_oldest_and_the_newest(kernel: str) -> None:
    found = resources("--only", kernel, "--architectures", "80", "120")["kernels"]
    assert {name.split(",")[0] for name in found} == {"sm_80", "sm_120"}
    for name, needs in found.items():
        assert needs["stack"] <= SPILLED, name
        assert needs["shared"] <= 99 * 1024, name


ORDER = """
from prefixcore.backends.triton.kernels import launch
from tests.backends.triton import resources

resources.triton.runtime.driver.set_active(resources._NoDevice(90))
launch.family = lambda device: 90

def compile_instead(kernel, programs, blocks, on, keys_of=None, **arguments):
    compiled = kernel.run(grid=(1,), warmup=True, **arguments, num_warps=blocks.warps, num_stages=blocks.stages)
    if arguments["SHARED_M"]:
        print(compiled.asm["ptx"])

launch.launch = compile_instead
resources.call("decode_once", resources.CASES["bf16 64"][0])
"""


def test_what_is_stored_is_released_before_the_count_and_acquired_after_it() -> None:
    """Which the interpreter cannot show: it runs one program at a time.

    In machine code: a barrier of all threads, an addition that releases and acquires for the whole GPU, a barrier.
    """
    wanted = re.compile(r"st\.global|ld\.global|bar\.sync|atom\S*")
    steps = [match[0] for match in wanted.finditer(run_python("-c", ORDER))]
    counts = [place for place, step in enumerate(steps) if step.startswith("atom")]
    assert [steps[place] for place in counts] == ["atom.global.gpu.acq_rel.add.u32"] * 2  # of a shared and an own one
    for place in counts:
        assert steps[place - 1] == steps[place + 1] == "bar.sync"


def test_the_page_is_made_from_the_records() -> None:
    page = resource_page.PAGE.read_text()
    assert page == resource_page.rendered(), "python -m tests.backends.triton.resource_page"
    kernels = json.loads(resource_page.TRITON.read_text())["kernels"]
    assert {name.split(",")[0] for name in kernels} == {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120"}
