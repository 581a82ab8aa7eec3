"""Where the time of one step goes: ``python -m bench.steps.profile [CONTENDER ...]``.

Prints, for each way of training, the operators that take most of a step by themselves, as milliseconds a step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from torch.profiler import ProfilerActivity, profile

from bench import models
from bench.steps.contenders import MAKERS, Contender

DEFAULT = ("prefixcore prefix", "bare model", "PEFT prefix")
SHAPES = {shape.name: shape for shape in (*models.TINY, *models.SMALL, models.SMOLLM2_135M)}


def operators(contender: Contender, steps: int) -> list[tuple[str, float, int]]:
    """(name, milliseconds of its own a step, calls a step), the longest first."""
    contender.step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(steps):
            contender.step()
    rows: Any = profiled.key_averages()
    found = [(row.key, row.self_cpu_time_total / 1000 / steps, row.count // steps) for row in rows]
    return sorted(found, key=lambda row: -row[1])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.steps.profile", description=__doc__.split("\n", 1)[0])
    parser.add_argument("contenders", nargs="*", default=list(DEFAULT), metavar="CONTENDER", help=", ".join(MAKERS))
    parser.add_argument("--model", default=models.SMALL[0].name, choices=SHAPES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--virtual", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=12)
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.contenders if name not in MAKERS]:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(MAKERS)}")

    shape = SHAPES[options.model]
    model = models.make(shape, positions=options.length + options.virtual)
    batch = models.batch(shape, options.batch, options.length)
    for name in options.contenders:
        rows = operators(MAKERS[name](model, batch, options.virtual), options.steps)
        total = sum(milliseconds for _, milliseconds, _ in rows)
        print(f"\n{name}: {total:.2f} ms a step on {shape.name}")
        for operator, milliseconds, calls in rows[: options.rows]:
            print(f"{milliseconds:10.2f} ms {milliseconds / total:6.1%} {calls:6d} x  {operator}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
