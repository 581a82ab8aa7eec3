"""A few kernels compiled for devices that are not there, and the page of all of them: the quick part of
`test_resources.py`, which compiles every one."""

from __future__ import annotations

import json

import pytest

from . import resource_page
from .test_resources import SPILLED, resources

pytest.importorskip("triton")


@pytest.mark.parametrize("kernel", ["bf16 64: decode_once", "bf16 64: grad_once"])
def test_what_has_fewer_launches_fits_the_oldest_and_the_newest(kernel: str) -> None:
    found = resources("--only", kernel, "--architectures", "80", "120")["kernels"]
    assert {name.split(",")[0] for name in found} == {"sm_80", "sm_120"}
    for name, needs in found.items():
        assert needs["stack"] <= SPILLED, name
        assert needs["shared"] <= 99 * 1024, name


def test_the_page_is_made_from_the_records() -> None:
    page = resource_page.PAGE.read_text()
    assert page == resource_page.rendered(), "python -m tests.backends.triton.resource_page"
    kernels = json.loads(resource_page.TRITON.read_text())["kernels"]
    assert {name.split(",")[0] for name in kernels} == {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120"}
