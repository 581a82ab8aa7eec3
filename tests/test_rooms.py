"""Imports run one way: from room to room of the package, and between the inner rooms of `prefixcore/hf`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import prefixcore

PACKAGE = Path(prefixcore.__file__).parent

ROOMS = ("backends", "ops", "nn", "adapters", "hf", "training", ("serving", "audit", "distill"), "cli")
"""Each room may import itself and those before it."""

HF = (
    "families", "batch", "model", "attention", "positions", "prompts", "paged", "bank", "attaching", "baking",
    "pipeline", "peft",
)  # fmt: skip
"""The rooms of `hf`; its other modules, the front doors, stand where `attaching` does."""


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """What a module imports of the package while it is read or run, as the parts of names below `prefixcore`."""
    home = path.relative_to(PACKAGE.parent).with_suffix("").parts

    def visit(node: ast.AST) -> Iterator[tuple[str, ...]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.ImportFrom):
                above = home[: -child.level] if child.level else ()
                parts = (*above, *(child.module or "").split(".")) if child.module else above
                for name in child.names:
                    if (*parts, name.name)[0] == "prefixcore":
                        yield (*parts, name.name)[1:]
            yield from visit(child)

    return visit(ast.parse(path.read_text()))


def place(order: tuple[str | tuple[str, ...], ...], room: str) -> int | None:
    return next((i for i, one in enumerate(order) if room in (one if isinstance(one, tuple) else (one,))), None)


def test_rooms_of_the_package_import_one_way() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        own = place(ROOMS, path.relative_to(PACKAGE).parts[0])
        for parts in imports(path):
            other = place(ROOMS, parts[0]) if parts else None
            if own is not None and other is not None and other > own:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {'.'.join(parts)}")
    assert not wrong


def hf_place(name: str) -> int:
    found = place(HF, name)
    return HF.index("attaching") if found is None else found


def test_inner_rooms_of_hf_import_one_way() -> None:
    wrong = []
    for path in (PACKAGE / "hf").rglob("*.py"):
        own = path.relative_to(PACKAGE / "hf").with_suffix("").parts[0]
        for parts in imports(path):
            if parts[:1] == ("hf",) and own != "__init__" and hf_place(parts[1]) > hf_place(own):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {'.'.join(parts)}")
    assert not wrong


@pytest.mark.parametrize(
    "room", [p for p in sorted((PACKAGE / "hf").iterdir()) if p.is_dir() and p.name != "__pycache__"]
)
def test_every_inner_room_of_hf_has_its_place(room: Path) -> None:
    assert room.name in HF
