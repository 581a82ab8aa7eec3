"""The GPU's tables, as Markdown. `python -m bench.gpu.report FILE.json ...` prints those of pytest-benchmark's JSON."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.cells import MIB, NOTHING, REFERENCES, judged, markdown, milliseconds, passes, shape
from bench.targets import Target

from .kept import Info, Session, read, tables

TITLES = {
    "gpu attention": "`prefix_attention`",
    "gpu decode": "Decoding over a shared prefix, in a CUDA graph",
    "gpu soft embedding": "`soft_embedding`",
    "gpu step": "Whole training steps",
}


def over(info: Info, reference: str) -> str:
    """Our time over the reference's, beside its goal, where it was measured."""
    if reference not in info["ratios"]:
        return NOTHING
    return judged(info["ratios"][reference]["of_minima"], goal(info, reference))


def goal(info: Info, name: str, *, at_least: bool = False) -> Target | None:
    """The row's goal of that name; a rehearsal has none."""
    return Target(info["goals"][name], at_least) if info["real"] and name in info["goals"] else None


def copy_rate(info: Info) -> str:
    """Of a copy's rate, for the bytes that have to be moved."""
    return judged(info["share_of_copy"], goal(info, "copy", at_least=True))


def least(info: Info) -> str:
    """Milliseconds of our quickest call."""
    return milliseconds(info["seconds"]["candidate"]["min"])


def error(info: Info) -> str:
    """The greatest relative error that the gate found."""
    return f"{info['relative_error']:.1e}"


def attention(rows: Sequence[Info]) -> str:
    """`prefix_attention`, and which path it took."""
    header = ["B,H,Hkv,T,D,P", "pass", "ms", f"over {REFERENCES['bare']}", f"over {REFERENCES['concatenated']}"]
    header += ["over FlexAttention", "forward runs as", "backward runs as", "relative error"]
    lines = [
        [shape(info["case"]), passes(info["case"]), least(info)]
        + [over(info, name) for name in ("bare", "concatenated", "flex")]
        + [info["path"].get(which, NOTHING) for which in ("forward", "backward")]
        + [error(info)]
        for info in rows
    ]
    return markdown(header, lines)


def decode(rows: Sequence[Info]) -> str:
    """Decoding over a shared prefix."""
    header = ["B,H,Hkv,T,D,P", "S", "ms", "over SDPA on a concatenated cache", f"over {REFERENCES['bare']}"]
    lines = [
        [shape(info["case"]), str(info["case"]["S"]), least(info)]
        + [over(info, "cached"), over(info, "bare"), copy_rate(info), info["path"]["forward"], error(info)]
        for info in rows
    ]
    return markdown([*header, "of a copy's rate", "runs as", "relative error"], lines)


def soft_embedding(rows: Sequence[Info]) -> str:
    """Times and bandwidth of `soft_embedding`."""
    lines = [
        [",".join(str(info["case"][name]) for name in "BTPVE"), passes(info["case"]), least(info)]
        + [over(info, "embedding + cat"), over(info, "output copied"), copy_rate(info), error(info)]
        for info in rows
    ]
    header = ["B,T,P,V,E", "pass", "ms", "over embedding + cat", "over a copy of the output", "of a copy's rate"]
    return markdown([*header, "relative error"], lines)


def step(rows: Sequence[Info]) -> str:
    """Whole training steps and their peak memory."""
    header = ["model", "B,T,P", "gradient checkpointing", "prefix, ms", "over bare", "over PEFT prefix"]
    header += ["peak memory, MiB", "over bare and its own state", "relative error"]
    lines = []
    for info in rows:
        case = info["case"]
        lines.append(
            [case["model"], f"{case['B']},{case['T']},{case['P']}", "yes" if case["checkpointing"] else "no"]
            + [least(info), over(info, "bare model"), over(info, "PEFT prefix")]
            + [f"{info['peak_bytes']['prefixcore prefix'] / MIB:.0f}"]
            + [judged(info["peak_over_bare_and_state"], goal(info, "peak")), error(info)]
        )
    return markdown(header, lines)


TABLES = {
    "gpu attention": attention,
    "gpu decode": decode,
    "gpu soft embedding": soft_embedding,
    "gpu step": step,
}


def sections(rows: Mapping[str, Sequence[Info]]) -> str:
    """All tables of these figures."""
    return "\n\n".join(f"#### {TITLES[name]}\n\n{TABLES[name](rows[name])}" for name in TABLES if name in rows)


def steps_line(report: Mapping[str, Any]) -> str:
    """What passed, what failed and what was not run."""
    parts = []
    for found in report["steps"]:
        counts = [f"{found[key]} {key}" for key in ("tests", "failures", "errors", "skipped") if key in found]
        parts.append(f"{found['step']} {found['state']}" + (f" ({', '.join(counts)})" if counts else ""))
    return "; ".join(parts)


def rendered(found: Sequence[Session]) -> str:
    """All that is said about the kept sessions."""
    parts = []
    for session in found:
        stamp = f"{session.device}. Commit {', '.join(session.commits)}. Steps: {steps_line(session.report)}."
        parts.append(f"### {session.device.split(',')[0]}\n\n{stamp}\n\n{sections(session.rows)}")
    return "\n\n".join(parts)


def printed(files: Sequence[Path]) -> str:
    """What was measured on, and all tables of the figures in these files of pytest-benchmark's."""
    benchmarks = [benchmark for file in files for benchmark in read(file)["benchmarks"]]
    devices = sorted({benchmark["extra_info"]["device"] for benchmark in benchmarks})
    return "\n\n".join([*devices, sections(tables(benchmarks))])


if __name__ == "__main__":
    print(printed([Path(file) for file in sys.argv[1:]]))
