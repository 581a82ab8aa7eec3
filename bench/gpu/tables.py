"""The GPU's tables, as Markdown, from results alone: made as the CPUs' are, each figure beside its goal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bench.cells import MIB, NOTHING, REFERENCES, judged, markdown, milliseconds, model, over, passes, shape
from bench.runs import Row
from bench.targets import Target

from . import goals
from .goals import goal

WITH = "switched on"


def switched(row: Row) -> str:
    """What was on that is off by default."""
    return str(row.case.get("with", NOTHING))


def beside(row: Row, table: str, reference: str) -> str:
    """Our time over the reference's, with its goal."""
    return over(row, reference, goal(row, table, reference))


def error(row: Row) -> str:
    """The greatest relative error that the gate found."""
    return f"{max(run['relative_error'] for run in row.runs):.1e}"


def copy_rate(row: Row, table: str) -> str:
    """Of a copy's rate, for the bytes that have to be moved."""
    share = goals.share_of_copy(row)
    return NOTHING if share is None else judged(share, goal(row, table, "copy"))


def of_paths(row: Row) -> str:
    """Each forced path over the bare op."""
    ways = [name for name in row.references if name.endswith(" path")]
    return ", ".join(f"{name.removesuffix(' path')} {row.over(name, 'bare'):.2f}" for name in ways) or NOTHING


def own_goal(row: Row, table: str) -> Target | None:
    """Of what was chosen: it depends on whether that was FlashAttention-4."""
    return goal(row, table, "fa4" if goals.chosen(row) == "fa4" else "own")


def ways(row: Row) -> str:
    """Which path forward and backward took, and why or whose kernel; once where it is the same."""
    return "; backward ".join(dict.fromkeys(row.runs[0]["path"].values()))


def attention(rows: Sequence[Row], device: str) -> str:
    """`prefix_attention`, and which path it took."""
    name = "gpu attention"
    header = ["B,H,Hkv,T,D,P", "pass", "ms", f"over {REFERENCES['bare']}", "each path over the same"]
    header += [f"over {REFERENCES['concatenated']}", "over FlexAttention", "runs as"]
    lines = [
        [shape(row.case), passes(row.case), milliseconds(row.seconds())]
        + [over(row, "bare", own_goal(row, name)), of_paths(row)]
        + [beside(row, name, reference) for reference in ("concatenated", "flex")]
        + [ways(row), error(row)]
        for row in rows
    ]
    return markdown([*header, "relative error"], lines)


def launching(rows: Sequence[Row], device: str) -> str:
    """The CPU's time to launch a call."""
    name = "gpu launching"
    header = ["B,H,Hkv,T,D,P", "pass", WITH, "µs", "over SDPA's", "kernels", "SDPA's", "runs as", "relative error"]
    lines = []
    for row in rows:
        counted = row.runs[0]["kernels"]
        lines.append(
            [shape(row.case), passes(row.case), switched(row)]
            + [judged(1e6 * row.seconds(), goal(row, name, "µs")), beside(row, name, "bare")]
            + [str(counted[who] or NOTHING) for who in ("candidate", "bare")]
            + [ways(row), error(row)]
        )
    return markdown(header, lines)


def small_step(rows: Sequence[Row], device: str) -> str:
    """Whole steps on the wall."""
    name, references = "gpu small step", ("bare model", "PEFT prefix", "LoRA")
    lines = [
        [*model(row.case), switched(row), milliseconds(row.seconds()), milliseconds(row.seconds("bare model"))]
        + [beside(row, name, reference) for reference in references]
        + [error(row)]
        for row in rows
    ]
    header = ["model", "B,T,P", WITH, "prefix, ms", "bare, ms", *(f"over {x}" for x in references)]
    return markdown([*header, "relative error"], lines)


def generation(rows: Sequence[Row], device: str) -> str:
    """A generated token."""
    name = "gpu generation"
    lines = []
    for row in rows:
        new = row.case["new"]
        lines.append(
            [*model(row.case), str(new), row.case["cache"], switched(row)]
            + [milliseconds(row.seconds() / new), milliseconds(row.seconds("bare model") / new)]
            + [beside(row, name, reference) for reference in ("bare model", "PEFT prefix")]
            + [error(row)]
        )
    header = ["model", "B,T,P", "new tokens", "cache", WITH, "ms a token", "bare, ms", "over bare", "over PEFT"]
    return markdown([*header, "relative error"], lines)


