"""What two distilled prefixes do together: `python -m bench.demo_distill.compose`, when both texts have been distilled.

The prefixes stand alone and one behind the other, in both orders, and answer the held-out prompts of both texts; each
answer is held against that of the model with its own whole text.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import prefixcore
from bench.cells import markdown
from bench.demo import base_model
from prefixcore.cli.distill_options import add_arguments, build_options
from prefixcore.distill import DistillOptions, compose, read_prompts
from prefixcore.distill.front import Front, Reader
from prefixcore.distill.scores import Score, alone, of_teacher, score
from prefixcore.distill.store import Store
from prefixcore.distill.targets import Target, Teacher
from prefixcore.distill.writing import writer
from prefixcore.training.data import pad_id

from .__main__ import DEFAULT_OUT
from .texts import make

PAIR = ("capitals", "harbour")
HEADER = ("before the prompt", "prompts of", "right", "answers equal", "tokens equal", "KL")


class HeldOut(NamedTuple):
    """The held-out prompts of a text, with what the model answers behind all of it.

    Attributes:
        tokens: of the text.
        options: of its distillation.
        targets: the prompts and answers.
    """

    tokens: int
    options: DistillOptions
    targets: list[Target]


def held_out_of(name: str, out: Path, model: Any, tokenizer: Any) -> HeldOut:
    """What is asked about a text."""
    text = make(name, out)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    needed = ["--model", "", "--context", str(text.context), "--num-virtual-tokens", "1", "--out", ""]
    arguments = parser.parse_args([*needed, *text.options])
    options = build_options(arguments)
    written = writer(tokenizer, text.context.read_text(encoding="utf-8"), chat=options.chat)
    teacher = Teacher(
        model, tokenizer, Front.of(model, written.front), "", pad_id(tokenizer, model), options, Store(None)
    )
    prompts = [written.ask(prompt) for prompt in read_prompts(arguments.eval_prompts)]
    return HeldOut(len(written.front), options, teacher.targets(prompts, greedy=True))


@contextmanager
def behind(folders: Sequence[Path], model: Any) -> Iterator[tuple[Reader, int]]:
    """A block in which the model reads behind these prefixes, and how many virtual tokens they have in all."""
    with tempfile.TemporaryDirectory() as folder:
        adapter = folders[0] if len(folders) == 1 else compose(model, folders, Path(folder) / "composed")
        with prefixcore.load(model, adapter) as handle:
            handle.module.requires_grad_(False)
            yield Reader(model, [], packed=handle.can_pack), handle.num_virtual_tokens


def row(before: str, text: str, found: Score) -> list[str]:
    """A row of the table."""
    right = "-" if found.accuracy is None else f"{found.accuracy:.1%}"
    equal = f"{found.agreement:.2f}", f"{found.token_agreement:.2f}", f"{found.divergence:.2f}"
    return [f"{before} ({found.tokens})", text, right, *equal]


def main() -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo_distill.compose", description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="where the demo's results are")
    out = parser.parse_args().out
    if missing := [name for name in PAIR if not (out / name / "prefixcore_manifest.json").is_file()]:
        print(f'{out} has no adapter {missing[0]!r}; make demo-distill ARGS="--texts {" ".join(PAIR)}" makes it')
        return 1
    model, tokenizer = base_model.load()
    model.eval()
    held_out = {name: held_out_of(name, out, model, tokenizer) for name in PAIR}
    padding = pad_id(tokenizer, model)
    rows = [
        row("the full text", name, of_teacher(tokenizer, each.targets, each.tokens, each.options))
        for name, each in held_out.items()
    ]
    for names in ([PAIR[0]], [PAIR[1]], list(PAIR), list(reversed(PAIR))):
        with behind([out / name for name in names], model) as (reader, tokens):
            for text, each in held_out.items():
                found = score(reader, tokenizer, each.targets, tokens, each.options, padding, alone)
                rows.append(row(", then ".join(names), text, found))
    print(markdown(HEADER, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
