"""Measure what an adapter does to its model, on probes of its task and of others, and write a page about it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from .common import (
    ADAPTER,
    NAMED,
    OK,
    adapter_folder,
    adapter_name,
    add_column_arguments,
    add_force_argument,
    add_model_arguments,
    columns_of,
    named_model,
    open_model,
    plain_escapes,
    positive,
    warnings_as_lines,
)
from .failures import UserError, user_errors
from .output import check_open, results, say, to_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prefixcore audit`."""
    parser.add_argument("adapter", type=adapter_name, metavar="ADAPTER", help=ADAPTER)
    add_model_arguments(parser, required=False, said=NAMED)
    add_force_argument(parser)
    parser.add_argument(
        "--probe",
        type=Path,
        required=True,
        metavar="FILE",
        help="examples with prompt and completion, as train reads them, of its task; best ones it was not trained on",
    )
    parser.add_argument(
        "--other",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="the same of another task, to see how far the adapter leaks; may be given several times",
    )
    parser.add_argument(
        "--generic",
        action="store_true",
        help="measure the leak on a few built-in texts too (done without --other in any case)",
    )
    parser.add_argument(
        "--examples",
        type=Path,
        metavar="FILE",
        help="examples of the task, best its training data, for written prompts to show (default: some probes)",
    )
    add_column_arguments(parser)
    parser.add_argument(
        "--instruction",
        type=plain_escapes,
        action="append",
        default=[],
        metavar="TEXT",
        help="what a person would write in the adapter's place, tried beside it; may be given several times",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="HTML_OR_DIR",
        help="the page, NAME.html, with NAME.json beside it, or a folder for them (default: ADAPTER-audit.html)",
    )
    parser.add_argument(
        "--end", type=plain_escapes, help=r"text at which an answer ends, such as '\n' (default: as in training)"
    )
    parser.add_argument(
        "--limit", type=positive, default=64, metavar="N", help="the most probes of each file (default: 64)"
    )
    parser.add_argument(
        "--trials",
        type=int,
        default=48,
        metavar="N",
        help="losses that the search for a text may compute; 0: no search (default: 48)",
    )
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON instead of its summary")


def run(arguments: argparse.Namespace) -> int:
    """Read the probes, audit, write the page and its JSON, print the summary."""
    check_open()
    named, arguments.adapter = arguments.adapter, adapter_folder(arguments.adapter)
    if arguments.trials < 0:
        raise UserError(f"--trials must be at least 0, got {arguments.trials}")

    from ..adapters import AdapterError, read_adapter
    from ..adapters.hub import last_name
    from ..audit import AuditError, audit
    from ..audit.report import targets
    from ..audit.virtual import check_method
    from ..training import DataError

    name = named.resolve().name if named.is_dir() else last_name(named.as_posix())
    out = arguments.out or Path(f"{name}-audit.html")
    check_out(*targets(out))
    check_libraries()
    with (
        user_errors(AdapterError, AuditError),
        user_errors(RecursionError, what=f"{arguments.adapter}: nested too deep"),
    ):
        adapter = read_adapter(arguments.adapter)
        check_method(adapter)
    arguments.model = arguments.model or named_model(adapter)
    with user_errors(DataError):
        probes, others, examples = read_probes(arguments)
    model, tokenizer = open_model(arguments)
    failures = user_errors(AdapterError, AuditError, DataError, ValueError, TypeError, NotImplementedError)
    too_deep = user_errors(RecursionError, what=f"{arguments.adapter}: nested too deep")
    with failures, too_deep, warnings_as_lines():
        report = audit(
            model,
            tokenizer,
            arguments.adapter,
            probes,
            others,
            examples=examples,
            instructions=arguments.instruction,
            generic=arguments.generic or None,
            end=arguments.end,
            limit=arguments.limit,
            trials=arguments.trials,
            strict=not arguments.force,
            name=arguments.probe.stem,
            show_progress=None,
        )
    page, data = report.write(out)
    say(f"page     {page}\njson     {data}")
    results(to_json(report.data, indent=1) if arguments.json else "\n".join(report.data["summary"]))
    return OK


def read_probes(arguments: argparse.Namespace) -> tuple[list[Any], dict[str, list[Any]], list[Any] | None]:
    """The probes, those of other tasks by the names of their files, and the examples."""
    from ..training import read_examples

    columns = columns_of(arguments)
    probes = read_examples(arguments.probe, columns=columns)
    others: dict[str, list[Any]] = {}
    for path in arguments.other:
        if path.stem in others:
            raise UserError(f"--other {path}: another file has the name {path.stem} too; rename one of them")
        others[path.stem] = read_examples(path, columns=columns)
    return probes, others, None if arguments.examples is None else read_examples(arguments.examples, columns=columns)


def check_out(page: Path, data: Path) -> None:
    """Refuse a place where the page and its JSON cannot be written, before any work."""
    for path in (page, data):
        if path.is_dir():
            raise UserError(f"--out {path} is a folder; expected a file, or a folder that has no {path.name} folder")
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise UserError(f"--out {path} cannot be written: {parent} is not a folder that you may write to")
    for manifest in ("prefixcore_manifest.json", "adapter_config.json"):
        if (page.parent / manifest).exists():
            raise UserError(f"--out {page}: an adapter's folder holds the adapter alone; write the page elsewhere")


def check_libraries() -> None:
    """Refuse before any work where what renders the page is not installed."""
    import importlib.util

    for name in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed; pip install 'prefixcore[audit]'")
