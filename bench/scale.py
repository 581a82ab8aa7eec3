"""How much is measured: `PREFIXCORE_BENCH` is `full` (the default), `quick` or `smoke`.

`quick` is the heart of the suite in a few minutes; `smoke` runs every line of it on toy shapes in seconds and its
times mean nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

SCALES = ("smoke", "quick", "full")
SCALE = os.environ.get("PREFIXCORE_BENCH", "full")
if SCALE not in SCALES:
    raise ValueError(f"PREFIXCORE_BENCH: expected one of {', '.join(SCALES)}, got {SCALE!r}")

MIN_ROUNDS = {"smoke": 2, "quick": 7, "full": 7}[SCALE]
MAX_ROUNDS = {"smoke": 2, "quick": 31, "full": 61}[SCALE]
SECONDS = {"smoke": 0.0, "quick": 0.6, "full": 8.0}[SCALE]  # for one benchmark, beyond MIN_ROUNDS

Choice = TypeVar("Choice")


def pick(*, smoke: Sequence[Choice], quick: Sequence[Choice], full: Sequence[Choice]) -> list[Choice]:
    """What this scale measures."""
    return list({"smoke": smoke, "quick": quick, "full": full}[SCALE])
