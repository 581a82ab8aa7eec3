"""Texts that a person could put in place of the virtual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..training import Example
from .probes import Probes

SHOTS = (0, 2, 8)
ASIDE = 8
"""Probes set aside to be shown as examples where no others are given; never more than a third of them."""


@dataclass(frozen=True)
class Candidate:
    """A text to be put before each prompt.

    Attributes:
        name: where it is from.
        text: the text.
        shown: how many examples it contains.
    """

    name: str
    text: str
    shown: int = 0


@dataclass(frozen=True)
class Division:
    """What is shown in texts, and what is scored: no probe is both.

    Attributes:
        shown: examples that texts may contain.
        scored: indices of the probes that are scored.
        from_probes: whether `shown` were set aside from the probes, which were given no others.
        left_out: how many examples were dropped because a probe has the same prompt.
    """

    shown: list[Example]
    scored: list[int]
    from_probes: bool
    left_out: int = 0


def divide(probes: Probes, examples: Sequence[Example] | None) -> Division:
    """The examples that were given, apart from those that are probes; or some probes, which are then not scored."""
    if examples is not None:
        asked = {probe.prompt for probe in probes.examples}
        shown = [example for example in examples if example.prompt not in asked]
        return Division(shown, list(range(len(probes))), False, len(examples) - len(shown))
    aside = min(ASIDE, len(probes) // 3)
    shown = probes.examples[:aside]
    asked = {example.prompt for example in shown}
    return Division(shown, [i for i, probe in enumerate(probes.examples) if probe.prompt not in asked], True)


def written(example: Example, end: str | None) -> str:
    """An example as a prompt shows it: closed by `end`, or by a line break."""
    text, close = example.prompt + example.completion, end or "\n"
    return text if text.endswith(close) else text + close


def written_candidates(
    headings: Sequence[tuple[str, str]], shown: Sequence[Example], end: str | None
) -> list[Candidate]:
    """Each heading, and no heading, before no, two and eight examples; every text once."""
    found: dict[str, Candidate] = {}
    for name, heading in [*headings, ("", "")]:
        for shots in dict.fromkeys(min(count, len(shown)) for count in SHOTS):
            examples = "".join(written(example, end) for example in shown[:shots])
            text = _closed(heading, bool(examples)) + examples
            how = f"{shots} examples" if shots else ""
            if text:
                found.setdefault(text, Candidate(" + ".join(part for part in (name, how) if part), text, shots))
    return list(found.values())


def _closed(heading: str, more_follows: bool) -> str:
    """A heading that ends its line where examples follow."""
    return heading + "\n" if more_follows and heading and not heading[-1].isspace() else heading


def with_text(examples: Sequence[Example], text: str) -> list[Example]:
    """The same examples with `text` before each prompt."""
    return [replace(example, prompt=text + example.prompt) for example in examples]
