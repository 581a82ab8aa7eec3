"""The tables of bench/README.md, as Markdown, from results alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import targets
from .runs import Machine, Row
from .targets import Target

MIB = 2**20


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def judged(figure: float, target: Target | None) -> str:
    """The figure, with its target where it has one; bold where it misses it."""
    if target is None:
        return f"{figure:.2f}"
    return f"{figure:.2f} ({target})" if target.met(figure) else f"**{figure:.2f}** (missed {target})"


def between(spread: tuple[float, float]) -> str:
    return f"{spread[0]:.2f}..{spread[1]:.2f}"


def milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.3f}" if value < 1 else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def shape(case: dict[str, Any]) -> str:
    return ",".join(str(x) for x in targets.shape_of(case))


def passes(case: dict[str, Any]) -> str:
    return "fwd+bwd" if case["backward"] else "fwd"


def model(case: dict[str, Any]) -> list[str]:
    rows = ", ragged" if case.get("ragged") else ""
    return [case["model"] + rows, f"{case['B']},{case['T']},{case['P']}"]


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Rows with targets in the order of the targets, whatever order they were measured in."""
    order = list(targets.ATTENTION)

    def place(row: Row) -> tuple[Any, ...]:
        found = targets.shape_of(row.case)
        where = order.index(found) if found in order else len(order)
        return where, row.case.get("dtype") != "fp32", row.case.get("backward", False), str(row.case)

    return sorted(rows, key=place)


def attention(rows: Sequence[Row], isa: str) -> str:
    lines = []
    for row in in_order(rows):
        case = row.case
        run = row.runs[0]
        rate = run["flops"] / run["sgemm_flops"] / row.worst("sgemm")
        lines.append(
            [shape(case), case["dtype"], passes(case), milliseconds(row.seconds())]
            + [judged(row.worst(name), targets.attention(case, name, isa)) for name in ("bare", "concatenated")]
            + [f"{row.worst('merged'):.2f}", judged(rate, targets.attention_rate(case))]
            + [between(row.spread("bare")), between(row.spread("concatenated"))]
        )
    header = ["B,H,Hkv,T,D,P", "dtype", "pass", "ms", "over R0", "over R1", "over R2", "of a matrix product's rate"]
    return markdown([*header, "spread over R0", "spread over R1"], lines)


def flex(rows: Sequence[Row], isa: str) -> str:
    lines = [
        [shape(r.case), r.case["dtype"], milliseconds(r.seconds()), f"{r.worst('flex'):.2f}", between(r.spread("flex"))]
        for r in in_order(rows)
    ]
    return markdown(["B,H,Hkv,T,D,P", "dtype", "ms", "over FlexAttention", "spread"], lines)


def decode(rows: Sequence[Row], isa: str) -> str:
    lines = [
        [
            shape(r.case),
            str(r.case["S"]),
            r.case["dtype"],
            milliseconds(r.seconds()),
            judged(r.worst("cached"), targets.DECODE),
            f"{r.worst('concatenated'):.2f}",
            between(r.spread("cached")),
        ]
        for r in in_order(rows)
    ]
    header = ["B,H,Hkv,T,D,P", "S", "dtype", "ms", "over SDPA on a concatenated cache", "over concatenate and SDPA"]
    return markdown([*header, "spread over the first"], lines)


def robustness(rows: Sequence[Row], isa: str) -> str:
    lines = [
        [
            shape(r.case),
            r.case["what"],
            passes(r.case),
            judged(r.worst("plain"), targets.ROBUST),
            between(r.spread("plain")),
        ]
        for r in sorted(in_order(rows), key=lambda row: row.case["what"])
    ]
    return markdown(["B,H,Hkv,T,D,P", "what", "pass", "over the plain case", "spread"], lines)


def soft_embedding(rows: Sequence[Row], isa: str) -> str:
    lines = []
    for row in rows:
        case = row.case
        bandwidth = None if case["backward"] else targets.COPY
        lines.append(
            [",".join(str(case[name]) for name in "BTPVE"), case["dtype"], passes(case)]
            + [f"{1e6 * row.seconds():.1f}", judged(row.worst("embedding and cat"), targets.FASTER)]
            + [between(row.spread("embedding and cat"))]
            + [judged(1 / row.worst("copy"), bandwidth), f"{1 / row.worst('clone'):.2f}"]
        )
    header = ["B,T,P,V,E", "dtype", "pass", "µs", "over embedding + cat", "spread"]
    return markdown([*header, "of a copy's rate", "of a clone's rate"], lines)


def step(rows: Sequence[Row], isa: str) -> str:
    lines = []
    for row in rows:
        long = row.case["T"] == 1024 and row.case["P"] == 64 and not row.case["ragged"]
        lora = [name for name in ("LoRA", "LoRA, all linear") if name in row.references]
        lines.append(
            [*model(row.case), milliseconds(row.seconds())]
            + [judged(row.worst("bare model"), targets.STEP_OVER_BARE), between(row.spread("bare model"))]
            + [judged(row.worst("PEFT prefix"), targets.STEP_OVER_PEFT if long else None)]
            + [between(row.spread("PEFT prefix")), ", ".join(f"{row.worst(name):.2f}" for name in lora)]
            + [f"{row.over('prefixcore prompt', name):.2f}" for name in ("bare model", "PEFT prompt", "LoRA")]
        )
    header = ["model", "B,T,P", "prefix, ms", "over bare", "spread", "over PEFT prefix", "spread", "over LoRA"]
    return markdown([*header, "prompt over bare", "over PEFT prompt", "over LoRA"], lines)


