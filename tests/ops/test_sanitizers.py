"""The CPU kernels under GCC's address and undefined-behaviour sanitizers: every access lies where it should.

The package is built again with both, beside a copy of the tests, which run there in a process of their own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compiler_cache import stand_in
from tests.device import cpu_backend

ROOT = Path(__file__).resolve().parents[2]
# Clearing no bytes at a null pointer, as for rows of length 0, is undefined in C++17 alone: later standards allow it.
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-sanitize=nonnull-attribute"
WATCHED = [f"tests/ops/test_{name}.py" for name in ("attention_correct", "attention_numerics", "soft_embedding")]

pytestmark = [pytest.mark.slow, cpu_backend]


def run(*command: str, **options: object) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, done.stdout[-20_000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def libraries() -> str:
    """What has to be loaded before all else."""
    if not sys.platform.startswith("linux") or shutil.which("g++") is None:
        pytest.skip("the sanitizers' libraries are loaded as GCC's on Linux are")
    found = [run("g++", f"-print-file-name={name}.so") for name in ("libasan", "libubsan", "libstdc++")]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip("g++ is here without its sanitizers")
    return " ".join(found)


@pytest.fixture(scope="module")
def sanitized(libraries: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder to run in, and the environment."""
    folder = tmp_path_factory.mktemp("sanitized")
    for name in ("prefixcore", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    compiler = f"{stand_in('g++', folder / 'g++')} {SANITIZERS}"
    build = [sys.executable, "setup.py", "build_ext", f"--build-temp={folder / 'temp'}", f"--build-lib={folder}"]
    run(*build, cwd=ROOT, env={**os.environ, "CXX": compiler, "PREFIXCORE_CUDA": "0"})
    apart = ("PYTEST", "PYTHONPATH")  # neither this run's plugins, nor the package that it tests
    environment = {name: text for name, text in os.environ.items() if not name.startswith(apart)}
    return folder, environment | {
        "LD_PRELOAD": libraries, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder),
    }  # fmt: skip


def test_no_access_lies_outside(sanitized: tuple[Path, dict[str, str]]) -> None:
    folder, environment = sanitized
    # Sanitizers write their reports past Python. One test is left out: it compares times, and such code has its own.
    options = ["-p", "no:cacheprovider", "--capture=sys", "-k", "not are_not_slow"]
    command = [sys.executable, "-m", "pytest", *WATCHED, *options]
    output = run(*command, cwd=folder, env=environment)
    assert " passed" in output
    assert "failed" not in output


def test_an_access_outside_is_seen(sanitized: tuple[Path, dict[str, str]]) -> None:
    """The library is instrumented, and around a tensor lies what no one may touch."""
    folder, environment = sanitized
    assert b"__asan_report_load" in (folder / "prefixcore" / "_kernels.so").read_bytes()
    code = """
import ctypes, torch
x = torch.zeros(1000)
ctypes.memset(x.data_ptr(), 1, 4 * 1000 + OUTSIDE)
"""
    for outside, status in ((0, 0), (1, 1)):
        command = [sys.executable, "-c", code.replace("OUTSIDE", str(outside))]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == status
        assert ("heap-buffer-overflow" in done.stderr) == bool(outside)
