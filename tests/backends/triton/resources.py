"""Compiles every Triton kernel as it would be launched, for devices that are not there, and reads what it needs.

    python -m tests.backends.triton.resources --write     makes resources.json anew
    python -m tests.backends.triton.resources             prints it as it is now
    python -m tests.backends.triton.resources --every 12  compiles one in twelve, and whatever is not made from what the
                                                          record was made from: of the others it prints the record

The launchers run as they are, on small CPU tensors; only their last step is replaced: a kernel is compiled instead of
launched. So what is compiled is what the block table, the strides and the switches of a real call lead to.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from prefixcore.backends.problem import AttentionProblem, attention_problem
from prefixcore.backends.triton.kernels import (
    beside,
    decode,
    decode_once,
    decode_schedule,
    delta,
    forward,
    grad_keys,
    grad_once,
    grad_prefix,
    grad_query,
    grad_short_prefix,
    launch,
    merge,
    soft_embedding,
)

from .resource_cache import remember

RECORDED = Path(__file__).with_name("resources.json")
ARCHITECTURES = (80, 89, 90, 100, 120)

BF16, FP32 = torch.bfloat16, torch.float32


def problem(
    D: int = 128, dtype: torch.dtype = BF16, Dv: int | None = None, mask: torch.dtype | None = None,
    padding: bool = False, sinks: bool = False, packed: bool = False, bank: bool = False, is_causal: bool = True,
    window: int = 0, softcap: float = 0.0, prefix_dtype: torch.dtype | None = None, P: int = 16, B: int = 2,
) -> AttentionProblem:  # fmt: skip
    B, H, Hkv, T, N = 1 if packed else B, 4, 2, 32, 3
    Dv = Dv or D

    def heads_last(count: int, dim: int) -> torch.Tensor:
        return torch.empty(B, T, count, dim, dtype=dtype).transpose(1, 2)

    def prefix(dim: int) -> torch.Tensor:
        return torch.empty(*((N,) if bank else ()), Hkv, P, dim, dtype=prefix_dtype or dtype)

    return attention_problem(
        heads_last(H, D), heads_last(Hkv, D), heads_last(Hkv, Dv), prefix(D), prefix(Dv),
        prefix_index=torch.zeros(B, dtype=torch.int64) if bank else None,
        prefix_lengths=torch.zeros(N, dtype=torch.int64) if bank else None,
        padding=torch.ones(B, T, dtype=torch.bool) if padding else None,
        mask=torch.zeros(B, 1, T, T, dtype=mask).expand(B, H, T, T) if mask else None,
        sinks=torch.zeros(H) if sinks else None, cu_seqlens=torch.tensor([0, T], dtype=torch.int32) if packed else None,
        is_causal=is_causal, sliding_window=window, softcap=softcap,
    )  # fmt: skip


ONCE = ("decode_once", "grad_once")
SINGLE = ("forward", "grad_query", "grad_keys", "grad_prefix", "decode", *ONCE)
EVERY = (*SINGLE, "from_state", "prefix_only", "delta")

CASES: dict[str, tuple[AttentionProblem, tuple[str, ...]]] = {
    "bf16 128": (problem(), EVERY),
    "bf16 64": (problem(64), SINGLE),
    "bf16 256": (problem(256), SINGLE),
    "bf16 128, 64 virtual tokens": (problem(P=64), ("grad_short_prefix",)),
    "bf16 64, 64 virtual tokens": (problem(64, P=64), ("grad_short_prefix",)),
    "fp32 64": (problem(64, FP32), SINGLE),
    "fp32 128": (problem(128, FP32), (*SINGLE[:4], *ONCE)),
    "fp32 256": (problem(256, FP32), (*SINGLE[:3], "decode_once")),
    "bf16 80, values of 96, float32 prefix": (problem(80, Dv=96, prefix_dtype=FP32), SINGLE),
    "bf16 256, float32 prefix": (problem(256, prefix_dtype=FP32), SINGLE[:2]),
    "window, softcap": (problem(window=8, softcap=20.0), SINGLE[:5]),
    "additive mask, padding, sinks": (
        problem(mask=BF16, padding=True, sinks=True), (*SINGLE[:3], "decode", *ONCE)),
    "everything at once": (
        problem(window=8, softcap=20.0, sinks=True, mask=BF16, padding=True), (*SINGLE[:3], "decode", *ONCE)),
    "bool mask, bidirectional": (problem(mask=torch.bool, is_causal=False), SINGLE[:3]),
    "packed, bank": (problem(packed=True, bank=True), (*SINGLE[:4], "grad_once")),
    "bank": (problem(bank=True), ("decode",)),
    "bf16 128, beside a vendor's": (problem(), ("merge", "beside")),
    "packed, bank, sinks, beside a vendor's": (problem(packed=True, bank=True, sinks=True), ("merge", "beside")),
    "bf16 80, bank, float32 prefix, beside a vendor's": (problem(80, bank=True, prefix_dtype=FP32), ("beside",)),
    "bank of a crowd": (problem(bank=True, B=8), ("decode_once",)),
    "bf16 4096, float32 virtual tokens": (problem(prefix_dtype=FP32), ("soft_embedding",)),
    "fp32 63": (problem(63, FP32), ("soft_embedding",)),
}  # fmt: skip


SAME_BLOCKS = (89, 120)
"""They are given sm_80's blocks, with few exceptions, so for them fewer cases are compiled: those below."""
EXTREMES = ("bf16 128", "bf16 64", "bf16 256", "fp32 64", "fp32 256", "everything at once",
            "bf16 64, 64 virtual tokens", "bf16 4096, float32 virtual tokens",
            "bf16 128, beside a vendor's")  # fmt: skip