def compiled(rows: Sequence[Row], device: str) -> str:
    """Compiled steps."""
    name, references = "gpu compiled", ("bare compiled", "bare eager", "ours eager")
    lines = [
        [*model(row.case), row.case["mode"], switched(row), milliseconds(row.seconds())]
        + [beside(row, name, reference) for reference in references]
        + [str(row.runs[0]["graphs_skipped"]), error(row)]
        for row in rows
    ]
    header = ["model", "B,T,P", "mode", WITH, "ms", *(f"over {reference}" for reference in references)]
    return markdown([*header, "CUDA graphs skipped", "relative error"], lines)


def lengths(rows: Sequence[Row], device: str) -> str:
    """Ten lengths, compiled."""
    name = "gpu lengths"
    lines = [
        [row.case["model"], str(row.case["B"]), row.case["T"], switched(row), milliseconds(row.seconds())]
        + [beside(row, name, "bare compiled"), str(row.runs[0]["graphs"]["candidate"])]
        + [str(row.runs[0]["graphs"]["bare compiled"]), error(row)]
        for row in rows
    ]
    header = ["model", "B", "T", WITH, "ms", "over bare compiled", "graphs", "the bare model's", "relative error"]
    return markdown(header, lines)


def decode(rows: Sequence[Row], device: str) -> str:
    """Decoding over a shared prefix."""
    name = "gpu decode"
    header = ["B,H,Hkv,T,D,P", "S", WITH, "ms", "over SDPA on a concatenated cache", f"over {REFERENCES['bare']}"]
    lines = [
        [shape(row.case), str(row.case["S"]), switched(row), milliseconds(row.seconds())]
        + [beside(row, name, "cached"), beside(row, name, "bare"), copy_rate(row, name), ways(row), error(row)]
        for row in rows
    ]
    return markdown([*header, "of a copy's rate", "runs as", "relative error"], lines)


def soft_embedding(rows: Sequence[Row], device: str) -> str:
    """Times and bandwidth of `soft_embedding`."""
    name = "gpu soft embedding"
    lines = [
        [",".join(str(row.case[x]) for x in "BTPVE"), passes(row.case), switched(row), milliseconds(row.seconds())]
        + [beside(row, name, "embedding + cat"), beside(row, name, "output copied"), copy_rate(row, name), error(row)]
        for row in rows
    ]
    header = ["B,T,P,V,E", "pass", WITH, "ms", "over embedding + cat", "over a copy of the output"]
    return markdown([*header, "of a copy's rate", "relative error"], lines)


def step(rows: Sequence[Row], device: str) -> str:
    """Whole steps of large models and their peak memory."""
    name = "gpu step"
    lines = [
        [*model(row.case), "yes" if row.case["checkpointing"] else "no", milliseconds(row.seconds())]
        + [beside(row, name, "bare model"), beside(row, name, "PEFT prefix")]
        + [f"{max(run['peak_bytes']['prefixcore prefix'] for run in row.runs) / MIB:.0f}"]
        + [judged(goals.peak(row) or 0.0, goal(row, name, "peak")), error(row)]
        for row in rows
    ]
    header = ["model", "B,T,P", "gradient checkpointing", "prefix, ms", "over bare", "over PEFT prefix"]
    return markdown([*header, "peak memory, MiB", "over bare and its own state", "relative error"], lines)


TABLES: Mapping[str, tuple[str, Callable[[Sequence[Row], str], str]]] = {
    "gpu launching": ("Launching: the CPU's time for a call", launching),
    "gpu small step": ("Small steps, on the wall", small_step),
    "gpu attention": ("`prefix_attention`", attention),
    "gpu decode": ("Decoding over a shared prefix, in a CUDA graph", decode),
    "gpu soft embedding": ("`soft_embedding`", soft_embedding),
    "gpu compiled": ("Compiled steps", compiled),
    "gpu lengths": ("Ten lengths, compiled", lengths),
    "gpu generation": ("Greedy generation", generation),
    "gpu step": ("Whole training steps of large models", step),
}
PARTS = {
    "gpu launching": "launching",
    "gpu small step": "small-steps",
    "gpu attention": "attention",
    "gpu decode": "decode",
    "gpu soft embedding": "soft-embedding",
    "gpu compiled": "compiled",
    "gpu lengths": "compiled",
    "gpu generation": "generation",
    "gpu step": "steps",
}
"""What of `make gpu` measures each table."""
