"""Distillation: a long text becomes a short prefix, behind which the frozen model answers as behind the text."""

from __future__ import annotations

from .composing import compose
from .errors import DistillError
from .options import DistillOptions
from .prompts import read_prompts
from .report import Report, Trial
from .result import Distilled
from .run import distill
from .scores import Score
from .writing import Prompt

__all__ = [
    "DistillError",
    "DistillOptions",
    "Distilled",
    "Prompt",
    "Report",
    "Score",
    "Trial",
    "compose",
    "distill",
    "read_prompts",
]
