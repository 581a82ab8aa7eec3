"""What the subcommands share: errors that are the user's to mend, and opening a model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OK, USER_ERROR, INTERRUPTED = 0, 2, 130
"""Exit codes: done; something the user can mend (one line on standard error); stopped by Ctrl-C."""

DTYPES = ("auto", "float32", "bfloat16", "float16")


class UserError(Exception):
    """Something the user can mend; the message says what was expected, what came and how to mend it."""


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of these kinds, whose messages are written for the user, into `UserError`."""
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """`--model`, `--dtype` and `--device`."""
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="folder of a transformers model, or its id")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights (default: auto, as they are stored)"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto, a GPU if there is one)"
    )


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def plain_escapes(text: str) -> str:
    r"""An argparse type: text in which `\n` and `\t` stand for a line break and a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def open_model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The causal language model that `--model` names, in evaluation mode, and its tokenizer.

    Raises:
        UserError: no such folder, not a model that transformers can open, or no such device.
    """
    import torch

    with user_errors(RuntimeError):
        device = _device(arguments.device)
        torch.empty(0, device=device)
    name = arguments.model
    folder = Path(name)
    looks_local = folder.is_absolute() or name.startswith((".", "~")) or folder.exists()
    if looks_local and not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise UserError(f"--model {name} {what}; expected the folder of a transformers model")

    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=arguments.dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--model {name} cannot be opened: {_first_line(error)}") from error
    return model.to(device).eval(), tokenizer


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text under one another, every column as wide as its widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
