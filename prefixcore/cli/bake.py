"""Make a plain prefix that is equal to a soft prompt, a text or a reparameterized prefix."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import (
    ADAPTER,
    OK,
    adapter_folder,
    adapter_name,
    add_force_argument,
    add_model_arguments,
    open_model,
    plain_escapes,
    warnings_as_lines,
)
from .failures import UserError, user_errors
from .output import check_open, results, to_json
from .train_provenance import author_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prefixcore bake`."""
    parser.add_argument("adapter", type=adapter_name, nargs="?", metavar="ADAPTER", help=ADAPTER)
    parser.add_argument("--text", type=plain_escapes, help="a text to stand before every input, in place of an adapter")
    parser.add_argument("--text-file", type=Path, metavar="FILE", help="the same, from a file in UTF-8")
    add_model_arguments(parser)
    add_force_argument(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write the prefix to")
    parser.add_argument("--task", type=author_text, help="what it does, in words (default: as the adapter says)")
    parser.add_argument(
        "--license", type=author_text, metavar="TEXT", help="what others may do with it, such as CC-BY-4.0"
    )
    parser.add_argument("--intended-use", type=author_text, metavar="TEXT", help="what it is for, and what not")
    parser.add_argument("--task-id", type=int, metavar="N", help="of the prompts of several tasks, which one")
    parser.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="whether the text begins with the token that the tokenizer puts first; requests then come without it",
    )
    parser.add_argument(
        "--position-offset",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the text behind the prefix begins at position P, which servers need (default), or at 0",
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help="text to compare on; may be given several times (default: any)"
    )
    parser.add_argument("--json", action="store_true", help="what was compared, as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Bake, compare with the original, write."""
    check_open()
    text = read_text(arguments)
    if (arguments.adapter is None) == (text is None):
        raise UserError("expected an ADAPTER, or a text (--text, --text-file), and not both")
    if arguments.adapter is not None:
        if arguments.bos is not None:
            raise UserError("--bos is about a text, and an adapter is given; leave it out")
        arguments.adapter = adapter_folder(arguments.adapter)

    from ..adapters import AdapterError, check_target

    with user_errors(AdapterError):
        check_target(arguments.out.absolute())
    model, tokenizer = open_model(arguments)

    from ..hf import bake

    with user_errors(AdapterError, ValueError, TypeError, NotImplementedError), warnings_as_lines():
        baked = bake(
            model,
            arguments.adapter,
            arguments.out,
            text=text,
            tokenizer=tokenizer,
            bos=arguments.bos,
            task=arguments.task,
            task_id=arguments.task_id,
            license=arguments.license,
            intended_use=arguments.intended_use,
            inputs=arguments.prompt,
            strict=not arguments.force,
            position_offset=arguments.position_offset,
        )
    if arguments.json:
        results(to_json({"out": str(baked.path), "method": baked.method, **vars(baked.comparison)}))
    else:
        results(str(baked))
    return OK


def read_text(arguments: argparse.Namespace) -> str | None:
    """`--text`, or the contents of `--text-file`; None: neither is given."""
    if arguments.text_file is None:
        return arguments.text if isinstance(arguments.text, str) else None
    if arguments.text is not None:
        raise UserError("--text and --text-file are two texts; give one")
    try:
        return arguments.text_file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--text-file {arguments.text_file} is not UTF-8 text ({error.reason})") from None
