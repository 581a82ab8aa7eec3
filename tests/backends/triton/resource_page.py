"""Renders what every kernel needs on every architecture as a page, from the records beside the tests.

python -m tests.backends.triton.resource_page          writes docs/compiled-kernels.md anew
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "compiled-kernels.md"
TRITON, CUDA = (ROOT / "tests" / "backends" / name / "resources.json" for name in ("triton", "cuda"))

HEAD = """# What the kernels compile to

Every kernel, compiled for GPUs that need not be there: registers a thread, and shared memory a block in KiB.
**Bold**: so many bytes a thread are spilled. A dash: not compiled, as the architecture has the blocks of sm_80 and
other cases are more telling. This page is made by `python -m tests.backends.triton.resource_page` from the records
that `make test-slow` holds the compilers to.

A block has 99 KiB of shared memory on sm_86, sm_89 and sm_120, and 227 on sm_90 and sm_100; sm_80's kernels keep to
99, for sm_86 runs them. Which blocks a kernel has on which family stands in
`prefixcore/backends/triton/kernels/launch.py`: sm_80's are also sm_89's, and sm_120's with the exceptions that keep it
from spilling. On sm_90 the gradients of keys and prefix at a head dim of 128 spill and are kept so: measured on an
H200, they take half the time of the fastest blocks that do not. Spills of up to 40 bytes, ten registers, are let
be. The gradients of a short sequence in one kernel spill 240 bytes and more for float32 heads of more than 128: there
the rules leave them to the kernels that have one gradient each. For packed rows with a bank, and for heads of two
widths with a float32 prefix, it spills 48 to 104 bytes on sm_90 and sm_100: it is off until a GPU has measured that.
"""


def rows_by_case(kernels: dict[str, dict[str, int]]) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """`{case: {kernel: {architecture: resources}}}`."""
    found: dict[str, dict[str, dict[str, dict[str, int]]]] = defaultdict(lambda: defaultdict(dict))
    for label, needs in kernels.items():
        architecture, rest = label.split(", ", 1)
        case, kernel = rest.rsplit(": ", 1)
        found[case][kernel.replace("_kernel", "")][architecture] = needs
    return found


def cell(needs: dict[str, int] | None) -> str:
    if needs is None:
        return "–"
    spilled = f", **{needs['stack']}**" if needs["stack"] else ""
    return f"{needs['registers']}, {-(-needs['shared'] // 1024)}{spilled}"


def table(names: str, architectures: list[str], rows: list[tuple[str, list[str]]]) -> str:
    lines = [f"| {names} | {' | '.join(architectures)} |", f"|---|{'---|' * len(architectures)}"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows)])


def render(triton: dict[str, Any], cuda: dict[str, Any]) -> str:
    architectures = sorted({label.split(",")[0] for label in triton["kernels"]}, key=lambda name: int(name[3:]))
    parts = [HEAD, f"## Triton {triton['triton']}\n"]
    for case, kernels in rows_by_case(triton["kernels"]).items():
        rows = [(f"`{name}`", [cell(needs.get(a)) for a in architectures]) for name, needs in sorted(kernels.items())]
        parts += [f"### {case}\n", table("kernel", architectures, rows) + "\n"]
    parts.append(f"## CUDA, nvcc {cuda['nvcc']}\n\nNothing spills; shared memory in bytes.\n")
    found = {name: needs for name, needs in cuda.items() if name != "nvcc"}
    names = sorted({a for needs in found.values() for a in needs}, key=lambda name: int(name[3:]))
    rows = [
        (f"`{name}`", [", ".join(map(str, needs[a])) if a in needs else "–" for a in names])
        for name, needs in found.items()
    ]
    parts.append(table("kernel", names, rows))
    return "\n".join(parts).rstrip() + "\n"


def rendered() -> str:
    return render(json.loads(TRITON.read_text()), json.loads(CUDA.read_text()))


if __name__ == "__main__":
    PAGE.write_text(rendered())
