"""`python -m bench.demo`: train a soft prompt and a prefix on a real model, and compare."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefixcore.training import Curve, weights_digest, write_curve

from . import base_model, methods, prompts, report, task, timing

DEFAULT_OUT = Path(__file__).parent / "out"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        run(options.seed, options.seeds, options.split_seed, options.out)
    except base_model.DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, methods.Interrupted):
        print("\ndemo: stopped", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The demo's options."""
    result = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    result.add_argument("--seed", type=int, default=0, help="the first training seed (default: 0)")
    result.add_argument("--seeds", type=int, default=1, help="how many seeds to train with (default: 1)")
    result.add_argument("--split-seed", type=int, default=0, help="which countries are held out (default: 0)")
    result.add_argument("--out", type=Path, default=DEFAULT_OUT, help="where results go (default: %(default)s)")
    return result


class Progress:
    """Says what is being done and how long the demo has been running."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    def __call__(self, text: str) -> None:
        seconds = int(time.monotonic() - self.began)
        print(f"[{seconds // 60}:{seconds % 60:02d}] {text}", flush=True)


def run(seed: int, seeds: int, split_seed: int, out: Path) -> None:
    """The whole demo; results are printed and written under `out`."""
    announce = Progress()
    model, tokenizer = base_model.load()
    examples = task.make(task.countries(), seed=split_seed)
    before = weights_digest(model)
    announce(
        f"SmolLM2-135M-Instruct, frozen; {len(examples.training)} countries to train on, "
        f"{len(examples.held_out)} held out"
    )
    announce("the bare model, and hand-written prompts (the best is chosen on training countries)")
    fixed = without_training(model, tokenizer, examples)
    out.mkdir(parents=True, exist_ok=True)
    runs = [
        methods.run_all(model, tokenizer, examples, s, out if s == seed else None, announce)
        for s in range(seed, seed + seeds)
    ]
    announce("seconds a step, measured in turn")
    steps = timing.measure(model, tokenizer, examples)
    after = weights_digest(model)
    write_files(out, examples, fixed, runs, steps)
    announce("done")
    said = summary(out, examples, fixed, runs, steps, range(seed, seed + seeds))
    said += f"\n\nSHA-256 of the frozen weights before: {before}\n                              after:  {after}\n"
    (out / "summary.txt").write_text(said, encoding="utf-8")
    print(f"\n{said}", end="")
    if before != after:
        raise base_model.DemoError("the frozen weights changed: that must never happen; please report it")


def without_training(model: Any, tokenizer: Any, examples: task.Task) -> list[methods.Outcome]:
    """The bare model, and the hand-written prompt that does best on (every second of) the training countries."""
    chosen = prompts.best_written(model, tokenizer, examples.training[::2])
    return [
        methods.Outcome(name, prompts.evaluate_written(model, tokenizer, examples.held_out, text))
        for name, text in ((methods.BARE_NAME, ""), (f"best written prompt ({chosen.name})", chosen.text))
    ]


def write_files(
    out: Path,
    examples: task.Task,
    fixed: Sequence[methods.Outcome],
    runs: Sequence[Sequence[methods.Outcome]],
    steps: timing.Timing,
) -> None:
    """The curve's picture, every held-out answer, and all figures as JSON (adapters are written when trained)."""
    write_curve(
        out / "curve.png",
        [Curve(outcome.name, outcome.record) for outcome in runs[0] if outcome.record is not None],
        title="countries to capitals, SmolLM2-135M frozen",
    )
    table = report.answers_table(examples, [*fixed, *runs[0]])
    (out / "answers.txt").write_text(table + "\n", encoding="utf-8")
    results = {"fixed": fixed, "runs": runs, "timing": steps}
    text = json.dumps(results, default=asdict, indent=1, ensure_ascii=False)
    (out / "results.json").write_text(text + "\n", encoding="utf-8")


def summary(
    out: Path,
    examples: task.Task,
    fixed: Sequence[methods.Outcome],
    runs: Sequence[Sequence[methods.Outcome]],
    steps: timing.Timing,
    seeds: range,
) -> str:
    """What the demo prints at its end."""
    several = f", mean (least..greatest) over seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else ""
    return "\n".join(
        (
            f"{len(examples.held_out)} countries that were never trained on, greedy decoding, exact match{several}.",
            "Loss: nats a token. The weights were de-quantised from a 4-bit file, they are not the original ones.",
            f"A step: {steps.batch_size} examples of up to {steps.length} tokens, ours packed and the others padded; "
            f"float32, {steps.threads} threads; medians of {steps.rounds}, taken in turn.",
            "The bare model's step is a forward and the gradient of its embeddings, without virtual tokens.",
            "",
            report.results_table(fixed, runs, steps),
            "",
            "Every fifth held-out country (* = right):",
            "",
            report.answers_table(examples, [fixed[0], runs[0][-1]], every=5),
            "",
            f"adapters  {shown(out / 'prefix')}  {shown(out / 'soft-prompt')}",
            f"curve     {shown(out / 'curve.png')}",
            f"answers   {shown(out / 'answers.txt')}",
            f"figures   {shown(out / 'results.json')}",
            f"ask it    {shown(Path(sys.executable).parent / 'prefixcore')} generate --prompt 'Portugal ->'"
            f" --model {shown(base_model.CACHE / base_model.CONVERTED)} --adapter {shown(out / 'prefix')} --end '\\n'",
        )
    )


def shown(path: Path) -> Path:
    """`path` as seen from the current folder, where it is in it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    sys.exit(main())
