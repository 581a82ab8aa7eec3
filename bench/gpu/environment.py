"""The Python that `make gpu` goes on in: the one it was started with, or a new one that has what that lacks.

Only Python's own library is imported here.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

from .packages import GIVEN, NEEDED, OF_MODELS, missing
from .parts import ROOT


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

    What only parts with models need is fetched too; where it cannot be, those parts are left out.
    `interpreted`: Triton's kernels are to run in its interpreter.
    """
    if absent := missing(GIVEN):
        stop(f"{sys.executable} lacks {', '.join(absent)}; name another Python with PYTHON=..., or install them")
    packages, files = missing(NEEDED), not_installed(wheels)
    if interpreted:
        packages += lacking_to_interpret()
    anew = not os.environ.get("PREFIXCORE_GPU_ENVIRONMENT")
    of_models = missing(OF_MODELS) if anew and not wheels else []
    if not packages and not files and not of_models:
        return
    if not anew:
        named = ", ".join([*packages, *(file.name for file in files)])
        stop(f"{named} could not be installed{f' from {wheels}' if wheels else ''}; see the messages of pip above")
    python = environment()
    # A folder of wheels is what somebody chose for this machine: all of them, and nothing that they ask for beyond.
    if wheels:
        _install(python, ["--no-index", "--no-deps"], [str(file) for file in files])
    else:
        _install(python, [], packages)
        if of_models and not _installed(python, [], of_models):
            print(f"make gpu: without {', '.join(of_models)}, so without the parts that need it", flush=True)
    settings = {**os.environ, "PREFIXCORE_GPU_ENVIRONMENT": "1"}
    raise SystemExit(subprocess.run([python, *sys.argv], env=settings).returncode)


def _installed(python: Path, options: list[str], what: list[str]) -> bool:
    """Whether pip could install it; nothing needs no pip."""
    quick = ["--quiet", "--disable-pip-version-check", "--retries", "1", *options]
    return not what or not subprocess.run([str(python), "-m", "pip", "install", *quick, *what]).returncode


def _install(python: Path, options: list[str], what: list[str]) -> None:
    if not _installed(python, options, what):
        stop(f"{', '.join(Path(name).name for name in what)} could not be installed; pip says why above")


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
