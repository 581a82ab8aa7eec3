"""Say what was compiled, and which backend each op would use and why."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

from .common import OK, table

LIBRARIES = ("torch", "transformers", "peft", "safetensors", "accelerate", "vllm", "triton")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(arguments: argparse.Namespace) -> int:
    """Print the facts; exit code 0 if the compiled library is there, else 1."""
    from ..ops import explain

    rows = [("op", "device", "dtype", "backend", "why")]
    rows += explain()
    built, facts = build_facts()
    print(table([*library_facts(), *facts]))
    print()
    print(table(rows))
    return OK if built else 1


def library_facts() -> list[tuple[str, str]]:
    """Versions of this package, Python and the libraries it works with."""
    from ..version import __version__

    rows = [("prefixcore", __version__), ("python", f"{platform.python_version()} on {platform.platform()}")]
    for name in LIBRARIES:
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def build_facts() -> tuple[bool, list[tuple[str, str]]]:
    """Whether the compiled library is there, and what is known about it and the machine."""
    import torch

    from ..backends import library

    try:
        host = library.host()
    except (RuntimeError, ImportError) as error:
        return False, [("compiled library", f"missing: {error}")]
    info = host.build_info()
    return True, [
        ("compiled library", f"built against torch {info['torch']} by {info['compiler']}"),
        ("instruction sets", f"{host.isa()} in use; compiled in: {info['compiled_isas']}"),
        ("  this machine can run", ", ".join(host.runnable_isas())),
        ("CUDA architectures", info["cuda_architectures"] or "none compiled in"),
        ("threads", f"{torch.get_num_threads()} used by torch, {host.hardware_threads()} in hardware"),
    ]
