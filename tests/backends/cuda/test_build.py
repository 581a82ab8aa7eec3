"""The CUDA sources without a GPU: what ptxas made of them for every architecture, and the library on a bare CPU.

``resources.json`` records every kernel's registers and static shared memory, so that a change of them is seen. After
a change that is meant ``RECORD_CUDA_RESOURCES=1 python -m pytest -m slow tests/backends/cuda/test_build.py`` writes it
anew.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import SOURCES, NvccBuild, run

pytestmark = pytest.mark.slow

RESOURCES = Path(__file__).with_name("resources.json")
ARCHITECTURES = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"]

_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<architecture>sm_\d+)'\n(?:ptxas info.*\n)*?"
    r"\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers(?P<rest>.*)"
)


def kernels(output: str) -> list[tuple[str, str, dict[str, int]]]:
    """(kernel, architecture, resources) for all that ptxas -v spoke of."""
    found = list(_KERNEL.finditer(output))
    names = run("c++filt", *(match["name"] for match in found)).splitlines()
    rows = []
    for match, name in zip(found, names, strict=True):
        # _ZN..._GLOBAL__N__<hash>_12_embedding_cu_<hash>..., void ...::(anonymous namespace)::gather<uint4, void>(...)
        source = re.search(r"_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}", match["name"])
        function = re.search(r"\(anonymous namespace\)::(.+?)\(", name)
        assert source, match["name"]
        assert function, name
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        rows.append((f"{source[1]}: {function[1]}", match["architecture"], {
            "registers": int(match["registers"]),
            "shared": int(shared[1]) if shared else 0,
            "stack": int(match["stack"]),
            "spilled": int(match["stores"]) + int(match["loads"]),
        }))  # fmt: skip
    return rows


def nvcc_version() -> str:
    return run("nvcc", "--version").split(", V")[1].split()[0]


def test_every_kernel_is_compiled_for_every_architecture_and_spills_nothing(nvcc_build: NvccBuild) -> None:
    rows = kernels(nvcc_build.output)
    assert len(rows) == nvcc_build.output.count("Compiling entry function")
    assert {name.split(":")[0] for name, _, _ in rows} == {source.stem for source in SOURCES}
    for name in {name for name, _, _ in rows}:
        assert sorted(architecture for other, architecture, _ in rows if other == name) == sorted(ARCHITECTURES), name
    assert [row for row in rows if row[2]["spilled"] or row[2]["stack"]] == []


def test_resources_are_as_recorded(nvcc_build: NvccBuild) -> None:
    found: dict[str, dict[str, list[int]]] = {}
    for name, architecture, used in sorted(kernels(nvcc_build.output)):
        found.setdefault(name, {})[architecture] = [used["registers"], used["shared"]]
    if os.environ.get("RECORD_CUDA_RESOURCES"):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(used)}" for name, used in found.items())
        RESOURCES.write_text(f'{{\n  "nvcc": {json.dumps(nvcc_version())},\n{lines}\n}}\n')
    recorded = json.loads(RESOURCES.read_text())
    if (version := recorded.pop("nvcc")) != nvcc_version():
        pytest.skip(f"recorded with nvcc {version}: {nvcc_version()} chooses registers in its own way")
    assert found == recorded


def test_the_library_loads_without_a_gpu(nvcc_build: NvccBuild) -> None:
    """Built with CUDA, used on a machine that may have none; shapes are known under fake tensors."""
    code = """
import torch, prefixcore
from torch._subclasses import FakeTensorMode
from prefixcore.backends import cuda, library, triton
weight = torch.randn(10, 4)
assert torch.equal(prefixcore.soft_embedding(torch.tensor([1, 11]), weight, weight), weight[[1, 1]])
print(library.LIBRARY, library.host().build_info()["cuda_architectures"])
assert cuda.refuses("soft_embedding", "cuda", torch.float32) is None
assert prefixcore.which_backend("soft_embedding", "cuda", torch.float32).name == "cuda"
assert "CUDA was compiled in" in triton.refuses("soft_embedding", "cuda", torch.float32)

ops = torch.ops.prefixcore
for op in ("soft_embedding", "soft_embedding_backward"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"prefixcore::{op}", "CUDA"), op
with FakeTensorMode(), torch.device("cuda"):
    ids, weight, virtual = torch.zeros(2, 5, dtype=torch.int64), torch.empty(7, 4).half(), torch.empty(3, 4)
    out = ops.soft_embedding(ids, weight, virtual)
    assert (out.shape, out.dtype, out.device.type) == ((2, 5, 4), torch.float16, "cuda")
    grad = ops.soft_embedding_backward(out, ids, 7, 3)
    assert (grad.shape, grad.dtype, grad.device.type) == ((3, 4), torch.float32, "cuda")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=nvcc_build.folder)
    assert result.returncode == 0, result.stderr
    assert "verriding" not in result.stderr, "the triton backend registered itself over the CUDA kernels"
    assert result.stdout.split() == [str(nvcc_build.folder / "prefixcore" / "_kernels.so"), "80,89,90,100,120"]
