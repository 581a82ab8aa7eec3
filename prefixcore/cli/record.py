"""`training.json`: how an adapter was trained and how it did, beside it for people and for `generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECORD = "training.json"
CURVE = "curve.png"


def read_record(adapter: Path) -> dict[str, Any]:
    """The record in an adapter's folder; empty if it has none that can be read (it is never needed)."""
    try:
        record = json.loads((adapter / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(adapter: Path, record: dict[str, Any]) -> None:
    """Write `record` into an adapter's folder, one field a line."""
    fields = [f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in record.items()]
    (adapter / RECORD).write_text("{\n" + ",\n".join(fields) + "\n}\n", encoding="utf-8")
