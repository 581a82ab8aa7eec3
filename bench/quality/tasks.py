"""The tasks: examples to train on, to choose a learning rate on, and to be judged by, on three sides of one split."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from bench.demo import task as demo
from prefixcore.training import Example

from . import sources

END = "\n"
Sides: TypeAlias = tuple[Sequence[Example], Sequence[Example], Sequence[Example]]


@dataclass(frozen=True)
class Task:
    """One task; nothing is on two of its sides.

    Attributes:
        name: what records and parts call it.
        title: what pages call it.
        instruction: what a person would write before the questions.
        training, validation, test: the examples.
        labels: the answers, where there are only a few; a written prompt names them.
        may_be_quoted: whether records may hold its examples.
    """

    name: str
    title: str
    instruction: str
    training: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    labels: tuple[str, ...] = ()
    may_be_quoted: bool = True


def cut(examples: Sequence[Example], validation: int, test: int, training: int) -> Sides:
    """The training, validation and test side of a list that is in a random order already."""
    aside = test + validation
    return examples[aside : aside + training], examples[test:aside], examples[:test]


def of_countries(name: str, field: str, instruction: str) -> Task:
    """`Portugal ->` and one fact about each country; the 45 that the demo holds out are the test of each such task."""
    known = sources.facts(field)
    split = demo.make(demo.countries())
    examples = {each: Example(demo.question(each), demo.answer(value), each) for each, value in known.items()}
    names = [example.source for example in split.training if example.source in examples]
    others = [each for each in names if each not in demo.SHOWN]
    random.Random(1).shuffle(others)
    aside = set(others[:24])
    labels = tuple(sorted(set(known.values()))) if len(set(known.values())) < 10 else ()
    return Task(
        name,
        f"countries to {name}",
        instruction,
        training=[examples[each] for each in names if each not in aside],
        validation=[examples[each] for each in names if each in aside],
        test=[examples[e.source] for e in split.held_out if e.source in examples],
        labels=labels,
    )


def of_reviews(name: str, file: str, title: str) -> Task:
    """A sentence, a line `Opinion:`, and the word for what it says."""
    pairs = sources.reviews(file)
    random.Random(0).shuffle(pairs)
    examples = [
        Example(f"{text}\nOpinion:", f" {label}{END}", f"sentence {i}") for i, (text, label) in enumerate(pairs)
    ]
    instruction = "Say whether each sentence of a review is positive or negative.\n"
    return Task(name, title, instruction, *cut(examples, 48, 128, 400), ("negative", "positive"))


def of_headlines() -> Task:
    """A headline of BBC news, a line `Section:`, and the section."""
    pairs = sources.headlines()
    random.Random(0).shuffle(pairs)
    examples = [
        Example(f"{text}\nSection:", f" {label}{END}", f"headline {i}") for i, (text, label) in enumerate(pairs)
    ]
    instruction = "Say which section of the news each headline is from.\n"
    labels = tuple(sorted({label for _, label in pairs}))
    sides = cut(examples, 48, 128, 400)
    return Task("news", "BBC headlines to sections", instruction, *sides, labels, may_be_quoted=False)


def of_dates() -> Task:
    """A day as people write it, and as ISO 8601 does: rewriting that can be checked."""
    pairs = sources.dates(120 + 24 + 100, seed=0)
    examples = [Example(f"{text} ->", f" {iso}{END}", text) for text, iso in pairs]
    instruction = "Write each date as year-month-day, in digits.\n"
    return Task("dates", "dates rewritten", instruction, *cut(examples, 24, 100, 120))


TASKS: Mapping[str, Callable[[], Task]] = {
    "capitals": lambda: of_countries("capitals", "capital", "Give the capital city of each country. Only the name.\n"),
    "continents": lambda: of_countries(
        "continents", "continent", "Give the continent of each country. Only the name.\n"
    ),
    "movies": lambda: of_reviews("movies", "movieReviewSnippets", "sentences of movie reviews"),
    "news": of_headlines,
    "currencies": lambda: of_countries(
        "currencies", "currencyname", "Give the currency of each country. Only the name.\n"
    ),
    "dates": of_dates,
    "products": lambda: of_reviews("products", "amazonReviewSnippets", "sentences of product reviews"),
}
"""What there is, by name."""
