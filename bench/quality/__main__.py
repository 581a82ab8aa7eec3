"""What each method learns: `python -m bench.quality run`, then `render`.

`run` runs the cells that are missing (with `--seconds N` those of a budget of seconds), `list` names them, `render`
writes the page and draws its pictures, and `check` fails if they are not what the records say.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bench.demo.base_model import DemoError

from . import plan, records
from .methods import METHODS
from .sources import SourceError
from .tasks import TASKS


def names(known: Iterable[str], what: str) -> Callable[[str], list[str]]:
    """An argparse type: some of the `known` names with commas between them."""

    def parse(text: str) -> list[str]:
        given = [each for each in text.split(",") if each]
        if wrong := [each for each in given if each not in known]:
            raise argparse.ArgumentTypeError(f"no {what} {wrong[0]!r}; there are {', '.join(known)}")
        return given

    return parse


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.partition("\n")[0])
    result.add_argument("what", choices=("run", "render", "check", "list"))
    result.add_argument("--parts", type=names(TASKS, "part"), default=list(TASKS), help="tasks (default: all)")
    result.add_argument("--methods", type=names(METHODS, "method"), help=f"default: all, or {', '.join(plan.TIMED)}")
    result.add_argument(
        "--seconds",
        type=int,
        choices=range(1, 101),
        metavar="N",
        help="train for N times the CPU seconds of our prefix's steps, measured first, in place of as many steps",
    )
    result.add_argument(
        "--seeds",
        type=int,
        choices=range(1, plan.SEEDS + 1),
        help=f"the first so many (default: {plan.SEEDS}, or 1 with --seconds)",
    )
    result.add_argument("--first-rate", action="store_true", help="of each method only the first learning rate")
    result.add_argument("--minutes", type=float, help="begin no cell after as many")
    result.add_argument("--out", type=Path, help=f"where records go (default: {records.FOLDER}, or {records.TIMED}/xN)")
    return result


def resolved(options: argparse.Namespace) -> argparse.Namespace:
    """The options with the defaults that depend on the budget."""
    options.methods = options.methods or (list(METHODS) if options.seconds is None else list(plan.TIMED))
    options.out = options.out or (records.FOLDER if options.seconds is None else records.folder_of(options.seconds))
    options.seeds = options.seeds or (plan.SEEDS if options.seconds is None else 1)
    return options


def missing(options: argparse.Namespace, *, all_seeds: bool = False) -> Iterator[records.Cell]:
    """The cells that were asked for and have not been run."""
    return plan.missing(
        options.parts,
        options.methods,
        options.out,
        all_seeds=all_seeds,
        num_seeds=options.seeds,
        first_rate=options.first_rate,
        chosen_in=None if options.seconds is None else records.FOLDER,
    )


def run(options: argparse.Namespace) -> None:
    """Run what is missing, each cell's record written as it comes."""
    import torch

    from bench.demo import base_model

    from . import cells

    warnings.simplefilter("ignore")
    began = time.monotonic()
    model, tokenizer = base_model.load()
    model = model.to(torch.bfloat16)
    tasks = {name: TASKS[name]() for name in options.parts}
    budgets: dict[str, cells.Budget] = {}
    for done, cell in enumerate(missing(options)):
        minutes = (time.monotonic() - began) / 60
        if options.minutes is not None and minutes >= options.minutes:
            print(f"[{minutes:5.1f} min] stopped after {done} cells; the same command goes on", flush=True)
            return
        if options.seconds is not None and cell.task not in budgets:
            seconds = cells.seconds_of(METHODS["prefix"], tasks[cell.task], model, tokenizer)
            print(f"[{minutes:5.1f} min] {cell.task}: our prefix takes {seconds:.1f} CPU s", flush=True)
            budgets[cell.task] = cells.Budget(seconds=options.seconds * seconds)
        start = time.monotonic()
        task, budget = tasks[cell.task], budgets.get(cell.task)
        record = cells.run(cell, METHODS[cell.method], task, model, tokenizer, budget)
        records.write(record, options.out)
        rate = f"lr {cell.rate:g}" if cell.rate else ""
        print(
            f"[{minutes:5.1f} min] {cell.task:11} {cell.method:20} seed {cell.seed} {rate:9} validation "
            f"{record.validation:6.1%} test {record.share:6.1%} loss {record.loss:.3f}  {record.steps} steps, "
            f"{record.cpu_seconds_a_step or 0:.2f} CPU s a step, {time.monotonic() - start:.0f} s",
            flush=True,
        )


def main() -> int:
    """Returns the exit status."""
    options = resolved(parser().parse_args())
    try:
        if options.what == "run":
            run(options)
        elif options.what == "list":
            for cell in missing(options, all_seeds=True):
                print(cell.file)
        else:
            from . import page

            return page.render(check=options.what == "check")
    except (DemoError, SourceError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nquality: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
