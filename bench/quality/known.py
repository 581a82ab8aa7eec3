"""What the model knows of the capitals, however it is asked: a bound on what any prompt can bring out of it.

`python -m bench.quality.known` asks for each country in a whole sentence, in the model's own chat template and in a
question that the answer has been begun for, and looks for the capital anywhere in a few words: neither the form
nor the end of an answer counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prefixcore.training import Example

from .cells import setting
from .tasks import TASKS

FILE = Path(__file__).parent / "results" / "known.json"


def in_chat(tokenizer: Any, country: str) -> str:
    """A user's turn in the model's template, and the beginning of the model's."""
    turn = [{"role": "user", "content": f"What is the capital of {country}?"}]
    return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def in_a_sentence(tokenizer: Any, country: str) -> str:
    """A question, and an answer that has been begun."""
    return f"Q: What is the capital of {country}?\nA: The capital of {country} is"


WAYS: Mapping[str, tuple[Callable[[Any, str], str], int]] = {"chat": (in_chat, 24), "sentence": (in_a_sentence, 8)}
"""How it is asked, and how many tokens the answer may have."""


@torch.no_grad()
def known(model: Any, tokenizer: Any, examples: Sequence[Example], way: str) -> str:
    """ "1" for each example whose answer is somewhere in what the model goes on with, else "0"."""
    ask, tokens = WAYS[way]
    model.eval()
    padded = tokenizer(
        [ask(tokenizer, str(each.source)) for each in examples], return_tensors="pt", padding=True, padding_side="left"
    )
    written = model.generate(**padded, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    answers = tokenizer.batch_decode(written[:, padded["input_ids"].shape[1] :])
    pairs = zip(examples, answers, strict=True)
    return "".join("01"[each.answer.strip().lower() in answer.lower()] for each, answer in pairs)


def main() -> None:
    """Ask, and keep what came."""
    from bench.demo import base_model

    model, tokenizer = base_model.load()
    model = model.to(torch.bfloat16)
    test = TASKS["capitals"]().test
    found = {way: known(model, tokenizer, test, way) for way in WAYS}
    FILE.write_text(json.dumps({**found, "setting": setting(model)}, indent=1) + "\n", encoding="utf-8")
    print({way: f"{right.count('1')} of {len(right)}" for way, right in found.items()})


if __name__ == "__main__":
    main()
