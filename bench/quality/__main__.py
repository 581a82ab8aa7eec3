"""What each method learns: `python -m bench.quality run`, then `render`.

`run` runs the cells that are missing, `list` names them, `render` writes the page and draws its pictures, and `check`
fails if they are not what the records say.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterable
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
    result.add_argument("--methods", type=names(METHODS, "method"), default=list(METHODS), help="default: all")
    result.add_argument("--minutes", type=float, help="begin no cell after as many")
    result.add_argument("--out", type=Path, default=records.FOLDER, help="where records go (default: %(default)s)")
    return result


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
    for done, cell in enumerate(plan.missing(options.parts, options.methods, options.out)):
        minutes = (time.monotonic() - began) / 60
        if options.minutes is not None and minutes >= options.minutes:
            print(f"[{minutes:5.1f} min] stopped after {done} cells; the same command goes on", flush=True)
            return
        start = time.monotonic()
        record = cells.run(cell, METHODS[cell.method], tasks[cell.task], model, tokenizer)
        records.write(record, options.out)
        rate = f"lr {cell.rate:g}" if cell.rate else ""
        print(
            f"[{minutes:5.1f} min] {cell.task:11} {cell.method:20} seed {cell.seed} {rate:9} validation "
            f"{record.validation:6.1%} test {record.share:6.1%} loss {record.loss:.3f}  "
            f"{record.cpu_seconds_a_step or 0:.2f} CPU s a step, {time.monotonic() - start:.0f} s",
            flush=True,
        )


def main() -> int:
    """Returns the exit status."""
    options = parser().parse_args()
    try:
        if options.what == "run":
            run(options)
        elif options.what == "list":
            for cell in plan.missing(options.parts, options.methods, options.out, all_seeds=True):
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
