"""Activations in a folder: the numbers in one file, and beside it what they are of, so that others are never taken."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..weights import configuration_digest, tensors_digest, weights_digest
from .room import Size
from .rows import Rows, Text, texts_digest

NUMBERS, RECORD = "activations.bin", "activations.json"
FORMAT = 2


def identity(
    model: Any,
    texts: Sequence[Text],
    size: Size,
    layer: int,
    first_position: int,
    prefix: Sequence[Tensor],
) -> dict[str, Any]:
    """All that the numbers depend on.

    Args:
        model: its weights, its configuration and what else it computes by.
        texts: in their order.
        size: of what is kept.
        layer: the first one whose prefix is trained.
        first_position: of a text: P, or 0 where the prefix does not move it (`position_offset=False`).
        prefix: keys and values of the layers below.
    """
    return {
        "format": FORMAT,
        "weights": weights_digest(model),
        "configuration": configuration_digest(model),
        "texts": texts_digest(texts),
        "tokens": size.tokens,
        "width": size.width,
        "dtype": str(size.dtype).removeprefix("torch."),
        "layer": layer,
        "positions": first_position,
        "prefix": tensors_digest(prefix),
    }


class Folder:
    """A folder that holds activations and nothing else.

    Args:
        path: made where it is not there.

    Raises:
        ValueError: it is something else, or holds files of others.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.check(path)
        path.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def check(path: Path) -> None:
        """Raises ValueError if it is something else, or holds files of others."""
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path}: expected a folder for activations, and it is a file")
        others = sorted(each.name for each in path.iterdir()) if path.is_dir() else []
        others = [name for name in others if name not in (NUMBERS, RECORD, _unfinished(RECORD))]
        if others:
            raise ValueError(f"{path}: expected a folder for activations alone, and it holds {others[0]}; name another")

    def open(
        self, texts: Sequence[Text], size: Size, of: Mapping[str, Any], check_room: Callable[[], None]
    ) -> tuple[Rows, str | None]:
        """The rows of the folder, or new ones.

        Args:
            texts: what there are to be rows of, in their order.
            size: of all.
            of: their `identity`.
            check_room: called before new ones are made; it raises where there is no room.

        Returns:
            The rows; and why what was there is not taken, None where it is, or where nothing was there.
        """
        known, why = self._read(of)
        if not known:
            (self.path / NUMBERS).unlink(missing_ok=True)
            check_room()
            (self.path / RECORD).unlink(missing_ok=True)
            with (self.path / NUMBERS).open("wb") as file:
                file.truncate(size.bytes)
        count = size.tokens * size.width
        values = torch.from_file(str(self.path / NUMBERS), shared=True, size=count, dtype=size.dtype)
        rows = Rows(texts, values.view(size.tokens, size.width))
        rows.known = {texts[i] for i in known}
        return rows, why

    def close(self, rows: Rows, of: Mapping[str, Any]) -> None:
        """Notes which rows are there, whole or not at all.

        The digest is that of these rows: where another process has put a file of its own in their place meanwhile, it
        does not match, and nothing is taken.
        """
        known = [i for i, text in enumerate(rows.texts) if text in rows.known]
        record = {**of, "sha256": _digest_of(rows.values), "known": known}
        unfinished = self.path / _unfinished(RECORD)
        unfinished.write_text(json.dumps(record) + "\n", encoding="utf-8")
        unfinished.replace(self.path / RECORD)

    def _read(self, of: Mapping[str, Any]) -> tuple[list[int], str | None]:
        """The numbers of the texts whose rows are there and are of this; and why none are, if some are of another."""
        try:
            record = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
            there = {name: record[name] for name in of}
            known, digest = [int(i) for i in record["known"]], record["sha256"]
        except FileNotFoundError:
            return [], None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return [], f"{RECORD} cannot be read"
        differs = [name for name, value in of.items() if there[name] != value]
        if differs:
            return [], f"they are of other {', '.join(name.replace('_', ' ') for name in differs)}"
        if not (self.path / NUMBERS).is_file() or _digest(self.path / NUMBERS) != digest:
            return [], f"{NUMBERS} is not what {RECORD} says"
        return known, None


def _unfinished(name: str) -> str:
    return f".{name}.writing"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _digest_of(values: Tensor) -> str:
    """That of the file that these numbers are mapped from."""
    return hashlib.sha256(values.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
