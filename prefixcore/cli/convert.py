"""Turn an adapter into a format of others, or one of theirs into an adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import DTYPES, OK, adapter_folder, adapter_name, open_model, warnings_as_lines
from .failures import UserError, user_errors
from .output import check_open, results, say, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prefixcore convert`."""
    parser.add_argument(
        "source",
        type=adapter_name,
        nargs="*",
        metavar="SOURCE",
        help="an adapter's folder, or its name on the Hub; with --from, theirs",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--to", metavar="FORMAT", help="write this format (--list names them)")
    which.add_argument("--from", dest="origin", metavar="FORMAT", help="read this format and write an adapter")
    which.add_argument("--list", action="store_true", help="name every format and what it holds")
    parser.add_argument("--out", type=Path, metavar="PATH", help="file or folder to write")
    parser.add_argument(
        "--model", metavar="DIR_OR_ID", help="the model: always with --from, and for the adapters library"
    )
    parser.add_argument("--device", default="auto", help="of the model (default: auto)")
    parser.add_argument(
        "--dtype", choices=DTYPES[1:], default="float32", help="of the numbers that --to writes (default: float32)"
    )
    parser.add_argument("--task", help="with --from: what it does, in words")
    parser.add_argument("--task-id", type=int, metavar="N", help="with --from, of a table of several tasks: which one")
    parser.add_argument(
        "--position-offset",
        action=argparse.BooleanOptionalAction,
        help="with --from, where the text behind a prefix is to begin: at P, which servers need, or at 0 (default: at "
        "P where the model's keys can be turned, else as the file has it)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Convert, and say what the format does not hold."""
    check_open()
    from ..adapters.formats import FORMATS

    if arguments.list:
        rows = [("format", "of", "holds", "layout")]
        rows += [(each.name, each.title, ", ".join(each.kinds), each.layout) for each in FORMATS.values()]
        results(table(rows))
        return OK
    name = arguments.to or arguments.origin
    if name is None:
        raise UserError("expected --to FORMAT, --from FORMAT or --list")
    if name not in FORMATS:
        raise UserError(f"expected one of the formats {', '.join(FORMATS)}, got {name!r}")
    if not arguments.source or arguments.out is None:
        raise UserError("expected a SOURCE to read and --out PATH to write")
    if arguments.model is None and (arguments.origin is not None or FORMATS[name].needs_model):
        raise UserError(
            f"expected --model, the model that the adapter is for: {FORMATS[name].title} does not say enough of it"
        )
    with warnings_as_lines():
        _read(arguments) if arguments.origin else _write(arguments)
    return OK


def _model(arguments: argparse.Namespace) -> Any:
    return open_model(argparse.Namespace(model=arguments.model, device=arguments.device, dtype="auto"))[0]


def _write(arguments: argparse.Namespace) -> None:
    import torch

    from ..adapters import AdapterError
    from ..hf import export_adapter

    if arguments.task is not None or arguments.task_id is not None or arguments.position_offset is not None:
        raise UserError("--task, --task-id and --position-offset mean something with --from only; leave them out")
    folders = [adapter_folder(each) for each in arguments.source]
    model = None if arguments.model is None else _model(arguments)
    with user_errors(AdapterError, ValueError, TypeError, NotImplementedError):
        lost = export_adapter(folders, arguments.to, arguments.out, model=model, dtype=getattr(torch, arguments.dtype))
    results(f"{arguments.out}: written as {arguments.to}")
    for each in lost:
        say(f"not in it: {each}")


def _read(arguments: argparse.Namespace) -> None:
    from ..adapters import AdapterError, check_target
    from ..hf import import_adapter

    if len(arguments.source) != 1:
        raise UserError(f"expected one SOURCE with --from, got {len(arguments.source)}")
    with user_errors(AdapterError):
        check_target(arguments.out.absolute())
    model = _model(arguments)
    with user_errors(AdapterError, ValueError, TypeError, NotImplementedError):
        import_adapter(
            arguments.source[0],
            arguments.origin,
            arguments.out,
            model=model,
            task=arguments.task,
            task_id=arguments.task_id,
            position_offset=arguments.position_offset,
        )
    results(f"{arguments.out}: an adapter, read as {arguments.origin}")
