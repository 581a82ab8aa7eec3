"""Where the time of one step goes: `python -m bench.steps.profile [CONTENDER ...]`.

Prints, for each way of training, the operators that take most of a step by themselves, as milliseconds a step. The
suite notes the same by parts of a step (`test_profile.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from torch.profiler import ProfilerActivity, profile

from bench import models
from bench.steps.contenders import MAKERS, Contender, Step

Operator = tuple[str, float, int]  # name, milliseconds of its own a step, calls a step
DEFAULT = ("prefixcore prefix", "bare model", "PEFT prefix")
SHAPES = {shape.name: shape for shape in (*models.TINY, *models.SMALL, models.SMOLLM2_135M, *models.LARGE)}
REST = "the rest"
PARTS = {
    "attention": ("attention",),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn"),
    "copies and masks": ("cat", "copy", "clone", "fill", "zero", "index", "slice", "repeat", "where", "mask"),
    "logits' loss": ("softmax", "nll_loss"),
    REST: (),
}
"""Part of a step to what the names of its operators have in them; an operator belongs to the first that fits."""


def operators(contender: Contender, steps: int) -> list[Operator]:
    """The longest first."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(steps):
            contender.step()
    rows: Any = profiled.key_averages()
    found = [(row.key, row.self_cpu_time_total / 1000 / steps, row.count // steps) for row in rows]
    return sorted(found, key=lambda row: -row[1])


def part_of(operator: str) -> str:
    name = operator.lower()
    return next((part for part, words in PARTS.items() if any(word in name for word in words)), REST)


def total(found: Sequence[Operator]) -> float:
    return sum(milliseconds for _, milliseconds, _ in found)


def parts(contender: Contender, steps: int) -> dict[str, float]:
    """Milliseconds of each part of the quickest of some steps; the first, which warms up, does not count."""
    contender.step()
    best = min((operators(contender, 1) for _ in range(steps)), key=total)
    sums = dict.fromkeys(PARTS, 0.0)
    for operator, milliseconds, _ in best:
        sums[part_of(operator)] += milliseconds
    return sums


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.steps.profile", description=__doc__.split("\n", 1)[0])
    parser.add_argument("contenders", nargs="*", default=list(DEFAULT), metavar="CONTENDER", help=", ".join(MAKERS))
    parser.add_argument("--model", default=models.SMALL[0].name, choices=SHAPES)
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--virtual", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=12)
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.contenders if name not in MAKERS]:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(MAKERS)}")

    shape = SHAPES[options.model]
    step = Step(shape, options.batch, options.length, options.virtual, dtype=options.dtype)
    model, batch = step.model(), step.batch()
    for name in options.contenders:
        contender = MAKERS[name](model, batch, options.virtual)
        contender.step()
        rows = operators(contender, options.steps)
        print(f"\n{name}: {total(rows):.2f} ms a step on {shape.name}")
        for operator, milliseconds, calls in rows[: options.rows]:
            print(f"{milliseconds:10.2f} ms {milliseconds / total(rows):6.1%} {calls:6d} x  {operator}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