def generation(rows: Sequence[Row], isa: str) -> str:
    lines = [
        [*model(r.case), str(r.case["new"]), r.case["kind"], milliseconds(r.seconds())]
        + [f"{r.worst(name):.2f} ({between(r.spread(name))})" for name in ("bare model", "PEFT")]
        for r in rows
    ]
    return markdown(["model", "B,T,P", "new tokens", "what", "ms", "over bare", "over PEFT"], lines)


def files(rows: Sequence[Row], isa: str) -> str:
    lines = [
        [r.case["model"], str(r.case["P"]), r.case["what"], milliseconds(r.seconds())]
        + [f"{r.worst('PEFT'):.2f} ({between(r.spread('PEFT'))})"]
        for r in rows
    ]
    return markdown(["model", "P", "what", "ms", "over PEFT"], lines)


def saved_by_attention(rows: Sequence[Row], isa: str) -> str:
    names = ("candidate", "bare", "concatenated", "merged")
    lines = [
        [shape(r.case), r.case["dtype"], *(f"{r.bytes(name) / MIB:.2f}" for name in names)] for r in in_order(rows)
    ]
    return markdown(["B,H,Hkv,T,D,P", "dtype", "prefixcore, MiB", "R0", "R1", "R2"], lines)


def saved_by_model(rows: Sequence[Row], isa: str) -> str:
    lines = []
    for row in rows:
        bare = row.bytes("bare model")
        for name in row.runs[0]["bytes"]:
            lines.append([*model(row.case), name, f"{row.bytes(name) / MIB:.1f}", f"{row.bytes(name) / bare:.2f}"])
    return markdown(["model", "B,T,P", "training", "MiB kept", "of bare"], lines)


def peak(rows: Sequence[Row], isa: str) -> str:
    lines = []
    for row in rows:
        peaks: dict[str, list[int]] = {}
        for run in row.runs:
            for name, values in run["bytes_above_start"].items():
                peaks.setdefault(name, []).extend(values)
        bare = min(peaks["bare model"])
        for name, values in peaks.items():
            # Before the first step the parameters are there; their gradients and two moments are not.
            own = row.runs[0]["state_bytes"][name] * 3 // 4
            target = targets.PEAK if name == "prefixcore prefix" else None
            lines.append(
                [*model(row.case), name, f"{max(values) / MIB:.0f}", f"{min(values) / MIB:.0f}", f"{own / MIB:.1f}"]
                + [judged(max(values) / (bare + own), target)]
            )
    header = ["model", "B,T,P", "training", "MiB above the start", "least of the runs", "its own state, MiB"]
    return markdown([*header, "over bare and its own state"], lines)


Table = Callable[[Sequence[Row], str], str]
TABLES: dict[str, tuple[str, Table]] = {
    "attention": ("`prefix_attention`", attention),
    "flex": ("`prefix_attention` beside FlexAttention, forward", flex),
    "decode": ("Decoding over a shared prefix", decode),
    "robustness": ("Strided inputs, large scores: ours beside ours, float32", robustness),
    "soft embedding": ("`soft_embedding`", soft_embedding),
    "step": ("Whole training steps, float32", step),
    "generation": ("Greedy generation, float32", generation),
    "adapter files": ("Saving and loading a prefix", files),
    "saved by attention": ("Kept for the backward by one attention, beyond its inputs", saved_by_attention),
    "saved by a model": ("Kept for the backward by a whole model, float32", saved_by_model),
    "peak memory": ("Peak resident memory of a step, float32", peak),
}
PICTURES = ("attention sweep", "layers")  # drawn, not tabled


def stamp_lines(machine: Machine) -> str:
    """The machine and what ran on it, in words."""
    first = machine.stamps[0]
    runs = len(machine.stamps)
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    commits = ", ".join(sorted({stamp["commit"] for stamp in machine.stamps}))
    loads = ", ".join(f"{stamp['load']:.1f}" for stamp in machine.stamps)
    return (
        f"{first['cpu']}; {first['cores']} cores, {first['threads']} threads, {first['memory_gib']} GiB; "
        f"kernels {first['isa']}, PyTorch {first['torch_isa']}. {versions}; compiled by {first['compiler']}. "
        f"Commit {commits}. {runs} sitting{'s' if runs > 1 else ''} "
        f"({first['scale']}, {first['time'].replace('T', ' ')}); "
        f"load average before {loads}."
    )


def summary(machine: Machine) -> str:
    """For the front page: forward and backward of the op in float32, and whole steps, as ratios."""
    lines = []
    for row in in_order(machine.tables.get("attention", ())):
        if row.case["backward"] and row.case["dtype"] == "fp32":
            over = [f"{row.worst(name):.2f}" for name in ("bare", "concatenated")]
            lines.append([f"`prefix_attention`, {shape(row.case)}", *over])
    for row in machine.tables.get("step", ()):
        what = f"training step, {', '.join(model(row.case))}"
        lines.append([what, *(f"{row.worst(name):.2f}" for name in ("bare model", "PEFT prefix"))])
    header = ["forward and backward, float32 (B,H,Hkv,T,D,P; B,T,P)", "over no prefix at all", "over PEFT's way"]
    return markdown(header, lines)


def sections(machine: Machine) -> str:
    """All tables of one machine."""
    isa = machine.stamps[0]["isa"]
    parts = [stamp_lines(machine)]
    for name, (title, table) in TABLES.items():
        if rows := machine.tables.get(name):
            parts += [f"### {title}", table(rows, isa)]
    return "\n\n".join(parts)
