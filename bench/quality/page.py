"""docs/quality.md and its pictures, from the records and from what was measured beside them."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench import pages, pictures
from bench.cells import markdown

from . import drawings, goals, known, plan, records, sustained, tables
from .records import Record
from .starts import FILE, best_draw
from .tables import TITLES

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "quality.md"
ASSETS = ROOT / "docs" / "assets"
RESULTS = Path(__file__).parent / "results"


def starts() -> str:
    """What each start is worth untrained; of several draws, the mean, and the one that is taken."""
    if not FILE.exists():
        return "Not run: `python -m bench.quality.starts`."
    found = json.loads(FILE.read_text(encoding="utf-8"))
    tasks = [task for task in TITLES if any(each["task"] == task for each in found)]
    rows = []
    for name in dict.fromkeys(each["start"].partition(", draw")[0] for each in found):
        means, taken = [], []
        for task in tasks:
            mine = [each for each in found if each["task"] == task and each["start"].partition(", draw")[0] == name]
            means.append(f"{100 * statistics.mean(each['share'] for each in mine):.0f}" if mine else "-")
            taken.append(f"{100 * best_draw(mine)['share']:.0f}" if mine else "-")
        if draws := len({each["start"] for each in found if each["start"].startswith(f"{name}, draw")}):
            rows += [[f"{name}: mean of {draws} draws", *means], [f"{name}: the draw that is taken", *taken]]
        else:
            rows.append([name, *taken])
    return markdown(("% right, untrained", *(TITLES[task] for task in tasks)), rows)


def what_is_known() -> str:
    """How many of the capitals the model knows, however it is asked."""
    if not known.FILE.exists():
        return "Not run: `python -m bench.quality.known`."
    kept = json.loads(known.FILE.read_text(encoding="utf-8"))
    found = {way: kept[way] for way in known.WAYS}
    either = sum("1" in each for each in zip(*found.values(), strict=True))
    count = len(next(iter(found.values())))
    said = ", ".join(
        f"asked in {'its chat template' if way == 'chat' else 'a sentence'} it knows {right.count('1')}"
        for way, right in found.items()
    )
    return f"Of the {count} held-out capitals: {said}, one way or the other {either} ({100 * either / count:.0f} %)."


def holding() -> str:
    """The share of capital letters in each 25 tokens."""
    if not sustained.FILE.exists():
        return "Not run: `python -m bench.quality.sustained`."
    found = json.loads(sustained.FILE.read_text(encoding="utf-8"))
    ends = range(sustained.WINDOW, sustained.TOKENS + 1, sustained.WINDOW)
    rows = []
    for name in sustained.METHODS:
        mine = [each["windows"] for each in found if each["method"] == name]
        if mine:
            shares = [f"{100 * statistics.mean(window):.0f}" for window in zip(*mine, strict=True)]
            rows.append([name, str(len(mine)), *shares])
    return markdown(("% capital letters, up to token", "seeds", *map(str, ends)), rows)


def encoder() -> str:
    """Sentence sentiment on MiniLM, from what bench/quality/encoder.py kept."""
    file = RESULTS / "encoder.json"
    if not file.exists():
        return "Not run: `python -m bench.quality.encoder --data DIR --out bench/quality/results/encoder.json`."
    found = json.loads(file.read_text(encoding="utf-8"))
    rows = []
    for method in dict.fromkeys(each["method"] for each in found):
        mine = [each for each in found if each["method"] == method]
        best = [
            max((each for each in mine if each["seed"] == seed), key=lambda each: each["development"])
            for seed in sorted({each["seed"] for each in mine})
        ]
        shares = [each["test"] for each in best]
        row = [method, f"{best[0]['numbers']:,}", f"{100 * statistics.mean(shares):.1f}"]
        rows.append([*row, ", ".join(f"{100 * share:.1f}" for share in shares)])
    return markdown(("MiniLM, movie reviews", "numbers trained", "% right, mean", "each seed"), rows)


PARTS: Mapping[str, Callable[[Sequence[Record]], str]] = {
    "where others win": tables.where_others_win,
    "summary": tables.summary,
    "goals": goals.table,
    "setting": tables.setting,
    "tables": lambda kept: tables.of_tasks(kept, plan.MAIN),
    "levers": tables.levers,
    "seconds": lambda kept: tables.equal_seconds(),
    "starts": lambda kept: starts(),
    "known": lambda kept: what_is_known(),
    "holding": lambda kept: holding(),
    "encoder": lambda kept: encoder(),
    "missing": lambda kept: tables.missing(),
}


def right(kept: Sequence[Record]) -> str:
    """The page as it should be."""
    return pages.with_parts(pages.read(PAGE), {name: part(kept) for name, part in PARTS.items()}, str(PAGE))


def render(*, check: bool) -> int:
    """Write the page and draw its pictures, or with `check` only say whether they are as they should be."""
    kept = records.read()
    wrong = [PAGE] if pages.read(PAGE) != right(kept) else []
    for name, content, draw in drawings.contents(kept):
        path = ASSETS / name
        if not path.exists() or pictures.digest_in(path) != pictures.digest(content):
            wrong.append(path)
            if not check:
                stamp = {pictures.DIGEST: pictures.digest(content)}
                draw(content).savefig(path, dpi=110, bbox_inches="tight", metadata=stamp)
    if not check:
        PAGE.write_text(right(kept), encoding="utf-8")
        return 0
    for path in wrong:
        print(f"{path.name} is not what the records say: run 'python -m bench.quality render'", file=sys.stderr)
    return int(bool(wrong))
