"""The options of `prefixcore train`, and the configuration that they make."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .common import (
    adapter_name,
    add_column_arguments,
    add_force_argument,
    add_model_arguments,
    option,
    plain_escapes,
    positive,
    seed,
)
from .failures import UserError, user_errors
from .train_provenance import add_author_arguments

Number = TypeVar("Number", int, float)

MOST_LAYERS = 4096
"""In a run of layers: more than any model has."""

METHODS = ("prefix", "prompt", "p-tuning")
LEARNING_RATES = {"prefix": 2e-3, "prompt": 5e-3, "p-tuning": 1e-3}

PROMPT_LOSS_WEIGHT = 0.3
"""That of `TrainingOptions`, whose module takes seconds to import: help is to come at once."""

# Option -> the methods that it is for.
METHODS_OF = {
    "reparameterization": ("prefix", "prompt"),
    "rank": ("prefix", "prompt"),
    "num_basis": ("prefix", "prompt"),
    "prefix_projection": ("prefix",),
    "layers": ("prefix",),
    "num_frozen_tokens": ("prefix",),
    "encoder_hidden_size": ("prefix", "p-tuning"),
    "encoder_reparameterization_type": ("p-tuning",),
}
INIT_OPTIONS = ("num_virtual_tokens", "init", "init_text")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prefixcore train`."""
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="ADAPTER", help="folder to write the adapter to")
    parser.add_argument("--method", choices=METHODS, help="what to train (not with --resume)")
    parser.add_argument("--resume", type=adapter_name, metavar="ADAPTER", help="go on training this adapter")
    add_force_argument(parser)
    add_author_arguments(parser.add_argument_group("what you say of it, for the manifest"))
    add_start_arguments(parser)
    add_reparameterization_arguments(parser)
    add_loop_arguments(parser)
    add_text_arguments(parser)
    add_tracker_arguments(parser)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """`--data` and `--chat`."""
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON, CSV or Parquet with prompt and completion, or a folder of datasets' save_to_disk",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the data are conversations (messages, tools): they are written by the model's chat template, and the "
        "assistant's turns learnt",
    )
    add_column_arguments(parser)


def add_start_arguments(parser: argparse.ArgumentParser) -> None:
    """How many virtual tokens there are, and what they start from."""
    start = parser.add_argument_group("virtual tokens and how they start")
    start.add_argument(
        "--num-virtual-tokens", type=positive, metavar="P", help="default: as many as the text has, else 20"
    )
    start.add_argument(
        "--init-text",
        type=plain_escapes,
        metavar="TEXT",
        help="start from this text: an instruction, with examples for a prefix (default: some of --data's examples)",
    )
    start.add_argument(
        "--init", choices=("text", "vocab", "random", "zero"), help="default: text, of --init-text or of examples"
    )
    start.add_argument(
        "--num-frozen-tokens", type=positive, metavar="N", help="the first N tokens of a prefix stay as they start"
    )
    start.add_argument("--layers", type=layer_list, metavar="0,1-5,...", help="layers that get a prefix (default: all)")


