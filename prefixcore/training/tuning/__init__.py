"""Learning rate and number of virtual tokens, found in a stated time: successive halving over short runs."""

from __future__ import annotations

from .candidates import Candidate, grid
from .halving import tune
from .picture import draw_tuning
from .result import Rung, Trial, Tuning

__all__ = ["Candidate", "Rung", "Trial", "Tuning", "draw_tuning", "grid", "tune"]
