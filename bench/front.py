"""What the repository's front page says of the kept results: the claim, the CPUs' table, the GPU's, the demo's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from .cells import NOTHING, markdown
from .gpu.contents import BASE, is_of
from .gpu.kept import Session
from .model_tables import packed_kind
from .runs import Machine, Row

Which = Callable[[Row], bool]
RAGGED = "lengths of 16 to 1024"
GPU_LENGTH = 2048


def trained_attention(row: Row) -> bool:
    """Forward and backward in float32."""
    return row.case["backward"] and row.case["dtype"] == "fp32"


def steps_of(length: int, dtype: str = "fp32", rows: int = 1) -> Which:
    """Whole steps on so many texts of so many tokens."""
    return lambda row: (row.case["T"], row.case.get("dtype", "fp32"), row.case["B"]) == (length, dtype, rows)


def packed(data: str) -> Which:
    """Packed steps with a prefix on such data."""
    return lambda row: row.case["data"] == data and packed_kind(row) == "prefix"


class Line(NamedTuple):
    """What is timed.

    Attributes:
        name: what it is, in words.
        table: where its rows are.
        which: which of them.
        beside: what it is measured beside: our word, and the table's.
    """

    name: str
    table: str
    which: Which
    beside: tuple[tuple[str, str], ...]


MODELS = (("PEFT", "PEFT prefix"), ("bare model", "bare model"))
OPS = (("PEFT's way", "concatenated"), ("no prefix", "bare"))
PADDED = (("PEFT, padded", "PEFT prefix"),)

ATTENTION = Line("attention, 128 to 2,048 tokens", "attention", trained_attention, OPS)
STEP = Line("training step, 1,024 tokens", "step", steps_of(1024), MODELS)
STEP_BF16 = Line("the same in bfloat16", "step", steps_of(1024, "bf16"), MODELS)
SHORT_STEP = Line("training step, 128 tokens", "step", steps_of(128), MODELS)
TINY_STEP = Line("training step, 8 texts of 8 tokens", "step", steps_of(8, rows=8), MODELS)
PACKED = Line("training step, texts of 16 to 1,024 tokens, packed", "packed step", packed(RAGGED), PADDED)
DEMO = Line("training step, the demo's short texts, packed", "packed step", packed("the demo"), PADDED)
LINES = (ATTENTION, STEP, STEP_BF16, SHORT_STEP, TINY_STEP, PACKED, DEMO)


def figures(machine: Machine, line: Line, reference: str) -> list[float]:
    """Our time over the reference's in such rows: of several runs the worst."""
    rows = [row for row in machine.tables.get(line.table, ()) if row.runs and line.which(row)]
    return [row.worst(reference) for row in rows if reference in row.references]


def span(values: Iterable[float], form: str = ".2f") -> str:
    """The least and the greatest, or the one that there is."""
    found = sorted(values)
    if not found:
        return NOTHING
    least, most = format(found[0], form), format(found[-1], form)
    return least if least == most else f"{least} to {most}"


def measured_whole(found: Sequence[Machine]) -> list[Machine]:
    """The machines that more than attention was measured on: with their own instruction set."""
    return [machine for machine in found if "step" in machine.tables]


def benchmarks(found: Sequence[Machine]) -> str:
    """Our time over the other's, a column a machine."""
    here = measured_whole(found)
    lines = []
    for line in LINES:
        for place, (label, reference) in enumerate(line.beside):
            cells = [span(figures(machine, line, reference)) for machine in here]
            if set(cells) != {NOTHING}:
                lines.append([line.name if place == 0 else "", label, *cells])
    return markdown(["forward and backward", "over", *(f"{machine.name} ({machine.isa})" for machine in here)], lines)


def gpu_ratio(rows: Iterable[Row], virtual: int, reference: str) -> float | None:
    """Our time over the reference's in the training row of `GPU_LENGTH` tokens with so many virtual ones."""
    for row in rows:
        training = row.case.get("backward", True) and not row.case.get("checkpointing", False)
        if training and (row.case["T"], row.case["P"]) == (GPU_LENGTH, virtual) and reference in row.references:
            return row.worst(reference)
    return None


