"""What the repository's front page says of the kept results: the claim, the CPUs' table, the GPU's, the demo's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from .cells import NOTHING, markdown
from .gpu.kept import Info, Session
from .model_tables import packed_kind
from .runs import Machine, Row

Which = Callable[[Row], bool]
RAGGED = "lengths of 16 to 1024"


def trained_attention(row: Row) -> bool:
    """Forward and backward in float32."""
    return row.case["backward"] and row.case["dtype"] == "fp32"


def steps_of(length: int, dtype: str = "fp32", rows: int = 1) -> Which:
    """Whole steps on so many texts of so many tokens."""
    return lambda row: (row.case["T"], row.case.get("dtype", "fp32"), row.case["B"]) == (length, dtype, rows)


def packed(data: str) -> Which:
    """Packed steps with a prefix on such data."""
    return lambda row: row.case["data"] == data and packed_kind(row) == "prefix"


LINES: tuple[tuple[str, str, Which, tuple[tuple[str, str], ...]], ...] = (
    ("attention", "attention", trained_attention, (("PEFT's way", "concatenated"), ("no prefix", "bare"))),
    *(
        (name, "step", which, (("PEFT", "PEFT prefix"), ("bare model", "bare model")))
        for name, which in (
            ("training step, 1,024 tokens", steps_of(1024)),
            ("the same in bfloat16", steps_of(1024, "bf16")),
            ("training step, 128 tokens", steps_of(128)),
            ("training step, 8 texts of 8 tokens", steps_of(8, rows=8)),
        )
    ),
    (
        "training step, texts of 16 to 1,024 tokens, packed",
        "packed step",
        packed(RAGGED),
        (("PEFT, padded", "PEFT prefix"),),
    ),
    (
        "training step, the demo's short texts, packed",
        "packed step",
        packed("the demo"),
        (("PEFT, padded", "PEFT prefix"),),
    ),
)
"""What is timed, its table, which of its rows, and what it is measured beside: by our name and by the table's."""


def figures(machine: Machine, table: str, which: Which, reference: str) -> list[float]:
    """Our time over the reference's in such rows: of several runs the worst."""
    rows = [row for row in machine.tables.get(table, ()) if row.runs and which(row)]
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
    for name, table, which, references in LINES:
        for place, (label, reference) in enumerate(references):
            cells = [span(figures(machine, table, which, reference)) for machine in here]
            if set(cells) != {NOTHING}:
                lines.append([name if place == 0 else "", label, *cells])
    return markdown(["forward and backward", "over", *(f"{machine.name} ({machine.isa})" for machine in here)], lines)


def gpu_ratio(rows: Iterable[Info], virtual: int, reference: str) -> float | None:
    """Our time over the reference's in the training row with so many virtual tokens."""
    for info in rows:
        training = info["case"].get("backward", True) and not info["case"].get("checkpointing", False)
        if training and info["case"]["P"] == virtual and reference in info["ratios"]:
            return float(info["ratios"][reference]["of_minima"])
    return None


def gpu(found: Sequence[Session]) -> str:
    """Our time over the other's, a column a length of the prefix."""
    parts = []
    for session in found:
        groups: dict[str, list[Info]] = {"attention": session.rows.get("gpu attention", [])}
        for info in session.rows.get("gpu step", ()):
            groups.setdefault(f"training step, {info['case']['model']}", []).append(info)
        lengths = sorted({info["case"]["P"] for rows in groups.values() for info in rows})
        lines = []
        for name, rows in groups.items():
            attention = name == "attention"
            others = (("PEFT's way", "concatenated"), ("no prefix", "bare")) if attention else LINES[1][3]
            for place, (label, reference) in enumerate(others):
                ratios = [gpu_ratio(rows, virtual, reference) for virtual in lengths]
                cells = [NOTHING if ratio is None else f"{ratio:.2f}" for ratio in ratios]
                lines.append([name if place == 0 else "", label, *cells])
        header = ["bfloat16, T = 2,048", "over", *(f"P = {virtual:,}" for virtual in lengths)]
        tests = session.tests
        passed = tests["tests"] - tests["failures"] - tests["errors"] - tests["skipped"]
        said = f"{session.device.split(',')[0]}: {passed} of {tests['tests']} tests passed, {tests['skipped']} skipped."
        parts.append(f"{markdown(header, lines)}\n\n{said}")
    return "\n\n".join(parts)


def claim(found: Sequence[Machine], sessions: Sequence[Session]) -> str:
    """What training with a prefix gains, a line a kind of machine."""
    here = measured_whole(found)

    def over(line: int, reference: int, power: int = 1, form: str = ".2f") -> str:
        _, table, which, references = LINES[line]
        ratios = [x for machine in here for x in figures(machine, table, which, references[reference][1])]
        return span((x**power for x in ratios), form)

    lines = [
        f"- **On a CPU**, attention with a prefix runs **{over(0, 0, -1, '.1f')} times** as fast as PEFT's way. A "
        f"training step on 1,024 tokens runs **{over(1, 0, -1, '.1f')} times** as fast as PEFT's "
        f"({over(2, 0, -1, '.1f')} in bfloat16), in {over(1, 1)} of the time that the frozen model takes without any "
        f"virtual tokens; on texts of many lengths, packed, **{over(5, 0, -1, '.1f')} times**."
    ]
    steps = [info for session in sessions for info in session.rows.get("gpu step", ())]
    ratios = {
        name: [
            ratio
            for model in {info["case"]["model"] for info in steps}
            if (ratio := gpu_ratio([info for info in steps if info["case"]["model"] == model], 64, name)) is not None
        ]
        for name in ("PEFT prefix", "bare model")
    }
    if ratios["PEFT prefix"]:
        faster = span((1 / x for x in ratios["PEFT prefix"]), ".1f")
        device = sessions[0].device.split(",")[0]
        lines.append(
            f"- **On an {device}**, a training step of models of 1 and 8 billion parameters runs **{faster} times** as "
            f"fast as PEFT's, in {span(ratios['bare model'])} times the time without virtual tokens."
        )
    return "\n".join(lines)


def demo(summary: str) -> str:
    """The table of results in what the demo printed at its end."""
    lines = summary.splitlines()
    rule = next(place for place, line in enumerate(lines) if set(line) == {"-", " "})
    table = lines[rule - 1 : lines.index("", rule)]
    header, _, *rows = [re.split(r"\s{2,}", line) for line in table]
    return markdown(header, rows)
