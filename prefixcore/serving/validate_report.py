"""The report of a validation: a table that a person can sign, and the same as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .validate_lines import FAILED, PASSED, UNTESTED, UNTOLD, Line

EXIT_CODES = {
    "served": 3,
    "answers": 4,
    "stream": 4,
    "chat": 4,
    "bare model": 4,
    "leak": 5,
    "dropped prefix": 6,
    "unknown model": 7,
}
CANNOT_TELL = 8
"""Nothing has failed, and of something it cannot be told whether it is right."""


@dataclass(frozen=True)
class Report:
    """What a validation has found.

    Attributes:
        facts: who, when, which server, which versions, in the order in which they are printed.
        lines: of the checks.
    """

    facts: dict[str, str]
    lines: Sequence[Line]

    @property
    def verdict(self) -> str:
        """One word for all, and how many lines of what kind."""
        counts = {kind: sum(line.verdict == kind for line in self.lines) for kind in (FAILED, UNTOLD, PASSED, UNTESTED)}
        word = "NOT VALID" if counts[FAILED] else "NOT SHOWN" if counts[UNTOLD] else "VALID"
        return f"{word} ({', '.join(f'{count} {kind}' for kind, count in counts.items() if count)})"

    @property
    def exit_code(self) -> int:
        """0: valid; else of the first kind of failure, as they stand in `EXIT_CODES`."""
        failed = [EXIT_CODES[line.check] for line in self.lines if line.verdict == FAILED]
        if failed:
            return min(failed)
        return CANNOT_TELL if any(line.verdict == UNTOLD for line in self.lines) else 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            **self.facts,
            "lines": [dataclasses.asdict(line) for line in self.lines],
        }

    def rows(self) -> list[tuple[str, ...]]:
        """The table, with a heading."""
        found: list[tuple[str, ...]] = [("check", "of", "prompts", "tokens", "|Δ log p|", "verdict")]
        for line in self.lines:
            numbers = line.numbers
            tokens, wrong = numbers.get("tokens"), numbers.get("wrong tokens", 0)
            difference = numbers.get("largest difference of log-probabilities")
            prompts = numbers.get("prompts", numbers.get("requests"))
            cells = (
                line.check,
                line.subject,
                "" if prompts is None else str(prompts),
                "" if not tokens else f"{tokens - wrong}/{tokens}",
                "" if difference is None else f"{difference:.1e}",
                line.verdict if line.verdict != PASSED or not line.detail else f"{line.verdict}, {line.detail}",
            )
            found.append(cells)
        return found

    def remarks(self) -> list[str]:
        """A sentence for each line that has not passed."""
        return [f"{line.check}, {line.subject}: {line.detail}" for line in self.lines if line.verdict != PASSED]
