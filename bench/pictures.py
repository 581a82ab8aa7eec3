"""Pictures from results: how cost grows, where the targets stand, where a step goes.

Each carries a digest of what it shows. Of several runs, bars with targets show the worst as the tables do; curves and
parts of a step show the median, point by point, since the worst of each would be a curve that nobody measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import drawings
from .cells import REFERENCES, in_order, model, shape
from .gpu import contents as of_gpu
from .gpu.kept import Session
from .runs import FOLDER, Machine, Row
from .targets import over_bare

Found = Machine | Session
DIGEST = "prefixcore-digest"


def growth(machine: Machine) -> dict[str, dict[str, list[list[float]]]]:
    """Axis to name to [[value, ms], ...] of the sweeps."""
    series: dict[str, dict[str, list[list[float]]]] = {}
    rows: Sequence[Row] = [*machine.tables.get("attention sweep", ()), *machine.tables.get("layers", ())]
    for row in sorted(rows, key=lambda row: row.case["value"]):
        for name in ("candidate", *row.references):
            lines = series.setdefault(row.case["axis"], {})
            lines.setdefault(name, []).append([row.case["value"], round(1000 * row.middle(name), 4)])
    return series


def ratios(machine: Machine) -> list[dict[str, Any]]:
    """Forward and backward of the shapes with targets: ratios, and the target over SDPA without a prefix."""
    bars = []
    for row in in_order(machine.tables.get("attention", ())):
        if row.case["backward"]:
            target = over_bare(row.case, machine.isa)
            bars.append(
                {
                    "label": f"{shape(row.case)} {row.case['dtype']}",
                    "over": {name: round(row.worst(name), 3) for name in REFERENCES},
                    "target": target.bound if target else None,
                }
            )
    return bars


def profile(machine: Machine) -> dict[str, dict[str, dict[str, float]]]:
    """Step to way of training to part to milliseconds."""
    return {
        ", ".join(model(row.case)): {
            name: {part: round(row.part(name, part), 3) for part in parts}
            for name, parts in row.runs[0]["milliseconds"].items()
        }
        for row in machine.tables.get("profile", ())
    }


def kinds(found: Found) -> Kinds:
    """What is drawn of a CPU, or of a GPU."""
    return OF_GPU if isinstance(found, Session) else OF_CPU


def shown(found: Found) -> dict[str, Any]:
    """File name to what the picture shows; nothing where nothing was measured."""
    pictures = {f"{found.slug}-{kind}.png": content(found) for kind, (content, _) in kinds(found).items()}
    return {name: content for name, content in pictures.items() if content}


def kind_of(name: str) -> str:
    """What the picture of that file name shows: one of those of `kinds`."""
    return name.removesuffix(".png").rpartition("-")[2]


def digest(content: Any) -> str:
    """Of what a picture shows."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def digest_in(path: Path) -> str | None:
    """The digest that a picture carries."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(DIGEST)


Kinds = Mapping[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]]
"""By the end of the file's name: what the picture shows, and how that is drawn."""
OF_CPU: Kinds = {
    "growth": (growth, drawings.draw_growth),
    "attention": (ratios, drawings.draw_ratios),
    "profile": (profile, drawings.draw_profile),
}
OF_GPU: Kinds = {
    "growth": (of_gpu.growth, drawings.draw_growth),
    "steps": (of_gpu.steps, drawings.draw_steps),
}


def draw(found: Found, folder: Path = FOLDER) -> list[Path]:
    """Draw what is not there yet as it should be; returns the paths of all pictures."""
    paths = []
    for name, content in shown(found).items():
        path = folder / name
        paths.append(path)
        if not path.exists() or digest_in(path) != digest(content):
            _, drawn = kinds(found)[kind_of(name)]
            figure = drawn(content)
            unfinished = path.with_name(f".{path.name}")
            figure.savefig(unfinished, dpi=110, bbox_inches="tight", metadata={DIGEST: digest(content)})
            unfinished.replace(path)
    return paths
