"""Tables, pages and pictures from results.

`python -m bench.report show FILE...` prints the tables of runs that pytest-benchmark wrote (one after the other of one
machine are put together, and the worst is quoted). `keep FILE... --as NAME` puts runs of the same things, of one commit
on one machine, into one file in bench/results/; `keep-gpu FOLDER --as NAME` keeps what `make gpu` left. `render`
rewrites what the pages say between their marks, and draws the pictures; `check` fails if they do not say what the
results say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import front, front_picture, pages, pictures, runs, tables
from .gpu import kept as gpu
from .gpu import page as gpu_page
from .runs import FOLDER, Machine, machines

NOTHING = "Nothing has been kept in `bench/results/` yet: `make bench` measures."
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Kept:
    """All that the pages are rendered from."""

    machines: Sequence[Machine]
    sessions: Sequence[gpu.Session] = ()
    demo: str = ""


def load(folder: Path = FOLDER) -> Kept:
    """The results in `folder`, the GPU's, and what the demo printed."""
    return Kept(machines(runs.kept(folder)), gpu.sessions(), pages.read(HERE / "demo" / "summary.txt"))


def results(kept: Kept) -> str:
    """All that is said about the CPUs' results: a contents list, and the tables and pictures of each machine."""
    if not kept.machines:
        return NOTHING
    parts = ["\n".join(f"- [{machine.title}](#{pages.anchor(machine.title)})" for machine in kept.machines)]
    for machine in kept.machines:
        shown = [f"![{machine.title}: {pictures.kind_of(name)}](../results/{name})" for name in pictures.shown(machine)]
        parts += [tables.of_machine(machine), *shown]
    return "\n\n".join(parts)


Page = dict[str, Callable[[Kept], str]]
"""What is rendered, by the names of the marks around it."""
PAGES: Mapping[Path, Page] = {
    HERE / "docs" / "results.md": {"CPUs": results},
    HERE / "gpu" / "README.md": {
        "parts": lambda kept: gpu_page.parts_table(),
        "goals": lambda kept: gpu_page.goals_table(kept.sessions),
        "GPUs": lambda kept: gpu_page.rendered(kept.sessions),
    },
    HERE.parent / "README.md": {
        "claim": lambda kept: front.claim(kept.machines, kept.sessions),
        "picture": lambda kept: front_picture.element(kept.machines, kept.sessions),
        "demo": lambda kept: front.demo(kept.demo),
        "benchmarks": lambda kept: front.benchmarks(kept.machines),
        "GPU": lambda kept: front.gpu(kept.sessions),
    },
}


def right(page: Path, content: Page, kept: Kept) -> str:
    """The page's text as it should be."""
    parts = {name: part(kept) for name, part in content.items()}
    return pages.with_parts(pages.read(page), parts, str(page))


def disagreements(content: Mapping[Path, Page] = PAGES, folder: Path = FOLDER) -> list[str]:
    """Where a page or a picture differs from the kept results; nothing if all is well."""
    kept = load(folder)
    wrong = [
        f"{page.parent.name}/{page.name} does not say what {folder.name}/ says"
        for page, parts in content.items()
        if pages.read(page) != right(page, parts, kept)
    ]
    drawn = {
        where / name: shown for found, where in places(kept, folder) for name, shown in pictures.shown(found).items()
    }
    for path, shown in drawn.items():
        if not path.exists() or pictures.digest_in(path) != pictures.digest(shown):
            wrong.append(f"{path.name} does not show what {path.parent.name}/ says")
    written = front_picture.pictures(kept.machines, kept.sessions, folder)
    for path, shown in written.items():
        if not path.exists() or pages.read(path) != shown:
            wrong.append(f"{path.name} does not show what {folder.name}/ says")
    strange = [path for path in there(folder) if path not in {*drawn, *written}]
    return [*wrong, *(f"{path.name} belongs to no result" for path in strange)]


def places(kept: Kept, folder: Path) -> list[tuple[pictures.Found, Path]]:
    """What pictures are drawn of, each with the folder that they stand in."""
    return [*((machine, folder) for machine in kept.machines), *((session, gpu.FOLDER) for session in kept.sessions)]


def there(folder: Path) -> list[Path]:
    """All pictures that stand there, the GPU's too."""
    return [
        path for where in (folder, gpu.FOLDER) for kind in ("png", "svg") for path in sorted(where.glob(f"*.{kind}"))
    ]


def render(content: Mapping[Path, Page] = PAGES, folder: Path = FOLDER) -> None:
    """Make `disagreements` go away."""
    kept = load(folder)
    drawn = {path for found, where in places(kept, folder) for path in pictures.draw(found, where)}
    written = front_picture.pictures(kept.machines, kept.sessions, folder)
    for path in set(there(folder)) - drawn - set(written):
        path.unlink()
    for page, parts in content.items():
        page.write_text(right(page, parts, kept), encoding="utf-8")
    for path, shown in written.items():
        path.write_text(shown, encoding="utf-8")


def keep_together(found: Sequence[Mapping[str, Any]], name: str, folder: Path = FOLDER) -> None:
    """Write runs to one file of `folder`, in the place of what is there by that name."""
    others = [path for path in sorted(folder.glob("*.json")) if path.stem != name]
    machines([*runs.read_all(others), *runs.together(found)])  # refuses what cannot be rendered
    folder.mkdir(exist_ok=True)
    runs.write(found, folder / f"{name}.json")


def parser() -> argparse.ArgumentParser:
    """The commands."""
    result = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").split("\n", 1)[0])
    commands = result.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print the tables of these runs")
    show.add_argument("files", nargs="+", type=Path)
    keep = commands.add_parser("keep", help="put runs into one file in bench/results/")
    keep.add_argument("files", nargs="+", type=Path)
    keep.add_argument("--as", dest="name", required=True, help="the file's name there, without .json")
    keep_gpu = commands.add_parser("keep-gpu", help="put what `make gpu` left into bench/gpu/results/")
    keep_gpu.add_argument("folder", type=Path)
    keep_gpu.add_argument("--as", dest="name", required=True, help="how its files' names begin there, e.g. h200")
    commands.add_parser("render", help="rewrite the pages and draw the pictures")
    commands.add_parser("check", help="fail if they do not agree with the results")
    return result


def run(options: argparse.Namespace) -> int:
    """Run a command; returns the exit status."""
    if options.command == "show":
        for machine in machines(runs.read_all(options.files)):
            print(tables.of_machine(machine), end="\n\n")
    elif options.command == "keep":
        keep_together(runs.read_all(options.files), options.name)
    elif options.command == "keep-gpu":
        gpu.keep(options.folder, options.name)
    elif options.command == "render":
        render()
    else:
        for line in (wrong := disagreements()):
            print(f"{line}: run 'python -m bench.report render'", file=sys.stderr)
        return int(bool(wrong))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what is wrong with the files that it was given is said without a traceback."""
    options = parser().parse_args(arguments)
    try:
        return run(options)
    except (OSError, ValueError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
