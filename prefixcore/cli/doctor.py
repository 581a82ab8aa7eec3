"""Say what was compiled, which backend each op would use and why, how a GPU would share out work, and what is kept."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from .common import OK
from .output import results, table

if TYPE_CHECKING:
    from ..backends.triton.choose import Path

LIBRARIES = ("torch", "transformers", "peft", "safetensors", "accelerate", "vllm", "triton", "flash-attn-4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(arguments: argparse.Namespace) -> int:
    """Print the facts; exit code 0 if the compiled library is there, else 1."""
    from ..ops import explain

    rows = [("op", "device", "dtype", "backend", "why")]
    rows += explain()
    built, facts = build_facts()
    tables: list[Sequence[Sequence[str]]] = [
        [*library_facts(), *facts, *gpu_facts(), *fewer_launches(), *streamed_embedding(), *replay_facts()],
        rows,
    ]
    if paths := gpu_paths():
        tables.append([("problem", "pass", "path", "why"), *paths])
    tables += replay_tables()
    results("\n\n".join(table(each) for each in tables))
    return OK if built else 1


def library_facts() -> list[tuple[str, str]]:
    """Versions of this package, Python and the libraries it works with."""
    from ..version import __version__

    rows = [("prefixcore", __version__), ("python", f"{platform.python_version()} on {platform.platform()}")]
    for name in LIBRARIES:
        try:
            found: str | None = version(name)  # None: of a package that is half removed
            rows.append((name, found or "damaged: its metadata says no version; install it again"))
        except PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def build_facts() -> tuple[bool, list[tuple[str, str]]]:
    """Whether the compiled library is there, and what is known about it and the machine."""
    import torch

    from ..backends import cpu, library

    try:
        host = library.host()
    except (RuntimeError, ImportError) as error:
        return False, [("compiled library", f"missing: {error}")]
    info = host.build_info()
    try:
        used = f"{cpu.instruction_set()} in use"
    except ValueError as error:
        used = f"none in use: {error}"
    return True, [
        ("compiled library", f"built against torch {info['torch']} by {info['compiler']}"),
        ("instruction sets", f"{used}; compiled in: {info['compiled_isas']}"),
        ("  this machine can run", ", ".join(host.runnable_isas())),
        ("CUDA architectures", info["cuda_architectures"] or "none compiled in"),
        ("threads", f"{torch.get_num_threads()} used by torch, {host.hardware_threads()} in hardware"),
    ]


def gpu_facts() -> list[tuple[str, str]]:
    """What GPUs there are, and the versions that decide about their attention kernels."""
    import torch

    if not torch.cuda.is_available():
        return [("GPU", "none")]
    rows = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        memory = f"{facts.total_memory / 2**30:.0f} GiB"
        rows.append((f"GPU {index}", f"{facts.name}, compute capability {facts.major}.{facts.minor}, {memory}"))
    cudnn = torch.backends.cudnn.version()
    return [*rows, ("CUDA", f"{torch.version.cuda} in torch; cuDNN {cudnn}")]


def fewer_launches() -> list[tuple[str, str]]:
    """Whether the paths of fewer launches are chosen."""
    from ..backends.triton import choose

    try:
        on = choose.fewer_launches()
    except ValueError as error:
        return [("fewer GPU launches", str(error))]
    switch = "PREFIXCORE_FEWER_LAUNCHES"
    return [("fewer GPU launches", f"on; {switch}=0 turns it off" if on else f"off; {switch}=1 turns it on")]


def streamed_embedding() -> list[tuple[str, str]]:
    """Whether the soft embedding is looked up by the kernels that stream."""
    from ..backends import nvidia

    try:
        on = nvidia.streamed_embedding()
    except ValueError as error:
        return [("streamed embedding", str(error))]
    switch = "PREFIXCORE_STREAMED_EMBEDDING"
    return [("streamed embedding", f"on; {switch}=0 turns it off" if on else f"off; {switch}=1 turns it on")]


def replay_facts() -> list[tuple[str, str]]:
    """Whether plans of GPU calls are replayed; if so, whether that works here, and how many this process has kept."""
    import torch

    from ..backends import library, triton
    from ..backends.triton import replay
    from ..backends.triton.replay_check import tried

    if not library.BUILT:
        return []
    try:
        on = replay.is_on()
    except ValueError as error:
        return [("replay of GPU calls", str(error))]
    how = f"on; {replay.SWITCH}=0 turns it off" if on else f"off; {replay.SWITCH}=1 turns it on"
    rows = [("replay of GPU calls", how)]
    if on and not triton.refuses("prefix_attention", "cuda", torch.float32):
        rows += [(f"  {name}", said) for name, said in tried(torch.device("cuda"), torch.float32)]
    if on:
        kept = replay.kept()
        times = sum(plan.replays for plan in kept)
        rows.append(("  plans kept", f"{len(kept)} of at most {replay.limit()}, replayed {times} times"))
    return rows


def replay_tables() -> list[list[tuple[str, ...]]]:
    """The plans that are kept in this process, and why others are not; nothing where there are none."""
    from ..backends import library
    from ..backends.triton import replay

    if not library.BUILT:
        return []
    tables: list[list[tuple[str, ...]]] = []
    if kept := replay.kept():
        rows = [(plan.op, plan.signature, plan.steps, str(plan.replays)) for plan in kept]
        tables.append([("plan of", "tensors and options", "steps", "replays"), *rows])
    if refused := replay.not_kept():
        tables.append([("not kept", "why", "times"), *((op, why, str(times)) for op, why, times in refused)])
    return tables


def gpu_paths() -> list[tuple[str, str, str, str]]:
    """Which path the triton backend takes for some problems, and why; nothing where the backend cannot run."""
    import torch

    from ..backends import triton
    from ..backends.problem import attention_problem
    from ..backends.triton import choose

    if triton.refuses("prefix_attention", "cuda", torch.bfloat16):
        return []
    rows = []
    for name, (queries, keys, tokens, window, dtype) in {
        "training, T = 2048, P = 64, bfloat16": (2048, 2048, 64, 0, torch.bfloat16),
        "the same in float32": (2048, 2048, 64, 0, torch.float32),
        "the same with a sliding window": (2048, 2048, 64, 1024, torch.bfloat16),
        "training, T = 2048, P = 2048, bfloat16": (2048, 2048, 2048, 0, torch.bfloat16),
        "training, T = 128, bfloat16": (128, 128, 64, 0, torch.bfloat16),
        "decoding, 2048 keys in the cache": (1, 2048, 64, 0, torch.bfloat16),
    }.items():
        head = torch.empty(128, dtype=dtype, device="cuda")  # one row stands for all: nothing is computed
        query, key = head.expand(8, 32, queries, -1), head.expand(8, 8, keys, -1)
        prefix = head.expand(8, tokens, -1)
        p = attention_problem(query, key, key, prefix, prefix, sliding_window=window)
        rows.append((name, "forward", *_path(partial(choose.forward, p), choose.considered(p))))
        if queries > 1:
            backward = partial(choose.backward, p, all_three=True, grad_lse=False)
            rows.append((name, "backward", *_path(backward, choose.considered(p, choose.Pass(training=True)))))
    return rows


def _path(choice: Callable[[], Path], considered: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Its name and why it is the one; of a long prefix that no vendor does, what speaks against that, too."""
    try:
        path = choice()
    except ValueError as error:  # one is forced that is none, or that cannot do this
        return "none", str(error)
    folded = dict(considered).get("folded", "")
    long = path.name == "merged" and "virtual tokens" not in folded
    return path.name, f"{path.why}; not folded: {folded}" if long else path.why
