"""What every test here shares: the kernels on a GPU (see ``tests/device.py``) or on the emulated one in ``emulator/``,
built by the C++ compiler; and a build by nvcc."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ...compiler_cache import stand_in
from ...device import NAME

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
EMULATOR = Path(__file__).resolve().parent / "emulator"


class Gpu:
    """The CUDA kernels behind their binding: ``gpu.soft_embedding(...)`` and so on, with CPU tensors in and out.

    A GPU that is there is given copies of the tensors' whole memory, so that they lie in it as they do here.
    """

    def __init__(self, ops: Any, device: str, set_order: Callable[[bool], None]) -> None:
        self._ops, self._device, self._set_order = ops, device, set_order

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: self._call(getattr(self._ops, name), arguments)

    def twice(self, run: Callable[[], Any]) -> Any:
        """What ``run`` returns: the same bits both times, and whichever order the emulator runs threads in."""
        results = []
        for hasty in (False, True):
            self._set_order(hasty)
            results.append(run())
        torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
        return results[0]

    def _call(self, op: Any, arguments: tuple[Any, ...]) -> Any:
        if self._device == "cpu":
            return op(*arguments)
        return op(*(self._there(x) for x in arguments)).cpu()

    def _there(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or self._device == "cpu":
            return x
        memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(self._device, copy=True)
        return memory.as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Gpu:
    if NAME == "cuda":
        return Gpu(torch.ops.prefixcore, "cuda", lambda hasty: None)
    if not sys.platform.startswith("linux"):
        pytest.skip("the emulated GPU needs Linux: its library overrides symbols of torch's")
    library = emulated_library(tmp_path_factory.mktemp("emulator"))
    torch.ops.load_library(library)
    set_order = ctypes.CDLL(str(library)).emulator_options
    set_order.argtypes = [ctypes.c_bool]
    return Gpu(torch.ops.prefixcore_emulated, "cpu", set_order)


def emulated_library(folder: Path) -> Path:
    compiler = stand_in(cxx(), folder / "c++")
    torch_root = Path(torch.__file__).parent
    flags = [
        "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas",
        "-Dprefixcore=prefixcore_emulated", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{EMULATOR}",
        f"-I{ROOT / 'csrc'}", f"-I{torch_root}/include", f"-I{torch_root}/include/torch/csrc/api/include",
    ]  # fmt: skip

    def compiled(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        run(compiler, *flags, "-x", "c++", "-c", str(source), "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*sorted(EMULATOR.glob("*.cpp")), *SOURCES]))
    library = folder / "emulated.so"
    run(compiler, "-shared", *objects, "-o", str(library), "-Wl,-Bsymbolic",
        f"-L{torch_root}/lib", "-ltorch_cpu", "-lc10")  # fmt: skip
    return library


def cxx() -> str:
    return os.environ.get("CXX") or next(name for name in ("g++", "clang++", "c++") if shutil.which(name))


class NvccBuild(NamedTuple):
    """A build of the package with CUDA: its folder, and what ptxas said of it."""

    folder: Path
    output: str


@pytest.fixture(scope="session")
def nvcc_build(tmp_path_factory: pytest.TempPathFactory) -> NvccBuild:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed: CUDA sources cannot be compiled here")
    folder = tmp_path_factory.mktemp("nvcc")
    compilers = tmp_path_factory.mktemp("compilers")
    stand_in(nvcc, compilers / "nvcc")
    environment = {
        **os.environ, "CXX": stand_in(cxx(), compilers / "c++"),
        "PATH": f"{compilers}{os.pathsep}{os.environ['PATH']}",
        "PREFIXCORE_CUDA": "1", "PREFIXCORE_CUDA_ARCHITECTURES": "80;89;90;100;120",
        "PREFIXCORE_NVCC_FLAGS": "-Xptxas=-v",
    }  # fmt: skip
    output = run(
        sys.executable, "setup.py", "build_ext", f"--build-temp={folder / 'temp'}", f"--build-lib={folder}",
        cwd=ROOT, env=environment,
    )  # fmt: skip
    shutil.copytree(
        ROOT / "prefixcore", folder / "prefixcore", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so")
    )
    return NvccBuild(folder, re.sub(r"\x1b\[[0-9;]*m", "", output))


def run(*command: str, **options: Any) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert result.returncode == 0, result.stdout
    return result.stdout
