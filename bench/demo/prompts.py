"""What a person would write by hand, and the texts that virtual tokens start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefixcore.audit.candidates import with_text
from prefixcore.training import Evaluation, Example, evaluate, predict, tokenize
from prefixcore.training.evaluate import exact_match

from .task import END, SHOWN, answer, question

_SHOTS = "".join(question(country) + answer(capital) for country, capital in SHOWN.items())

INSTRUCTION = "Give the capital city of each country. Only the name.\n"
"""What the soft prompt starts from."""

INSTRUCTION_WITH_EXAMPLES = INSTRUCTION + _SHOTS
"""What the prefix starts from."""

WRITTEN = {
    "an instruction": INSTRUCTION,
    "two examples": _SHOTS,
    "an instruction, two examples": INSTRUCTION_WITH_EXAMPLES,
    "a heading, two examples": "Capital cities of the world:\n" + _SHOTS,
    "a heading with an arrow, two examples": "Country -> capital city\n" + _SHOTS,
}
"""Hand-written prompts, put before each question."""


@dataclass(frozen=True)
class Chosen:
    """The best hand-written prompt: its name, its text, and its share of right training answers."""

    name: str
    text: str
    training_exact_match: float


def best_written(model: Any, tokenizer: Any, training: Sequence[Example]) -> Chosen:
    """Try every hand-written prompt on training countries; the held-out ones have no say in the choice."""
    longest = max(len(item.completion_ids) for item in tokenize(tokenizer, training, end=END))
    tried = []
    for name, text in WRITTEN.items():
        prompts = [example.prompt for example in with_text(training, text)]
        answers = predict(model, tokenizer, prompts, max_new_tokens=longest + 1, end=END)
        tried.append(Chosen(name, text, exact_match(answers, training, END)))
    return max(tried, key=lambda chosen: chosen.training_exact_match)


def evaluate_written(model: Any, tokenizer: Any, examples: Sequence[Example], text: str) -> Evaluation:
    """Held-out evaluation of the model with `text` before each question."""
    asked = with_text(examples, text)
    return evaluate(model, tokenizer, asked, tokenize(tokenizer, asked, end=END), end=END)
