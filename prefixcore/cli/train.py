"""Train a prefix or a soft prompt for a frozen model, and evaluate it on held-out examples."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import INTERRUPTED, OK, UserError, open_model, table, user_errors
from .train_options import LEARNING_RATES, add_arguments, build_config

if TYPE_CHECKING:
    from ..training import Evaluation, Example, TokenizedExample, TrainingOptions, TrainingRecord

__all__ = ["add_arguments", "run"]

CURVE = "curve.png"
EPOCHS = 5.0


def run(arguments: argparse.Namespace) -> int:
    """Train, save, evaluate; exit code 130 if Ctrl-C ended the training early (what there was is saved)."""
    from ..training import DataError, train

    # Whatever is wrong with the request is found before the model is opened, and long before a write.
    check_out(arguments.out)
    config = build_config(arguments)
    inherit_from_resumed(arguments)
    with user_errors(DataError):
        training, held_out = read_examples(arguments)
    options = training_options(arguments, len(training))

    model, tokenizer = open_model(arguments)
    training, train_ids = tokenize_all(arguments, tokenizer, training)
    held_out, held_out_ids = tokenize_all(arguments, tokenizer, held_out)
    if not train_ids:
        raise UserError(f"no example has at most {arguments.max_length} tokens; raise --max-length")
    say(f"{len(train_ids)} examples to train on, {len(held_out_ids)} held out")

    evaluator = HeldOutEvaluator(model, tokenizer, arguments.end, held_out, held_out_ids)
    evaluator("bare model")
    handle = attach(arguments, model, tokenizer, config)
    say(f"{handle.num_trainable:,} numbers to train in {handle.num_virtual_tokens} virtual tokens")
    evaluator("at the start")
    with user_errors(ValueError):  # a loss that is not finite
        record = train(handle, tokenizer, train_ids, held_out=held_out_ids, options=options)
    if record.steps_done == 0:
        say("stopped before the first step; nothing was saved")
        return INTERRUPTED
    stopped = save(arguments, handle, record, evaluator)
    if record.interrupted:
        say(f"stopped after {record.steps_done} of {options.steps} steps; saved what there is to {arguments.out}")
        return INTERRUPTED
    try:
        if stopped:
            raise KeyboardInterrupt
        if held_out:
            evaluator("after training")
            stopped = save(arguments, handle, record, evaluator)
            print(evaluator.table())
        say(f"adapter  {arguments.out}\ncurve    {arguments.out / CURVE}")
    except KeyboardInterrupt:
        say(f"\nstopped while evaluating; the adapter is in {arguments.out}")
        return INTERRUPTED
    return INTERRUPTED if stopped else OK


def say(text: str) -> None:
    """Progress goes to standard error, so that standard output has the results alone."""
    print(text, file=sys.stderr, flush=True)


def check_out(out: Path) -> None:
    """Refuse a place where an adapter cannot be written, or where something else would be overwritten."""
    from ..adapters import AdapterError, check_target

    with user_errors(AdapterError):
        check_target(out)
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--out {out} cannot be written: {parent} is not a folder that you may write to")


def inherit_from_resumed(arguments: argparse.Namespace) -> None:
    """With `--resume`, set options that are not given as in the earlier training, so that what it held out stays so."""
    arguments.split_seed = arguments.seed
    if arguments.resume is None:
        return
    from ..adapters import AdapterError, read_record

    with user_errors(AdapterError):
        earlier = read_record(arguments.resume)
    if arguments.end is None:
        arguments.end = earlier.get("end")
    if arguments.eval_data is not None or arguments.eval_fraction == 0:
        return
    split = earlier.get("split")
    if split and split["fraction"] >= arguments.eval_fraction:
        arguments.split_seed = split["seed"]
    else:
        say(
            f"warning: what is held out now may be among what {arguments.resume} was trained on before; "
            "give --eval-data for an honest evaluation"
        )


def read_examples(arguments: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and held-out ones: a file of their own, or a part of `--data` split off."""
    from ..training import read_jsonl, split

    examples = read_jsonl(arguments.data)
    if arguments.eval_data is None:
        training, held_out = split(examples, arguments.eval_fraction, arguments.split_seed)
    else:
        training, held_out = examples, read_jsonl(arguments.eval_data)
        shared = {(e.prompt, e.completion) for e in training} & {(e.prompt, e.completion) for e in held_out}
        if shared:
            say(
                f"warning: {len(shared)} examples of {arguments.eval_data} are in {arguments.data} too; "
                "the evaluation will look better than it is"
            )
    if len(held_out) > arguments.eval_limit:
        say(f"scoring the first {arguments.eval_limit} of {len(held_out)} held-out examples (--eval-limit)")
    return training, held_out[: arguments.eval_limit]


