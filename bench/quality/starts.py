"""What each start is worth before any training: right answers and loss of the untrained virtual tokens.

`python -m bench.quality.starts` fills what is missing in results/starts.json. A text acts alike as a prefix and as
a soft prompt while neither is trained, so one of them stands for both.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import prefixcore
from prefixcore.training import starting_text
from prefixcore.training.starting import DRAWS, PROBES, in_turns

from . import cells
from .tasks import END, TASKS, Task
from .texts import preface, shown

FILE = Path(__file__).parent / "results" / "starts.json"
SIZES = (16, 32, 64)
WRITTEN, SHOWN, MOST_TOKENS = 8, 8, 32
"""How many instructions the model writes, of how many examples each, in how many tokens at most."""


def starts(task: Task, model: Any, tokenizer: Any) -> Iterator[tuple[str, Any]]:
    """(name, configuration): examples of several sizes and draws, a person's text, the model's, labels, vocabulary."""
    config = prefixcore.PrefixTuningConfig
    for size in SIZES:
        for draw in range(DRAWS):
            text = starting_text(task.training, tokenizer, size, end=END, seed=draw)
            yield f"examples, {size} tokens, draw {draw}", config(init_text=text)
    yield "instruction, two examples", config(init_text=shown(task))
    for draw in range(WRITTEN):
        text = instruction_of_the_model(model, tokenizer, task, draw) + shown(task).removeprefix(task.instruction)
        yield f"instruction that the model writes, two examples, draw {draw}", config(init_text=text)
    yield "any sentence, two examples", config(init_text=preface(task))
    if task.labels:
        yield "labels", config(init_text=" ".join(task.labels) + END)
    yield "vocabulary", config(num_virtual_tokens=20, seed=0)


@torch.no_grad()
def instruction_of_the_model(model: Any, tokenizer: Any, task: Task, draw: int) -> str:
    """What the model says that some training examples have in common (Honovich et al., arXiv:2205.10782)."""
    some = list(in_turns(task.training, draw))[:SHOWN]
    lines = "".join(each.prompt + each.completion for each in some)
    turn = [{"role": "user", "content": f"{lines}\nWrite, in one sentence, the instruction that these answers follow."}]
    asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(asked, return_tensors="pt")
    torch.manual_seed(draw)
    written = model.generate(
        **ids, max_new_tokens=MOST_TOKENS, do_sample=True, temperature=0.8, pad_token_id=tokenizer.eos_token_id
    )
    said = tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return said.strip().partition("\n")[0] + END


def measure(model: Any, tokenizer: Any, task: Task, config: Any) -> dict[str, float]:
    """Loss on the training examples that a start is chosen by, and right answers and loss on the test side."""
    probes = [each for each in in_turns(task.training, 0) if each.prompt not in (config.init_text or "")][:PROBES]
    with prefixcore.attach(model, config, tokenizer=tokenizer):
        _, chosen_by, _ = cells.answers(model, tokenizer, probes)
        share, loss, _ = cells.answers(model, tokenizer, task.test)
    return {"chosen_by": round(chosen_by, 4), "share": round(share, 4), "loss": round(loss, 4)}


def best_draw(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The draw that `best_start` takes."""
    return min(found, key=lambda each: each["chosen_by"])


def main() -> None:
    """Measure what is not in the file yet."""
    from bench.demo import base_model

    parser = argparse.ArgumentParser(prog="python -m bench.quality.starts", description=__doc__)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(TASKS), help="tasks (default: all)")
    parser.add_argument("--minutes", type=float, help="begin nothing after as many")
    options = parser.parse_args()
    began = time.monotonic()
    model, tokenizer = base_model.load()
    model = model.to(torch.bfloat16)
    kept = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else []
    there = {(each["task"], each["start"]) for each in kept}
    for name in options.parts:
        task = TASKS[name]()
        for start, config in starts(task, model, tokenizer):
            if (name, start) in there:
                continue
            if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
                print("stopped; the same command goes on")
                return
            kept.append({"task": name, "start": start, **measure(model, tokenizer, task, config)})
            FILE.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            print(name, start, f"{kept[-1]['share']:.1%} right, loss {kept[-1]['loss']:.3f}", flush=True)


if __name__ == "__main__":
    main()
