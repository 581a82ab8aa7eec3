"""The Python that `make gpu` goes on in: the one it was started with, or a new one that has what that lacks.

Only Python's own library is imported here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

from .parts import ROOT

GIVEN = {"torch": "torch>=2.10", "triton": "triton>=3.6", "transformers": "transformers>=5.13"}
NEEDED = {"setuptools": "setuptools>=77", "ninja": "ninja", "pybind11": "pybind11>=2.13", "pytest": "pytest>=8",
          "hypothesis": "hypothesis>=6.100", "peft": "peft>=0.21", "accelerate": "accelerate>=1.1",
          "safetensors": "safetensors>=0.8"}  # fmt: skip


def missing(packages: dict[str, str]) -> list[str]:
    """What is asked for of the packages that are not there, or too old: `{module: requirement}`."""
    absent = [asked for module, asked in packages.items() if importlib.util.find_spec(module) is None]
    if importlib.util.find_spec("packaging") is None:  # transformers and pytest depend on it
        return absent
    from packaging.requirements import Requirement

    for asked in packages.values():
        requirement = Requirement(asked)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # installed under another name, or not at all: that stands in `absent` already
        if asked not in absent and not requirement.specifier.contains(version, prereleases=True):
            absent.append(asked)
    return absent


def lacking_to_interpret() -> list[str]:
    """What is missing to run Triton's kernels in its interpreter.

    Triton before 3.7 makes an int of an array of one number for the end of a loop, which NumPy refuses from 2.4 on.
    """
    return missing({"numpy": "numpy<2.4"}) if missing({"triton": "triton>=3.7"}) else []


def stop(message: str) -> NoReturn:
    raise SystemExit(f"make gpu: {message}")


def not_installed(wheels: Path | None) -> list[Path]:
    """The wheels of packages that this Python lacks, or has in another version."""
    found = []
    for wheel in sorted(wheels.glob("*.whl")) if wheels else []:
        name, version = wheel.name.split("-")[:2]
        try:
            if importlib.metadata.version(name) == version:
                continue
        except importlib.metadata.PackageNotFoundError:
            pass
        found.append(wheel)
    return found


def with_everything(wheels: Path | None, *, interpreted: bool = False) -> None:
    """Goes on in an environment that has all that is NEEDED, and the wheels, if this one has not.

    `interpreted`: Triton's kernels are to run in its interpreter.
    """
    if absent := missing(GIVEN):
        stop(f"{sys.executable} lacks {', '.join(absent)}; name another Python with PYTHON=..., or install them")
    packages, files = missing(NEEDED), not_installed(wheels)
    if interpreted:
        packages += lacking_to_interpret()
    if not packages and not files:
        return
    if os.environ.get("PREFIXCORE_GPU_ENVIRONMENT"):
        named = ", ".join([*packages, *(file.name for file in files)])
        stop(f"{named} could not be installed{f' from {wheels}' if wheels else ''}; see the messages of pip above")
    python = environment()
    # A folder of wheels is what somebody chose for this machine: all of them, and nothing that they ask for beyond.
    asked = [str(file) for file in files] if wheels else packages
    alone = ["--no-index", "--no-deps"] if wheels else []
    if asked and subprocess.run([str(python), "-m", "pip", "install", "--quiet", *alone, *asked]).returncode:
        stop(f"{', '.join(Path(name).name for name in asked)} could not be installed; pip says why above")
    settings = {**os.environ, "PREFIXCORE_GPU_ENVIRONMENT": "1"}
    raise SystemExit(subprocess.run([python, *sys.argv], env=settings).returncode)


def environment() -> Path:
    """The Python of a new environment that sees this one's packages."""
    folder = ROOT / ".venv-gpu"
    # Without pip of its own, with which an old setuptools could come that would hide the one that is there.
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    purelib = subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
    # Not --system-site-packages: this Python may itself be that of a virtual environment.
    own = (str(ROOT / ".ci"), sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    here = [path for path in sys.path if Path(path).is_dir() and path not in own and Path(path).name != "lib-dynload"]
    (Path(purelib) / "given.pth").write_text("\n".join(here) + "\n")
    if subprocess.run([python, "-c", "import pip"], capture_output=True).returncode:
        subprocess.run([python, "-m", "ensurepip"], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"], check=True)
    return python