def call(name: str, p: AttentionProblem) -> None:
    out = torch.empty(p.batch, p.queries, p.heads, p.value_dim, dtype=p.query.dtype).transpose(1, 2)
    lse = torch.empty(p.batch, p.heads, p.queries)
    if name in ("forward", "from_state"):
        forward.launch_forward(p, out, lse, from_state=name == "from_state")
    elif name in ("grad_query", "prefix_only"):
        grad_query.launch_grad_query(p, out, lse, lse, torch.empty_like(p.query), prefix_only=name == "prefix_only")
    elif name == "grad_keys":
        grad_keys.launch_grad_keys(p, out, lse, lse, torch.empty_like(p.key), torch.empty_like(p.value))
    elif name == "grad_prefix":
        grad_prefix.launch_grad_prefix(p, out, lse, lse)
    elif name == "grad_short_prefix":
        grad_short_prefix.launch_grad_short_prefix(p, out, out, lse, torch.empty_like(p.query))
    elif name == "decode":
        decode.launch_decode(p, out, lse)
    elif name == "grad_once":
        grads = (torch.empty_like(x) for x in (p.query, p.key, p.value))
        grad_once.launch_grad_once(p, out, out, lse, None, *grads, needs_prefix=True)
    elif name == "decode_once":
        longer = {name: torch.cat([getattr(p, name)] * 8, -2) for name in ("prefix_key", "prefix_value")}
        one = p._replace(query=p.query[:, :, :1], mask=None if p.mask is None else p.mask[:, :, :1], **longer)
        for decode_schedule.SHARED_KEYS, decode_schedule.KEYS_PER_SPLIT in ((1, 16), (10**9, 16), (10**9, 10**9)):
            decode_once.launch_decode_once(one, out[:, :, :1], lse[:, :, :1])
    elif name == "delta":
        delta.compute_delta(out, out, lse)
    elif name == "merge":
        merge.launch_merge(out, lse, out, lse, p.sinks)
        merge.launch_add(out, out)
    elif name == "beside":
        spans = beside.launch_spans(p)
        laid = beside.launch_lay(p, spans)
        beside.launch_take(p, spans, *laid, torch.empty_like(p.key), torch.empty_like(p.value))
        beside.launch_sum(p, spans, *laid)
    elif name == "soft_embedding":  # of the problem's dtypes, its hidden size 32 heads, or one that is odd
        hidden = p.head_dim * (1 if p.head_dim % 2 else 32)
        ids, weight = torch.arange(9), torch.empty(7, hidden, dtype=p.query.dtype)
        for soft_embedding.STREAMED in (True, False):
            rows = soft_embedding.gather(ids, weight, torch.empty(2, hidden, dtype=p.prefix_key.dtype))
        soft_embedding.grad_virtual(rows, ids, 7, 2)


