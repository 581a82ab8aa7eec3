"""How long a behaviour holds: what is written in capital letters, window by window of 200 tokens.

Trained on completions of some twenty words, each method then writes 200 tokens, sampled, without an end; the share of
letters that are capitals is taken in each 25 tokens. A prefix, a soft prompt, and the same text written out.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import prefixcore
from prefixcore.training import Example, TrainingOptions, fit, tokenize
from prefixcore.training.data import pad_id

from . import sources
from .cells import setting

TOKENS, WINDOW = 200, 25
WORDS = 4
"""How many words of a sentence the question is."""

INSTRUCTION = "Go on in capital letters only.\n"
FILE = Path(__file__).parent / "results" / "sustained.json"
METHODS: dict[str, tuple[type | None, float]] = {
    "bare model": (None, 0.0),
    "written prompt, 2 examples": (None, 0.0),
    "soft prompt": (prefixcore.PromptTuningConfig, 5e-3),
    "prefix": (prefixcore.PrefixTuningConfig, 2e-3),
}
"""What is compared, and the learning rates: those that did best on most of the other tasks."""


def examples() -> tuple[list[Example], list[Example]]:
    """Sentences of movie reviews whose first words stay as they are and whose others are capitals: train, test."""
    sentences = [text for text, _ in sources.reviews("movieReviewSnippets", most_words=24) if len(text.split()) >= 14]
    random.Random(0).shuffle(sentences)
    found = []
    for text in sentences[:140]:
        words = text.split()
        found.append(Example(" ".join(words[:WORDS]), " " + " ".join(words[WORDS:]).upper(), text))
    return found[:128], found[128:]


def windows(texts: Sequence[Sequence[str]]) -> list[float]:
    """The share of letters that are capitals in each window, over all texts; a text is its windows."""
    shares = []
    for parts in zip(*texts, strict=True):
        letters = [c for part in parts for c in part if c.isalpha() and c.lower() != c.upper()]
        shares.append(sum(c.isupper() for c in letters) / len(letters) if letters else 0.0)
    return [round(share, 4) for share in shares]


@torch.no_grad()
def write(model: Any, tokenizer: Any, prompts: Sequence[str], seed: int, tokens: int = TOKENS) -> list[list[str]]:
    """What the model writes after each prompt, in windows."""
    model.eval()
    padded = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    torch.manual_seed(seed)
    generated = model.generate(
        **padded,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=True,
        temperature=0.8,
        top_k=0,
        top_p=0.95,
        pad_token_id=pad_id(tokenizer),
    )
    new = generated[:, padded["input_ids"].shape[1] :]
    return [[tokenizer.decode(part) for part in row.split(WINDOW)] for row in new]


def run(name: str, model: Any, tokenizer: Any, seed: int, steps: int = 80) -> dict[str, Any]:
    """Train, write, and measure."""
    training, test = examples()
    config, rate = METHODS[name]
    prompts = [each.prompt for each in test]
    shown = INSTRUCTION + "".join(each.prompt + each.completion + "\n" for each in training[:2])
    found: dict[str, Any] = {"method": name, "seed": seed, "rate": rate, "steps": steps if config else 0}
    if name == "bare model":
        return {**found, "windows": windows(write(model, tokenizer, prompts, seed)), "setting": setting(model)}
    if config is None:
        with_text = [shown + prompt for prompt in prompts]
        return {**found, "windows": windows(write(model, tokenizer, with_text, seed)), "setting": setting(model)}
    with prefixcore.attach(model, config(init_text=shown, seed=seed), tokenizer=tokenizer) as handle:
        fit(
            handle.model,
            handle.parameters(),
            tokenize(tokenizer, training, end=""),
            pad_token_id=pad_id(tokenizer),
            # Answers alone: the words before them are no capitals, and are not to be learnt.
            options=TrainingOptions(steps=steps, learning_rate=rate, seed=seed, prompt_loss_weight=0.0),
            packed=handle.can_pack,
            show_progress=False,
        )
        found["numbers"] = handle.num_trainable
        return {**found, "windows": windows(write(model, tokenizer, prompts, seed)), "setting": setting(model)}


def main() -> None:
    """Run what is not in the file yet."""
    from bench.demo import base_model

    parser = argparse.ArgumentParser(prog="python -m bench.quality.sustained", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    model, tokenizer = base_model.load()
    kept = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else []
    there = {(each["method"], each["seed"]) for each in kept}
    for seed in range(options.seeds):
        for name in METHODS:
            if (name, seed) in there:
                continue
            kept.append(run(name, model, tokenizer, seed))
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            said = " ".join(f"{share:.0%}" for share in kept[-1]["windows"])
            print(f"{name}, seed {seed}: {said}; mean {statistics.mean(kept[-1]['windows']):.0%}", flush=True)


if __name__ == "__main__":
    main()
