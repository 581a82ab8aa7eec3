"""One line of a validation's report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .validate_judge import Judgement

PASSED, FAILED, UNTOLD, UNTESTED = "passed", "FAILED", "cannot tell", "not tested"


@dataclass
class Line:
    """One line of the report.

    Attributes:
        check: which check.
        subject: the adapter, or what else it is about.
        verdict: `PASSED`, `FAILED`, `UNTOLD` or `UNTESTED`.
        detail: in words.
        numbers: what was counted and measured.
    """

    check: str
    subject: str
    verdict: str
    detail: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


def in_words(found: Judgement, tolerance: float) -> str:
    """What is wrong with an answer."""
    if found.wrong:
        return f"{found.wrong} of {found.tokens} tokens are wrong, {found.detail}"
    return f"log-probabilities differ by up to {found.largest:.3g}, more than {tolerance:g}"
