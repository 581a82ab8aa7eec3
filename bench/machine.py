"""Where figures come from: machine, instruction sets, threads, versions and commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from prefixcore.backends import library

from .scale import SCALE

LOAD_BEFORE = round(os.getloadavg()[0], 2)  # when this module is imported, before anything is measured
LIBRARIES = ("torch", "transformers", "peft", "pytest-benchmark")


def stamp() -> dict[str, Any]:
    """What a reader needs to judge a figure. Names no user, host or folder."""
    import prefixcore

    build = library.host().build_info()
    return {
        "scale": SCALE,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "threads": torch.get_num_threads(),
        "isa": library.host().isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "load": LOAD_BEFORE,
        "system": f"{platform.system()} {platform.machine()}",
        "compiler": build["compiler"],
        "versions": {"python": platform.python_version(), "prefixcore": prefixcore.__version__, **versions()},
        "commit": COMMIT,
    }


def cpu_model() -> str:
    """As the system calls it, with family and model where the name says little."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    first = text.split("\n\n", 1)[0]
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name = facts.get("model name", platform.machine())
    return f"{name}, family {facts['cpu family']}, model {facts['model']}" if "cpu family" in facts else name


def versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """The commit's short name, with `+changes` where tracked files differ from it.

    A copy without its history is told by `PREFIXCORE_COMMIT` what it is a copy of.
    """
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "csrc", "prefixcore", "bench")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("PREFIXCORE_COMMIT", "unknown")


COMMIT = commit()  # of what is being measured: when this module is imported, since files may change meanwhile