def gpu_attention(session: Session) -> list[Row]:
    """The rows of attention that the table is of: one shape, with prefixes of several lengths."""
    return [row for row in session.tables.get("gpu attention", ()) if is_of(row, {**BASE, "T": GPU_LENGTH})]


def gpu_steps(found: Sequence[Session]) -> dict[str, list[Row]]:
    """The rows of whole steps by the model's name."""
    groups: dict[str, list[Row]] = {}
    for session in found:
        for row in session.tables.get("gpu step", ()):
            groups.setdefault(row.case["model"], []).append(row)
    return groups


def gpu(found: Sequence[Session]) -> str:
    """Our time over the other's, a column a length of the prefix."""
    parts = []
    for session in found:
        groups: dict[str, list[Row]] = {"attention": gpu_attention(session)}
        groups |= {f"training step, {model}": rows for model, rows in gpu_steps([session]).items()}
        lengths = sorted({row.case["P"] for rows in groups.values() for row in rows})
        lines = []
        for name, rows in groups.items():
            for place, (label, reference) in enumerate(OPS if name == "attention" else MODELS):
                ratios = [gpu_ratio(rows, virtual, reference) for virtual in lengths]
                cells = [NOTHING if ratio is None else f"{ratio:.2f}" for ratio in ratios]
                lines.append([name if place == 0 else "", label, *cells])
        header = [f"bfloat16, {GPU_LENGTH:,} tokens", "over", *(f"P = {virtual:,}" for virtual in lengths)]
        tests = session.tests
        passed = tests["tests"] - tests["failures"] - tests["errors"] - tests["skipped"]
        said = f"{session.device}: {passed} of {tests['tests']} tests passed, {tests['skipped']} skipped."
        parts.append(f"{markdown(header, lines)}\n\n{said}")
    return "\n\n".join(parts)


def claim(found: Sequence[Machine], sessions: Sequence[Session]) -> str:
    """What training with a prefix gains, a line a kind of machine."""
    here = measured_whole(found)

    def over(line: Line, reference: str) -> list[float]:
        return [x for machine in here for x in figures(machine, line, reference)]

    def times(line: Line, reference: str) -> str:
        return span((1 / x for x in over(line, reference)), ".1f")

    lines = [
        f"- **On a CPU**, attention with a prefix runs **{times(ATTENTION, 'concatenated')} times** as fast as PEFT's "
        f"way. A training step on 1,024 tokens runs **{times(STEP, 'PEFT prefix')} times** as fast as PEFT's "
        f"({times(STEP_BF16, 'PEFT prefix')} in bfloat16), in {span(over(STEP, 'bare model'))} of the time that the "
        f"frozen model takes without any virtual tokens; on texts of many lengths, packed, "
        f"**{times(PACKED, 'PEFT prefix')} times**."
    ]
    groups = gpu_steps(sessions)
    beside_peft, beside_bare = (
        [ratio for rows in groups.values() if (ratio := gpu_ratio(rows, 64, reference)) is not None]
        for _, reference in MODELS
    )
    if beside_peft:
        lines.append(
            f"- **On an {sessions[0].device}**, a training step with 64 virtual tokens ({', '.join(groups)}) runs "
            f"**{span((1 / x for x in beside_peft), '.1f')} times** as fast as PEFT's, in {span(beside_bare)} of the "
            f"time without them."
        )
    return "\n".join(lines)


def demo(summary: str) -> str:
    """The table of results in what the demo printed at its end."""
    lines = summary.splitlines()
    rule = next(place for place, line in enumerate(lines) if set(line) == {"-", " "})
    table = lines[rule - 1 : lines.index("", rule)]
    header, _, *rows = [re.split(r"\s{2,}", line) for line in table]
    return markdown(header, rows)