class _NoDevice:
    """A driver for a device that is not there: enough to compile for it."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # kernels are remembered by device: one number an architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of its stack and local memory: spilled registers lie there."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    return dict(zip(("registers", "stack", "local"), map(int, found), strict=True))


def needed(binary: Any) -> dict[str, int]:
    return resources(binary.asm["cubin"]) | {"shared": binary.metadata.shared}


def compiled(
    case: str, name: str, architecture: int, recorded: Mapping[str, Any], every: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(label, resources)`` of the kernels that one launcher would launch; of most the record, if it still holds."""
    triton.runtime.driver.set_active(_NoDevice(architecture))
    chips = 80 if architecture == 89 else architecture  # as `launch.family` has it
    launch.family = lambda device: chips  # type: ignore[assignment]
    found: list[tuple[str, dict[str, int]]] = []

    def compile_instead(
        kernel: Any, programs: int, blocks: launch.Blocks, on: Any, keys_of: Any = None, **arguments: Any
    ) -> None:
        options = {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
        label = f"sm_{architecture}, {case}: {kernel.__name__}"
        label += "".join(f", {flag}" for flag in ("PREFIX_ONLY", "FROM_STATE", "STREAMED") if arguments.get(flag))
        if kernel.__name__ == "decode_once_kernel":
            label += ", shared" if arguments["SHARED_M"] else ", split" if arguments["counters"] is not None else ""
        label += ", of the prefix" if kernel.__name__ == "decode_kernel" and arguments["PREFIX"] else ""
        known = recorded.get(label) if zlib.crc32(label.encode()) % every else None
        needs = remember(lambda: kernel.run(grid=(1,), warmup=True, **arguments, **options), needed, known)
        found.append((label, needs))

    launch.launch = compile_instead  # type: ignore[assignment]
    call(name, CASES[case][0])
    yield from found


def _compiled(task: tuple[str, str, int], recorded: Mapping[str, Any], every: int) -> list[tuple[str, dict[str, Any]]]:
    return list(compiled(*task, recorded, every))


def measure(
    jobs: int, architectures: tuple[int, ...] = ARCHITECTURES, only: str = "", every: int = 1
) -> dict[str, Any]:
    record = json.loads(RECORDED.read_text())["kernels"] if every > 1 else {}
    launch.PROGRAMS = 10**6  # so small a problem is split too, and the reduction compiled
    grad_prefix.TILES_PER_SPLIT = grad_short_prefix.TILES_PER_SPLIT = 1
    tasks = [(case, name, a) for case, (_, names) in CASES.items() for name in names for a in architectures]
    tasks = [task for task in tasks if task[2] not in SAME_BLOCKS or task[0] in EXTREMES]
    tasks = [task for task in tasks if only in f"{task[0]}: {task[1]}"]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        results = []
        for pairs in pool.imap_unordered(partial(_compiled, recorded=record, every=every), tasks):
            for label, needs in pairs:
                print(label, needs, file=sys.stderr, flush=True)
            results += pairs
    return {"triton": triton.__version__, "kernels": dict(sorted(results))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RECORDED.name}")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--architectures", type=int, nargs="*", default=ARCHITECTURES, metavar="SM", help="such as 90")
    parser.add_argument("--only", default="", help="part of 'case: launcher'")
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="compile one kernel in N whatever is recorded"
    )
    arguments = parser.parse_args()
    found = measure(arguments.jobs, tuple(arguments.architectures), only=arguments.only, every=arguments.every)
    if arguments.only and arguments.write:  # the others stay as they are on record
        found["kernels"] = dict(sorted((json.loads(RECORDED.read_text())["kernels"] | found["kernels"]).items()))
    text = json.dumps(found, indent=1)
    if arguments.write:
        RECORDED.write_text(text + "\n")
    else:
        sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
