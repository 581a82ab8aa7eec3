"""`training.json` and `curve.png`: how an adapter was trained and how it did, beside it for people and for `generate`.

They are written with the adapter, in one step, and name it by a digest: a record of another training, as an adapter
that was copied or saved over it leaves behind, is never taken for this adapter's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import AdapterError, shown
from .storage import LONGEST_JSON, load_json

RECORD = "training.json"
CURVE = "curve.png"
_ADAPTER = "adapter_sha256"

_TYPES: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "data": (str,),
    "end": (str, type(None)),
    "split": (dict, type(None)),
    "held_out": (dict,),
    "train_loss": (list,),
    "held_out_loss": (list,),
    "interrupted": (bool,),
}
"""What other commands read from it, where it is there; everything else is for people alone."""


def record_bytes(record: Mapping[str, Any], digest: str) -> bytes:
    """The file's contents, one field a line; `digest` is that of the adapter's values.

    Raises:
        AdapterError: a value that JSON cannot hold, or more than `load_record` reads.
    """
    lines = []
    for name, value in {_ADAPTER: digest, **record}.items():
        try:
            lines.append(f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}")
        except (TypeError, ValueError, RecursionError) as error:
            raise AdapterError(f"record: {name}: expected what JSON can hold: {error}") from error
    data = ("{\n" + ",\n".join(lines) + "\n}\n").encode("utf-8", errors="backslashreplace")
    if len(data) > LONGEST_JSON:
        raise AdapterError(
            f"record: expected at most {LONGEST_JSON} bytes of JSON, which is what is read, got {len(data)}"
        )
    return data


def load_record(folder: Path, digest: str | None) -> dict[str, Any]:
    """The record in an adapter's folder; empty if it has none, or that of another adapter.

    Args:
        folder: the adapter's.
        digest: of the adapter's values, from its manifest; None: it has none, and so no record.

    Raises:
        AdapterError: the file is damaged: not a regular file, too large, no JSON object, a field of a wrong type.
        OSError: the file system refuses to read it.
    """
    path = folder / RECORD
    if digest is None:
        return {}
    record = load_json(path)
    if record is None or record.pop(_ADAPTER, None) != digest:
        return {}
    for name, types in _TYPES.items():
        if name in record and not isinstance(record[name], types):
            raise AdapterError(f"{path}: {name}: expected {types[0].__name__}, got {type(record[name]).__name__}")
    split = record.get("split")
    if split:
        _check_numbers(path, "split", split, ("seed", "fraction"))
        if not isinstance(split["seed"], int):
            raise AdapterError(f"{path}: split.seed: expected an integer, got {shown(split['seed'])}")
    for name in ("train_loss", "held_out_loss"):
        if not all(is_number(value) or isinstance(value, list) for value in record.get(name, [])):
            raise AdapterError(f"{path}: {name}: expected numbers, got {shown(record[name])}")
    for name, result in record.get("held_out", {}).items():
        if not isinstance(result, dict):
            raise AdapterError(f"{path}: held_out.{name}: expected an object, got {type(result).__name__}")
        _check_numbers(path, f"held_out.{name}", result, ("loss", "exact_match", "examples"))
    return record


def how_read(record: Mapping[str, Any], manifest: Any) -> tuple[str | None, bool | None]:
    """What ends an answer, and whether prompts are turns of a conversation, as an adapter was trained; None: not said.

    The manifest's settings say it too, so that a folder that has lost its record is not asked otherwise without a word.

    Args:
        record: from `load_record`.
        manifest: the adapter's, or None.
    """
    said = {**(getattr(manifest, "training", None) or {}), **record}
    end, chat = said.get("end"), said.get("chat")
    return end if isinstance(end, str) else None, chat if isinstance(chat, bool) else None


def _check_numbers(path: Path, name: str, values: Mapping[str, Any], needed: tuple[str, ...]) -> None:
    for field in needed:
        if not is_number(values.get(field)):
            raise AdapterError(f"{path}: {name}.{field}: expected a number, got {shown(values.get(field))}")


def is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) < 2**63