def training_options(arguments: argparse.Namespace, examples: int) -> TrainingOptions:
    """How to train; `--epochs` become steps."""
    from ..training import TrainingOptions

    steps = arguments.steps
    if steps is None:
        epochs = EPOCHS if arguments.epochs is None else arguments.epochs
        if not 0 < epochs < math.inf:
            raise UserError(f"--epochs must be above 0, got {arguments.epochs}")
        steps = max(1, round(epochs * math.ceil(examples / arguments.batch_size)))
    rate = arguments.lr if arguments.lr is not None else LEARNING_RATES.get(arguments.method, 1e-3)
    with user_errors(ValueError):
        return TrainingOptions(
            steps=steps,
            learning_rate=rate,
            batch_size=arguments.batch_size,
            warmup_steps=arguments.warmup_steps,
            schedule=arguments.schedule,
            weight_decay=arguments.weight_decay,
            max_grad_norm=arguments.max_grad_norm,
            seed=arguments.seed,
            eval_every=arguments.eval_every or max(1, steps // 5),
        )


def tokenize_all(
    arguments: argparse.Namespace, tokenizer: Any, examples: Sequence[Example]
) -> tuple[list[Example], list[TokenizedExample]]:
    """Examples and their ids; with `--skip-too-long` only those that are short enough."""
    from ..training import DataError, tokenize

    limit = arguments.max_length
    with user_errors(DataError):
        ids = tokenize(tokenizer, examples, end=arguments.end, max_length=None if arguments.skip_too_long else limit)
    if limit is None:
        return list(examples), ids
    kept = [(example, its_ids) for example, its_ids in zip(examples, ids, strict=True) if its_ids.length <= limit]
    if len(kept) < len(ids):
        say(f"left out {len(ids) - len(kept)} of {len(ids)} examples with more than {limit} tokens")
    return [example for example, _ in kept], [its_ids for _, its_ids in kept]


def attach(arguments: argparse.Namespace, model: Any, tokenizer: Any, config: Any) -> Any:
    """Attach a new adapter, or the one to go on with."""
    from .. import hf
    from ..adapters import AdapterError

    with user_errors(AdapterError, ValueError, TypeError, NotImplementedError):
        if config is None:
            return hf.load(model, arguments.resume, trainable=True)
        return hf.attach(model, config, tokenizer=tokenizer)


class HeldOutEvaluator:
    """Evaluates the model, as it is when called, on the held-out examples, and keeps the results by name."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        end: str | None,
        held_out: Sequence[Example],
        ids: Sequence[TokenizedExample],
    ) -> None:
        self.model, self.tokenizer, self.end = model, tokenizer, end
        self.held_out, self.ids = held_out, ids
        self.results: dict[str, Evaluation] = {}

    def __call__(self, name: str) -> None:
        from ..training import evaluate

        if self.held_out:
            result = evaluate(self.model, self.tokenizer, self.held_out, self.ids, end=self.end)
            self.results[name] = result
            say(f"held out, {name}: loss {result.loss:.3f}, exact match {result.exact_match:.1%}")

    def table(self) -> str:
        """The results as a text table."""
        rows = [(f"{len(self.held_out)} held-out examples", "loss", "exact match")]
        for name, result in self.results.items():
            rows.append((name, f"{result.loss:.3f}", f"{result.exact_match:.1%}"))
        return table(rows)

    def to_dict(self) -> dict[str, Any]:
        """The results without the answers, for JSON."""
        return {
            name: {"loss": result.loss, "exact_match": result.exact_match, "examples": len(self.held_out)}
            for name, result in self.results.items()
        }


def save(arguments: argparse.Namespace, handle: Any, record: TrainingRecord, evaluator: HeldOutEvaluator) -> bool:
    """Write adapter, record and curve as one; whether Ctrl-C came meanwhile (it is heeded afterwards)."""
    from ..adapters import AdapterError
    from ..training import Curve, draw_curve
    from ..training.loop import stop_on_signal

    method = handle.config.method
    fields = {
        "model": arguments.model,
        "data": str(arguments.data),
        "end": arguments.end,
        "split": None if arguments.eval_data else {"seed": arguments.split_seed, "fraction": arguments.eval_fraction},
        "held_out": evaluator.to_dict(),
        **record.to_dict(),
    }
    with stop_on_signal() as stopping, user_errors(OSError, AdapterError):
        curve = draw_curve([Curve(method, record)], title=f"{method}, {arguments.data.name}")
        handle.save(arguments.out, record=fields, curve=curve)
        return stopping()
