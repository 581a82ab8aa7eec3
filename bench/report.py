"""Tables and pictures from results.

``python -m bench.report show FILE...`` prints the tables of runs that pytest-benchmark wrote (one after the other of
one machine are put together, and the worst is quoted). ``keep FILE... --as NAME`` puts runs of the same things, of one
commit on one machine, into one file in bench/results/. ``render`` rewrites what the pages say between their marks, and
draws the pictures; ``check`` fails if they do not say what the results say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import pictures, runs, tables
from .runs import FOLDER, Machine, machines

BEGIN, END = "<!-- rendered from bench/results -->", "<!-- end of what is rendered -->"
NOTHING = "Nothing has been kept in `bench/results/` yet: `make bench` measures."
Page = Callable[[Sequence[Machine]], str]


def rendered(found: Sequence[Machine]) -> str:
    """All that is said about the kept results."""
    parts = []
    for machine in found:
        names = pictures.shown(machine)
        parts.append("\n\n".join([tables.sections(machine), *(f"![{name}](results/{name})" for name in names)]))
    return "\n\n".join(parts) or NOTHING


def front(found: Sequence[Machine]) -> str:
    """What the repository's front page says of the first machine."""
    return tables.summary(found[0]) if found else NOTHING


HERE = Path(__file__).resolve().parent
PAGES: dict[Path, Page] = {HERE / "README.md": rendered, HERE.parent / "README.md": front}


def with_block(page: Path, block: str) -> tuple[str, str]:
    """The page's text as it is, and with `block` between its marks."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected the marks {BEGIN!r} and {END!r} in {page}")
    return text, f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def disagreements(pages: Mapping[Path, Page] = PAGES, folder: Path = FOLDER) -> list[str]:
    """Where a page or a picture differs from the kept results; nothing if all is well."""
    found = machines(runs.kept(folder))
    wrong = []
    for page, content in pages.items():
        text, right = with_block(page, content(found))
        if text != right:
            wrong.append(f"{page.parent.name}/{page.name} does not say what {folder.name}/ says")
    expected = {name: content for machine in found for name, content in pictures.shown(machine).items()}
    for name, shown in expected.items():
        path = folder / name
        if not path.exists() or pictures.digest_in(path) != pictures.digest(shown):
            wrong.append(f"{name} does not show what {folder.name}/ says")
    wrong += [f"{p.name} belongs to no result" for p in sorted(folder.glob("*.png")) if p.name not in expected]
    return wrong


def render(pages: Mapping[Path, Page] = PAGES, folder: Path = FOLDER) -> None:
    """Make `disagreements` go away."""
    found = machines(runs.kept(folder))
    drawn = {path for machine in found for path in pictures.draw(machine, folder)}
    for path in set(folder.glob("*.png")) - drawn:
        path.unlink()
    for page, content in pages.items():
        page.write_text(with_block(page, content(found))[1], encoding="utf-8")


def keep_together(found: Sequence[Mapping[str, Any]], name: str, folder: Path = FOLDER) -> None:
    """Write runs to one file of `folder`, in the place of what is there by that name."""
    others = [path for path in sorted(folder.glob("*.json")) if path.stem != name]
    machines([*runs.read_all(others), *runs.together(found)])  # refuses what cannot be rendered
    folder.mkdir(exist_ok=True)
    runs.write(found, folder / f"{name}.json")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print the tables of these runs")
    show.add_argument("files", nargs="+", type=Path)
    keep = commands.add_parser("keep", help="put runs into one file in bench/results/")
    keep.add_argument("files", nargs="+", type=Path)
    keep.add_argument("--as", dest="name", required=True, help="the file's name there, without .json")
    commands.add_parser("render", help="rewrite the pages and draw the pictures")
    commands.add_parser("check", help="fail if they do not agree with the results")
    options = parser.parse_args(arguments)

    if options.command == "show":
        for machine in machines(runs.read_all(options.files)):
            print(tables.sections(machine), end="\n\n")
    elif options.command == "keep":
        keep_together(runs.read_all(options.files), options.name)
    elif options.command == "render":
        render()
    else:
        for line in (wrong := disagreements()):
            print(f"{line}: run 'python -m bench.report render'", file=sys.stderr)
        return int(bool(wrong))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
