"""The options of `prefixcore distill`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import add_column_arguments, add_model_arguments, option, plain_escapes, positive, seed
from .failures import UserError, user_errors
from .train_provenance import add_author_arguments

QUESTIONS = 256
"""That the model asks itself where nobody says how many."""

# Option -> the field of DistillOptions that it sets.
FIELDS = {
    "num_virtual_tokens": "num_virtual_tokens",
    "questions": "questions",
    "chat": "chat",
    "end": "end",
    "max_answer_tokens": "max_answer_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "start": "start",
    "num_frozen_tokens": "num_frozen_tokens",
    "steps": "steps",
    "lr": "learning_rate",
    "batch_size": "batch_size",
    "eval_fraction": "eval_fraction",
    "match": "match",
    "least_share": "least_share",
    "chunk_tokens": "chunk_tokens",
    "seed": "seed",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prefixcore distill`."""
    add_model_arguments(parser)
    parser.add_argument(
        "--context",
        type=Path,
        required=True,
        metavar="FILE",
        help="the text, in UTF-8, that the prefix is to stand for",
    )
    parser.add_argument(
        "--num-virtual-tokens", type=positive, required=True, metavar="P", help="of the prefix; fewer than the text has"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="ADAPTER", help="folder to write the adapter to")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the text is the system message and prompts are a user's turns, written by the model's chat template",
    )
    add_author_arguments(parser.add_argument_group("what you say of it, for the manifest"))

    asked = parser.add_argument_group("prompts, and the answers behind the whole text")
    asked.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="your own prompts: JSON, CSV or Parquet with prompt, and completion where there is a right answer; "
        "or plain lines",
    )
    add_column_arguments(asked)
    asked.add_argument(
        "--questions",
        type=whole,
        metavar="N",
        help=f"prompts that the model asks itself about parts of the text (default: {QUESTIONS}; with --prompts: none)",
    )
    asked.add_argument("--chunk-tokens", type=positive, metavar="N", help="of a part (default: 128; with --chat 512)")
    asked.add_argument(
        "--end", type=plain_escapes, help=r"text at which an answer ends, such as '\n' (default: as the model ends it)"
    )
    asked.add_argument("--max-answer-tokens", type=positive, metavar="N", help="default: 48")
    asked.add_argument(
        "--temperature", type=float, metavar="X", help="of the answers to learn from (default: 0, the likeliest tokens)"
    )
    asked.add_argument("--top-k", type=positive, metavar="K", help="log-probabilities kept a token (default: 20)")
    asked.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="where questions and answers are kept, to go on from (default: beside ADAPTER, with .distill at its end)",
    )

    loop = parser.add_argument_group("training")
    loop.add_argument(
        "--start",
        choices=("match", "mass", "spread", "first"),
        help="keys and values that the prefix starts from: fitted to what the text answers, or of P of its tokens "
        "(default: match)",
    )
    loop.add_argument(
        "--num-frozen-tokens",
        type=whole,
        metavar="N",
        help="the first N virtual tokens stay as they start (default: 0)",
    )
    loop.add_argument("--steps", type=positive, metavar="N", help="default: 300")
    loop.add_argument("--lr", type=float, metavar="RATE", help="of AdamW (default: 0.015)")
    loop.add_argument("--batch-size", type=positive, metavar="N", help="default: 16")
    loop.add_argument("--seed", type=seed, metavar="N", help="of questions, order and what is held out (default: 0)")

    measured = parser.add_argument_group("what is measured")
    held = measured.add_mutually_exclusive_group()
    held.add_argument("--eval-prompts", type=Path, metavar="FILE", help="held-out prompts, as --prompts")
    held.add_argument(
        "--eval-fraction",
        type=float,
        metavar="X",
        help="share of the prompts held out (default: 0.2)",
    )
    measured.add_argument(
        "--match",
        choices=("exact", "contains"),
        help="an answer is right if it is the completion, or contains it (default: exact)",
    )
    measured.add_argument(
        "--least-share",
        type=float,
        metavar="S",
        help="halve P as long as this share of the full text's score is kept, and keep the least such P",
    )
    measured.add_argument("--json", action="store_true", help="print the report as JSON instead of its table")


def whole(text: str) -> int:
    """An argparse type: a whole number from 0."""
    return seed(text)


def build_options(arguments: argparse.Namespace) -> Any:
    """The options of the distillation; UserError: a value is out of range."""
    from ..distill import DistillOptions

    given = {field: getattr(arguments, name) for name, field in FIELDS.items() if getattr(arguments, name) is not None}
    if arguments.questions is None:
        given["questions"] = 0 if arguments.prompts is not None else QUESTIONS
    if arguments.chat and arguments.end is not None:
        raise UserError(f"{option('end')} cannot be given with --chat: the chat template ends each turn; leave it out")
    with user_errors(ValueError):
        return DistillOptions(**given)