def add_reparameterization_arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained in place of the virtual tokens."""
    inside = parser.add_argument_group("what is trained in place of the virtual tokens")
    inside.add_argument(
        "--reparameterization",
        choices=("none", "mlp", "low_rank", "random_basis"),
        help="default: none; mlp for a prefix only",
    )
    inside.add_argument(
        "--prefix-projection", action="store_true", default=None, help="PEFT's name for --reparameterization mlp"
    )
    inside.add_argument("--rank", type=positive, help="of low_rank")
    inside.add_argument("--num-basis", type=positive, metavar="N", help="how many numbers random_basis trains in all")
    inside.add_argument(
        "--encoder-hidden-size", type=positive, metavar="N", help="of the mlp, or of p-tuning's encoder"
    )
    inside.add_argument(
        "--encoder-reparameterization-type", choices=("MLP", "LSTM"), help="p-tuning's encoder (default: MLP)"
    )


def add_prompt_loss_argument(group: Any) -> None:
    """What prompts count for."""
    group.add_argument(
        "--prompt-loss-weight",
        type=float,
        default=PROMPT_LOSS_WEIGHT,
        metavar="X",
        help="of the mean loss of prompts beside that of answers; 0: only answers are learnt "
        f"(default: {PROMPT_LOSS_WEIGHT})",
    )


def add_loop_arguments(parser: argparse.ArgumentParser) -> None:
    """How to train."""
    loop = parser.add_argument_group("training")
    length = loop.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, metavar="N", help="optimizer steps")
    length.add_argument("--epochs", type=float, metavar="N", help="passes over the data (default: 5)")
    rates = ", ".join(f"{rate:g} for {method}" for method, rate in LEARNING_RATES.items())
    loop.add_argument("--lr", type=float, metavar="RATE", help=f"AdamW's learning rate (default: {rates})")
    loop.add_argument("--batch-size", type=positive, default=8, metavar="N", help="default: 8")
    loop.add_argument("--warmup-steps", type=int, default=0, metavar="N", help="default: 0")
    loop.add_argument("--schedule", choices=("constant", "linear"), default="constant", help="default: constant")
    loop.add_argument("--weight-decay", type=float, default=0.0, metavar="X", help="default: 0")
    loop.add_argument("--max-grad-norm", type=float, metavar="X", help="default: no limit")
    add_prompt_loss_argument(loop)
    loop.add_argument(
        "--no-average",
        dest="average",
        action="store_false",
        help="save one step's values (default: the average over the steps, the later ones the more)",
    )
    loop.add_argument(
        "--keep",
        choices=("best", "last"),
        help="values to save: of the least held-out loss or of the last step (default: best, with held-out examples)",
    )
    loop.add_argument(
        "--early-stopping-patience",
        type=positive,
        metavar="N",
        help="stop after N held-out losses in a row that are not below the least before (default: never)",
    )
    loop.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="of the start, the order and the split (default: 0)"
    )
    loop.add_argument(
        "--train-layers",
        type=layer_list,
        metavar="0,1-5,...",
        help="layers whose prefix is trained; that of the others keeps its start (default: all of --layers)",
    )
    loop.add_argument(
        "--cache-activations",
        choices=("memory", "disk"),
        help="keep what the layers below the trained ones make of each example, so that later epochs begin there",
    )
    loop.add_argument(
        "--activation-dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of what is kept (default: the model's, with which nothing is lost)",
    )
    loop.add_argument(
        "--activations-dir",
        type=Path,
        metavar="DIR",
        help="where on the disk; it stays for trainings on the same model and data (default: ADAPTER.activations)",
    )


def add_text_arguments(parser: argparse.ArgumentParser, *, eval_every: bool = True) -> None:
    """How examples are read, and which are held out.

    Args:
        parser: gets the options.
        eval_every: whether held-out losses are measured every so many steps.
    """
    text = parser.add_argument_group("examples and evaluation")
    text.add_argument(
        "--end",
        type=plain_escapes,
        metavar="TEXT",
        help=r"text that closes a completion, such as '\n' (default: the end-of-sequence token)",
    )
    text.add_argument(
        "--max-length",
        type=positive,
        metavar="N",
        help="most tokens of an example (default: what the model has positions for)",
    )
    text.add_argument("--skip-too-long", action="store_true", help="leave out longer examples instead of stopping")
    held = text.add_mutually_exclusive_group()
    held.add_argument("--eval-data", type=Path, metavar="FILE", help="held-out examples, as --data")
    held.add_argument(
        "--eval-fraction", type=float, default=0.1, metavar="X", help="share of --data held out; 0: none (default: 0.1)"
    )
    if eval_every:
        text.add_argument(
            "--eval-every",
            type=positive,
            metavar="N",
            help="steps between held-out losses (default: a fifth of the run)",
        )
    text.add_argument(
        "--eval-limit", type=positive, default=256, metavar="N", help="most held-out examples to score (default: 256)"
    )


def add_tracker_arguments(parser: argparse.ArgumentParser) -> None:
    """`--report-to` and `--logging-dir`."""
    track = parser.add_argument_group("experiment trackers")
    track.add_argument(
        "--report-to",
        nargs="+",
        default=[],
        metavar="TRACKER",
        help="tensorboard, mlflow, wandb or trackio; several with spaces between them (default: none)",
    )
    track.add_argument(
        "--logging-dir", type=Path, default=Path("runs"), metavar="DIR", help="of TensorBoard's files (default: runs)"
    )


def layer_list(text: str) -> list[int]:
    """An argparse type: layer indices with commas between them, and runs of them as 15-29."""
    layers: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            run = range(int(first), int(last) + 1) if dash else [int(first)]
            if not 0 < len(run) <= MOST_LAYERS:
                raise ValueError
            layers += run
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected layer numbers like 0,1,2 or 15-29, got {text!r}") from None
    return layers


def number_list(text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Of an argparse type: numbers with commas between them."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, got {text!r}") from None


def build_config(arguments: argparse.Namespace) -> Any:
    """The configuration to attach, or None with `--resume` (the adapter has its own).

    Raises:
        UserError: options that contradict each other, or that the method has no use for.
    """
    given = {
        name: getattr(arguments, name) for name in (*INIT_OPTIONS, *METHODS_OF) if getattr(arguments, name) is not None
    }
    if arguments.resume is not None:
        if arguments.method is not None or given:
            named = "--method" if arguments.method is not None else option(next(iter(given)))
            raise UserError(f"{named} cannot be given with --resume: the adapter says what it is; leave it out")
        return None
    if arguments.force:
        raise UserError("--force is for --resume: a new adapter is trained for the model that is given; leave it out")
    if arguments.method is None:
        raise UserError(f"--method is missing: one of {', '.join(METHODS)} (or --resume ADAPTER)")
    for name in given:
        if name in METHODS_OF and arguments.method not in METHODS_OF[name]:
            raise UserError(
                f"{option(name)} is for --method {' or '.join(METHODS_OF[name])}, not {arguments.method}; leave it out"
            )
    if "init_text" not in given:
        given.setdefault("num_virtual_tokens", 20)

    from ..nn import PrefixTuningConfig, PromptTuningConfig, PTuningConfig

    configs = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig, "p-tuning": PTuningConfig}
    with user_errors(ValueError):
        return configs[arguments.method](**given, seed=arguments.seed, tokenizer_name_or_path=str(arguments.model))
