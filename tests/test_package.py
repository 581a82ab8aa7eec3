"""The package as a whole: what importing it costs and needs, what the build says of itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import prefixcore
from prefixcore.backends import library

ROOT = Path(prefixcore.__file__).resolve().parent.parent
INSTALL = 'pip install "torch>=2.10" "setuptools>=77" ninja "pybind11>=2.13"'


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )


def test_import_needs_torch_alone() -> None:
    """With everything else that is optional as if it was not installed, which torch asks of triton, too."""
    code = """
import sys
optional = ("transformers", "peft", "safetensors", "accelerate", "triton", "vllm", "matplotlib", "tqdm", "gguf")
sys.modules.update(dict.fromkeys(optional))
import torch, prefixcore
q = torch.randn(1, 2, 3, 4)
prefixcore.prefix_attention(q, q, q, q[0], q[0])
prefixcore.PrefixTuningConfig(num_virtual_tokens=3)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_import_is_quick() -> None:
    """No more than 0.2 s of processor time beyond torch itself, the best of three."""
    code = """
import json, time, torch
start = time.process_time()
import prefixcore
print(json.dumps(time.process_time() - start))
"""
    assert min(json.loads(python(code).stdout) for _ in range(3)) < 0.2


def test_all_public_names_exist() -> None:
    for name in prefixcore.__all__:
        assert getattr(prefixcore, name) is not None
        assert name in dir(prefixcore)
    with pytest.raises(AttributeError, match="no_such_name"):
        prefixcore.no_such_name  # noqa: B018


def test_host_facts() -> None:
    host = library.host()
    info = host.build_info()
    assert info["compiler"]
    assert info["torch"]
    assert set(host.runnable_isas()) <= set(info["compiled_isas"].split(","))
    assert host.isa() in host.runnable_isas()
    assert host.hardware_threads() >= 1


def test_isa_can_be_forced_and_a_wrong_one_is_named() -> None:
    code = "import prefixcore, torch; from prefixcore.backends import library; print(library.host().isa())"
    for isa in library.host().runnable_isas():
        assert python(code, PREFIXCORE_ISA=isa).stdout.strip() == isa
    run = "import torch, prefixcore; q = torch.randn(1, 1, 2, 4); prefixcore.prefix_attention(q, q, q)"
    result = python(run, PREFIXCORE_ISA="sse9")
    assert result.returncode == 1
    assert "unknown instruction set 'sse9'" in result.stderr
    with pytest.raises(ValueError, match="unknown instruction set"):
        library.host().select_isa("sse9")


def test_missing_library_says_how_to_build() -> None:
    code = """
import torch, prefixcore
from prefixcore.backends import library
library.BUILT = False
q = torch.randn(1, 1, 2, 4)
with prefixcore.use_backend("reference"):
    prefixcore.prefix_attention(q, q, q)
try:
    prefixcore.prefix_attention(q, q, q)
except RuntimeError as error:
    print(error)
"""
    assert "pip install --no-build-isolation" in python(code).stdout


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "no-such-compiler"}, "'no-such-compiler' that CXX names was not found"),
        ({"PATH": "/nowhere", "CXX": ""}, "no C++ compiler was found. Install one"),
        ({"PREFIXCORE_CUDA": "1", "PATH": "/nowhere", "CXX": sys.executable, "CUDA_HOME": ""}, "nvcc was not found"),
        ({"PREFIXCORE_CUDA": "yes"}, "expected 0 or 1"),
    ],
)
def test_a_build_that_cannot_work_says_what_to_install(environment: dict, message: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", f"--build-temp={tmp_path}", f"--build-lib={tmp_path}"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment},
    )  # fmt: skip
    assert result.returncode != 0
    assert message in result.stderr + result.stdout
    assert "Traceback" not in result.stderr


def test_a_build_without_torch_stops_at_once() -> None:
    """As in pip's isolated build environments, which ask for the metadata before they resolve anything."""
    code = """
import importlib.util, runpy, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
sys.argv = ["setup.py", "dist_info"]
runpy.run_path("setup.py")
"""
    result = python(code)
    assert result.returncode != 0
    assert "building needs torch 2.10 or newer, which" in result.stderr
    assert INSTALL in result.stderr


@pytest.mark.parametrize(("name", "old", "least"), [("setuptools", "65.5.0", "77"), ("torch", "2.9.1+cpu", "2.10")])
def test_a_build_with_what_is_too_old_says_so(name: str, old: str, least: str) -> None:
    """setuptools 65 is what Python 3.10's venv brings: it fails over pyproject.toml with a page on its licence."""
    code = f"""
import importlib.metadata, runpy, sys
version = importlib.metadata.version
importlib.metadata.version = lambda name: {old!r} if name == {name!r} else version(name)
sys.argv = ["setup.py", "dist_info"]
runpy.run_path("setup.py")
"""
    result = python(code)
    assert result.returncode != 0
    assert f"building needs {name} {least} or newer ({old} is installed), which" in result.stderr
    assert INSTALL in result.stderr
    assert "Traceback" not in result.stderr


def test_what_is_to_be_installed_is_what_the_build_needs() -> None:
    for page in ("README.md", "docs/index.md"):
        assert INSTALL.replace('"torch>=2.10"', "torch") in (ROOT / page).read_text()
    project = (ROOT / "pyproject.toml").read_text()
    for requirement in INSTALL.split()[2:]:
        assert f'"{requirement.strip(chr(34))}"' in project
