"""The CUDA sources without a GPU: they compile for every architecture, spill nothing, and the library loads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: CUDA sources cannot be compiled here")


@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda p: p.name)
def test_no_kernel_spills(source: Path, tmp_path: Path) -> None:
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90, 100)]
    result = subprocess.run(
        [NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", *codes, "-c", str(source), "-o", str(tmp_path / "out.o")],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert spills
    assert set(spills) == {("0", "0")}


def test_the_library_loads_without_a_gpu(tmp_path: Path) -> None:
    """Built with CUDA, used on a machine that may have none."""
    build = [sys.executable, "setup.py", "build_ext", f"--build-temp={tmp_path / 'temp'}", f"--build-lib={tmp_path}"]
    environment = {**os.environ, "PREFIXCORE_CUDA": "1"}
    result = subprocess.run(build, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    shutil.copytree(
        ROOT / "prefixcore", tmp_path / "prefixcore", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so")
    )
    code = """
import torch, prefixcore
from prefixcore.backends import cuda, library
weight = torch.randn(10, 4)
assert torch.equal(prefixcore.soft_embedding(torch.tensor([1, 11]), weight, weight), weight[[1, 1]])
print(library.LIBRARY, library.host().build_info()["cuda_architectures"])
assert cuda.refuses("soft_embedding", "cuda", torch.float32) is None
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(tmp_path / "prefixcore" / "_kernels.so"), "80,90,100"]
