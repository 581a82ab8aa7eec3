"""PEFT's tests, out of its source distribution on PyPI, and the packages that they import."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

PACKAGE = "peft_tests"
"""The name under which the tests are importable: ours are `tests`."""

_NEEDED = (
    "attrs",
    "datasets",
    "diffusers",
    "dill",
    "multiprocess",
    "pandas",
    "parameterized",
    "pyarrow",
    "scipy",
    "tensorboard",
    "xxhash",
)
"""What they import and prefixcore's own tests do not need. Without what these depend on, which is there."""


def fetch_tests(cache: Path, version: str) -> Path:
    """The folder of the tests of this version of PEFT, a package."""
    folder = cache / f"peft-{version}" / PACKAGE
    if folder.exists():
        return folder
    download = cache / "download"
    _pip(
        "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", str(download), f"peft=={version}"
    )
    unpacked = cache / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(download / f"peft-{version}.tar.gz") as archive:
        archive.extractall(unpacked, filter="data")
    (unpacked / f"peft-{version}" / "tests" / "__init__.py").touch()
    folder.parent.mkdir(parents=True, exist_ok=True)
    (unpacked / f"peft-{version}" / "tests").rename(folder)
    return folder


def fetch_packages(cache: Path) -> Path:
    """A folder with the packages, for `PYTHONPATH`: the environment stays as it is."""
    folder = cache / "site-packages"  # a name by which dill knows that packages are not to be pickled
    if not (folder / ".complete").exists():
        _pip("install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder), *_NEEDED)
        (folder / ".complete").touch()
    return folder


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)
