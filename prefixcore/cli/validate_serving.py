"""Find out whether a server answers with each adapter as transformers does; also one that is not ours."""

from __future__ import annotations

import argparse
import getpass
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import _interrupt
from ..version import __version__
from .common import add_model_arguments, open_model, positive
from .failures import UserError, user_errors
from .output import check_open, results, say, table, to_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prefixcore validate-serving`."""
    parser.add_argument("--url", required=True, help="the server's address, such as http://127.0.0.1:8000")
    add_model_arguments(parser)
    parser.add_argument("--adapters", type=Path, required=True, metavar="DIR", help="folder of the adapters it serves")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="one of the adapters; may be given several times (default: all)"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='JSON lines with "prompt", and "adapter" where one is for an adapter alone (default: what the adapter\'s '
        "training held out, where its data still lie; else generic ones)",
    )
    parser.add_argument("--count", type=positive, default=8, metavar="N", help="prompts of an adapter (default: 8)")
    parser.add_argument("--max-tokens", type=positive, default=16, metavar="N", help="of an answer (default: 16)")
    parser.add_argument("--base", metavar="NAME", help="the server's name of the bare model (default: as it lists it)")
    parser.add_argument("--api-key", metavar="KEY", help="default: the environment's OPENAI_API_KEY")
    parser.add_argument(
        "--tolerance", type=float, metavar="NATS", help="of log-probabilities (default: by --dtype; 0.002 in float32)"
    )
    parser.add_argument(
        "--timeout", type=positive, default=120, metavar="SECONDS", help="without a byte (default: 120)"
    )
    parser.add_argument("--who", metavar="NAME", help="who validates, for the report (default: the user's name)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON too")


def run(arguments: argparse.Namespace) -> int:
    """Ask the server, hold its answers to the reference, print the report."""
    check_open()
    if not arguments.adapters.is_dir():
        raise UserError(f"--adapters {arguments.adapters} is not a folder; expected one with a folder for each adapter")
    if arguments.tolerance is not None and not 0 < arguments.tolerance < 100:
        raise UserError(f"--tolerance must be above 0 and below 100 nats, got {arguments.tolerance}")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise UserError(f"--json {arguments.json}: there is no folder {arguments.json.absolute().parent}")

    from ..adapters import AdapterError, adapter_digest
    from ..serving.client import Client, ServingError
    from ..serving.validate import Validation
    from ..serving.validate_probes import find_probes, read_prompts
    from ..serving.validate_reference import Reference
    from ..serving.validate_report import Report
    from ..serving.validate_server import Asker
    from ..training import DataError

    with user_errors(ValueError):
        client = Client(arguments.url, api_key=arguments.api_key, timeout=arguments.timeout)
    folders = adapter_folders(arguments)
    with user_errors(DataError):
        given = {} if arguments.prompts is None else read_prompts(arguments.prompts)
    probes = {name: find_probes(folder, given, arguments.count) for name, folder in folders.items()}
    with user_errors(AdapterError):
        digests = {name: adapter_digest(folder) for name, folder in folders.items()}

    # What cannot be asked at all is known before minutes are spent on opening the model.
    cards, asker = None, Asker(client, arguments.max_tokens)
    with user_errors(ServingError):
        try:
            cards = client.model_cards()
        except ServingError as error:
            if error.status != 404:
                raise
        base = arguments.base or base_name(cards, list(folders))
        try:
            asker.try_extras(base or next(iter(folders)))
        except ServingError as error:
            if error.status is None:
                raise
    model, tokenizer = open_model(arguments)
    with user_errors(AdapterError, ValueError, TypeError, NotImplementedError, DataError):
        reference = Reference(model, tokenizer, folders)
        validation = Validation(asker, reference, probes, digests, base, cards, arguments.tolerance, say)
        begin = datetime.now(timezone.utc)
        lines = validation.run()
    report = Report(facts(arguments, asker, model, begin, validation.judge.tolerance), lines)
    if arguments.json is not None:
        arguments.json.write_text(to_json(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        _interrupt.tell(f"the report is in {arguments.json}")
    results(as_text(report, digests))
    return report.exit_code


def adapter_folders(arguments: argparse.Namespace) -> dict[str, Path]:
    """The adapters' folders by name."""
    found = {
        path.name: path
        for path in sorted(arguments.adapters.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }
    for name in arguments.only or ():
        if name not in found:
            raise UserError(f"--only {name}: there is no such adapter; there are {', '.join(found) or 'none'}")
    if not found:
        raise UserError(f"--adapters {arguments.adapters} holds no adapter")
    return {name: path for name, path in found.items() if not arguments.only or name in arguments.only}


def base_name(cards: list[dict[str, Any]] | None, adapters: list[str]) -> str | None:
    """The server's name of the bare model: the first that it lists, which is no adapter and has no parent."""
    for card in cards or ():
        name = card.get("id")
        if isinstance(name, str) and name not in adapters and not card.get("parent"):
            return name
    return None


def facts(arguments: argparse.Namespace, asker: Any, model: Any, begin: datetime, tolerance: float) -> dict[str, str]:
    """Who, when, which server, which versions."""
    import torch
    import transformers

    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    reference = f"transformers {transformers.__version__}, torch {torch.__version__}, prefixcore {__version__}"
    return {
        "server": f"{asker.client.url} ({asker.version() or 'it does not say what it is'})",
        "model": f"{arguments.model} ({dtype})",
        "reference": f"{reference}, Python {platform.python_version()}",
        "tolerance": f"{tolerance:g} nats",
        "when": begin.strftime("%Y-%m-%d %H:%M UTC"),
        "who": arguments.who or user(),
    }


def user() -> str:
    """The user's name, if there is one."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return "-"


def as_text(report: Any, digests: Mapping[str, str]) -> str:
    """The report as a person signs it."""
    parts = ["Validation of a server of adapters", table(list(report.facts.items()))]
    parts.append(table([("adapter", "digest"), *digests.items()]))
    parts.append(table(report.rows()))
    remarks = [remark if len(remark) <= 400 else f"{remark[:400]}..." for remark in report.remarks()]
    if remarks:
        parts.append("\n".join(remarks))
    parts.append(f"verdict: {report.verdict}")
    parts.append("signed: ______________________________   date: ______________")
    return "\n\n".join(parts)
