"""The tables of whole models, from results alone."""

from __future__ import annotations

from collections.abc import Sequence

from . import targets
from .cells import MIB, NOTHING, between, dtype, judged, markdown, milliseconds, model, over, skipped, spread
from .runs import Row

STEP = ["model", "B,T,P", "dtype", "prefix, ms", "over bare", "spread", "over PEFT prefix", "spread", "over LoRA"]
STEP += ["prompt over bare", "over PEFT prompt", "over LoRA"]


def step(rows: Sequence[Row], isa: str) -> str:
    """Whole training steps."""
    lines = []
    for row in rows:
        name = [*model(row.case), dtype(row.case)]
        if row.skipped:
            lines.append(skipped(name, row, len(STEP)))
            continue
        lora = [over(row, name) for name in ("LoRA", "LoRA, all linear") if name in row.references]
        lines.append(
            [*name, milliseconds(row.seconds())]
            + [over(row, "bare model", targets.STEP_OVER_BARE), spread(row, "bare model")]
            + [over(row, "PEFT prefix", targets.step_over_peft(row.case)), spread(row, "PEFT prefix")]
            + [", ".join(lora) or NOTHING]
            + [prompt_over(row, name) for name in ("bare model", "PEFT prompt", "LoRA")]
        )
    return markdown(STEP, lines)


def prompt_over(row: Row, reference: str) -> str:
    """Our soft prompt's time over the reference's, where both were measured."""
    if not {"prefixcore prompt", reference} <= set(row.references):
        return NOTHING
    return f"{row.over('prefixcore prompt', reference):.2f}"


PACKED = ["model", "data", "what", "B,T,P", "tokens", "with a label", "packed, ms", "over PEFT, padded", "spread"]
PACKED += ["over ours, padded", "over bare, padded"]


def packed_kind(row: Row) -> str:
    """What is trained: a prefix, as in all results before soft prompts could be packed, or a prompt."""
    return str(row.case.get("kind", "prefix"))


def packed_step(rows: Sequence[Row], isa: str) -> str:
    """Steps on ragged data: ours packed, the others padded."""
    lines = []
    for row in rows:
        case = row.case
        name = [case["model"], case["data"], packed_kind(row)]
        if row.skipped:
            lines.append(skipped(name, row, len(PACKED)))
            continue
        peft = f"PEFT {packed_kind(row)}"
        lines.append(
            [*name, model(case)[1], f"{case['tokens']} of {case['B'] * case['T']}", str(case["labels"])]
            + [milliseconds(row.seconds()), over(row, peft, targets.packed_over_peft(case)), spread(row, peft)]
            + [over(row, "padded"), over(row, "bare model")]
        )
    return markdown(PACKED, lines)


CACHED = ["model", "data", "B,T,P", "tokens", "trained from layer", "cached, ms", "over bare, padded", "spread"]
CACHED += ["over no cache", "over every layer trained"]


def cached_step(rows: Sequence[Row], isa: str) -> str:
    """Steps that train the prefix of the upper layers, from kept activations."""
    lines = []
    for row in rows:
        case = row.case
        name = [case["model"], case["data"]]
        if row.skipped:
            lines.append(skipped(name, row, len(CACHED)))
            continue
        lines.append(
            [*name, model(case)[1], f"{case['tokens']} of {case['B'] * case['T']}"]
            + [f"{case['first']} of {case['layers']}", milliseconds(row.seconds())]
            + [over(row, "bare model", targets.cached_over_bare(case)), spread(row, "bare model")]
            + [over(row, "without a cache"), over(row, "every layer trained")]
        )
    return markdown(CACHED, lines)


SHARED = ["model", "data", "B,T,P", "tokens", "in the tree", "tree, ms", "over packed", "spread", "over bare, padded"]


def shared_texts(rows: Sequence[Row], isa: str) -> str:
    """Steps on examples that begin alike, as a tree."""
    lines = []
    for row in rows:
        case = row.case
        name = [case["model"], case["data"]]
        if row.skipped:
            lines.append(skipped(name, row, len(SHARED)))
            continue
        lines.append(
            [*name, model(case)[1], str(case["tokens"]), str(case["nodes"]), milliseconds(row.seconds())]
            + [over(row, "packed", targets.FASTER), spread(row, "packed"), over(row, "bare model")]
        )
    return markdown(SHARED, lines)


def profile(rows: Sequence[Row], isa: str) -> str:
    """Where a step goes, by parts."""
    lines = []
    for row in rows:
        for name, parts in row.runs[0]["milliseconds"].items():
            figures = [row.part(name, part) for part in parts]
            name_and_case = [*model(row.case), dtype(row.case), name]
            lines.append([*name_and_case, *(milliseconds(x / 1000) for x in (*figures, sum(figures)))])
    parts = list(next(iter(rows[0].runs[0]["milliseconds"].values())))
    return markdown(["model", "B,T,P", "dtype", "training", *(f"{part}, ms" for part in parts), "all, ms"], lines)


def generation(rows: Sequence[Row], isa: str) -> str:
    """Greedy generation."""
    lines = [
        [*model(r.case), str(r.case["new"]), r.case["kind"], milliseconds(r.seconds())]
        + [f"{r.worst(name):.2f} ({between(r.spread(name))})" for name in ("bare model", "PEFT")]
        for r in rows
    ]
    return markdown(["model", "B,T,P", "new tokens", "what", "ms", "over bare", "over PEFT"], lines)


def files(rows: Sequence[Row], isa: str) -> str:
    """Saving and loading."""
    lines = [
        [r.case["model"], str(r.case["P"]), r.case["what"], milliseconds(r.seconds())]
        + [f"{r.worst('PEFT'):.2f} ({between(r.spread('PEFT'))})"]
        for r in rows
    ]
    return markdown(["model", "P", "what", "ms", "over PEFT"], lines)


def saved_by_model(rows: Sequence[Row], isa: str) -> str:
    """Bytes that a whole model keeps for its backward."""
    lines = []
    for row in rows:
        bare = row.bytes("bare model")
        for name in row.names("bytes"):
            lines.append([*model(row.case), name, f"{row.bytes(name) / MIB:.1f}", f"{row.bytes(name) / bare:.2f}"])
    return markdown(["model", "B,T,P", "training", "MiB kept", "of bare"], lines)


def peak(rows: Sequence[Row], isa: str) -> str:
    """Peak resident memory of a step."""
    lines = []
    for row in rows:
        peaks: dict[str, list[int]] = {}
        for run in row.runs:
            for name, values in run["bytes_above_start"].items():
                peaks.setdefault(name, []).extend(values)
        bare = min(peaks["bare model"])
        for name, values in peaks.items():
            # Before the first step the parameters are there; their gradients and two moments are not.
            own = row.all("state_bytes", name)[0] * 3 // 4
            target = targets.PEAK if name == "prefixcore prefix" else None
            lines.append(
                [*model(row.case), name, f"{max(values) / MIB:.0f}", f"{min(values) / MIB:.0f}", f"{own / MIB:.1f}"]
                + [judged(max(values) / (bare + own), target)]
            )
    header = ["model", "B,T,P", "training", "MiB above the start", "least of the runs", "its own state, MiB"]
    return markdown([*header, "over bare and its own state"], lines)
