"""`python -m bench.serving.load`: throughput and time to first token, beside a text prompt and beside PEFT.

One server, rounds taken in turn: each way of asking once, then each again. `--peft` measures PEFT alone, over one
adapter and over many, which takes as long as all else together. `bench.serving.page` renders what both have found.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import machine
from bench.demo import base_model
from bench.demo.__main__ import Progress, shown
from prefixcore.serving.errors import LaunchError
from prefixcore.serving.vllm_command import find_vllm

from . import adapters, clients, peft_batches, server, tasks
from .clients import Load, Request

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "load.json"
PEFT_RESULTS = HERE / "results" / "peft.json"
CLIENTS = (1, 8, 32)
REQUESTS = {1: 2, 8: 8, 32: 32}
"""How many requests a round sends, by the number of clients."""
PAUSE = 3.0
"""Seconds before each way of asking: vLLM's processes spin for one after a request, on cores that PEFT needs."""

MANY = 100
LONG_TEXT_EXAMPLES = 60
"""How many worked examples the long text prompt has: what a team writes when a short one is not good enough."""

Way = Callable[[int, int], Load]
"""A way of asking: clients, requests."""


@dataclass(frozen=True)
class Figure:
    """One way at one number of clients: the rounds' tokens a second, and milliseconds to the first token (medians)."""

    way: str
    clients: int
    tokens_per_second: list[float]
    first_token_ms: list[float]


def questions() -> list[str]:
    """What is asked: the held-out countries of the demo."""
    return [example.prompt for example in tasks.all_tasks()[0].split()[1]]


def long_text(task: tasks.Task) -> str:
    """The task's instruction, and as many worked examples as a careful person collects."""
    training = task.split()[0][:LONG_TEXT_EXAMPLES]
    return task.instruction + "".join(e.prompt + e.completion for e in training)


def ways(url: str, base: str, peft: Any, tokenizer: Any, names: Sequence[str]) -> dict[str, Way]:
    """Each way of asking, by what the table calls it."""
    task = tasks.all_tasks()[0]

    def served(models: Sequence[str], text: str = "") -> Way:
        requests = requests_for(models, text)
        return lambda number, count: clients.drive(url, requests, number, count)

    return {
        "no prompt": served([base]),
        "1 adapter": served(names[:1]),
        f"{MANY} adapters": served(names),
        "text prompt of the adapter's length": served([base], task.text),
        f"text prompt, {LONG_TEXT_EXAMPLES} examples": served([base], long_text(task)),
        **peft_ways(peft, tokenizer, names[:1]),
    }


def peft_ways(peft: Any, tokenizer: Any, *several: Sequence[str]) -> dict[str, Way]:
    """Asking PEFT over so many adapters, for each list of names."""

    def batches(models: Sequence[str]) -> Way:
        requests = requests_for(models)
        return lambda number, count: peft_batches.drive(peft, tokenizer, requests, number, count)

    return {f"transformers with PEFT, {_adapters(len(names))}": batches(names) for names in several}


def requests_for(models: Sequence[str], text: str = "") -> list[Request]:
    """Every question after `text`, each of the next model in turn."""
    return [Request(models[i % len(models)], text + question) for i, question in enumerate(questions() * MANY)]


def _adapters(number: int) -> str:
    return f"{number} adapter{'s' if number > 1 else ''}"


def measure(found: dict[str, Way], rounds: int, announce: Callable[[str], None]) -> list[Figure]:
    """All ways in turn, `rounds` times, after one round that is thrown away."""
    loads: dict[tuple[str, int], list[Load]] = {}
    for turn in range(rounds + 1):
        announce(f"round {turn} of {rounds}" if turn else "a round to warm up")
        for number in CLIENTS:
            for name, way in found.items():
                time.sleep(PAUSE)
                load = way(number, REQUESTS[number])
                if turn:
                    loads.setdefault((name, number), []).append(load)
    return [
        Figure(
            name,
            number,
            [round(load.tokens_per_second, 1) for load in measured],
            [round(1000 * statistics.median(a.first for a in load.answers), 1) for load in measured],
        )
        for (name, number), measured in loads.items()
    ]


def many(model: Any, source: Path, folder: Path) -> list[str]:
    """`MANY` adapters of one task in a registry, no two alike: the trained one, and it with a little noise."""
    import torch

    import prefixcore

    names = [f"task-{index:03d}" for index in range(MANY)]
    for index, name in enumerate(names):
        if (folder / name).is_dir():
            continue
        with prefixcore.load(model, source) as handle, torch.no_grad():
            generator = torch.Generator().manual_seed(index)
            for parameter in handle.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-3 * float(parameter.std()))
            handle.save(folder / name, task=f"country -> capital, variant {index}")
    return names


def run(out: Path, rounds: int, python: str) -> None:
    """Train what is not there, start the server, measure, and write the figures."""
    announce = Progress()
    model, tokenizer, base, names = prepare(announce)
    folder = HERE / "out" / "many"
    peft = peft_batches.load(model, [folder / names[0]])
    announce("starting the server")
    with server.start(base, folder, python, HERE / "out" / "vllm.log", announce) as served:
        found = ways(served.url, base.name, peft, tokenizer, names)
        figures = measure(found, rounds, announce)
    write(out, figures, rounds, find_vllm(python))
    announce(f"figures in {out}")


def run_peft(out: Path, rounds: int) -> None:
    """PEFT over one adapter and over many, in turn; and write the figures."""
    announce = Progress()
    model, tokenizer, _, names = prepare(announce)
    peft = peft_batches.load(model, [HERE / "out" / "many" / name for name in names])
    figures = measure(peft_ways(peft, tokenizer, names[:1], names), rounds, announce)
    write(out, figures, rounds)
    announce(f"figures in {out}")


def prepare(announce: Callable[[str], None]) -> tuple[Any, Any, Path, list[str]]:
    """The model, its tokenizer, its folder, and the names of the adapters in `out/many`."""
    model, tokenizer = base_model.load()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = shown(base_model.converted_model())
    trained = adapters.train(base, tasks.all_tasks()[:1], HERE / "out", announce)
    folder = HERE / "out" / "many"
    announce(f"{MANY} adapters in {folder}")
    return model, tokenizer, base, many(model, trained / "capitals", folder)


def write(out: Path, figures: Sequence[Figure], rounds: int, vllm: str | None = None) -> None:
    """Keeps the figures, and what they were measured on."""
    out.parent.mkdir(parents=True, exist_ok=True)
    stamp = {**machine.stamp(), "tokens_an_answer": clients.TOKENS, "requests": REQUESTS, "rounds": rounds}
    if vllm is not None:
        stamp["versions"]["vllm"] = vllm
    text = json.dumps({"stamp": stamp, "figures": [asdict(figure) for figure in figures]}, indent=1)
    out.write_text(text + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving.load", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help=f"where the figures go (default: {RESULTS}, or {PEFT_RESULTS})")
    parser.add_argument("--peft", action="store_true", help="measure PEFT alone, over one adapter and over many")
    parser.add_argument("--rounds", type=int, default=7, help="how often each is measured (default: 7)")
    parser.add_argument("--python", default=sys.executable, help="the Python that vLLM is installed in")
    options = parser.parse_args(arguments)
    server.end_with_us()
    try:
        if options.peft:
            run_peft(options.out or PEFT_RESULTS, options.rounds)
        else:
            run(options.out or RESULTS, options.rounds, options.python)
    except (base_model.DemoError, LaunchError) as error:
        print(f"load: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nload: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
