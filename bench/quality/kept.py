"""A runner that writes each figure as it comes, and goes on from what was written: its options, and its file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def options(description: str | None) -> argparse.Namespace:
    """`--data`, `--seeds` and `--out`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the two downloads")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where each run's figures go, JSON")
    return parser.parse_args()


def read(out: Path | None) -> list[dict[str, Any]]:
    """What an earlier run has left."""
    found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8")) if out and out.exists() else []
    return found


def write(out: Path | None, results: list[dict[str, Any]]) -> None:
    """All results so far, if they are to be kept."""
    if out:
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
