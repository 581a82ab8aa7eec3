"""Check all of an adapter: files, digests, tensors, what its manifest has to say, base model, signature."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    ADAPTER,
    FOUND_WRONG,
    OK,
    adapter_folder,
    adapter_name,
    add_model_arguments,
    load_adapter,
    open_model,
)
from .failures import UserError, user_errors
from .output import check_open, results, say, table, to_json

if TYPE_CHECKING:
    from ..adapters import Check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prefixcore verify`."""
    parser.add_argument("adapter", type=adapter_name, metavar="ADAPTER", help=ADAPTER)
    add_model_arguments(parser, required=False, said="compare with this base model")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="measure again: the file that train was given, or the held-out examples (with --model)",
    )
    parser.add_argument(
        "--public-key", type=Path, metavar="KEY.pub", help="of whoever is to have signed it with model_signing, PEM"
    )
    parser.add_argument(
        "--signature", type=Path, metavar="FILE", help="the signature (default: model.sig in the adapter's folder)"
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="CHECK", help="a check that may fail, by its name; repeatable"
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each check; exit code 1, and the names on standard error, if one of them fails."""
    check_open()
    from ..adapters import AdapterError, verify_adapter
    from ..adapters.verify import as_dicts
    from ..adapters.verify_folder import NOT_SAID

    if arguments.data is not None and arguments.model is None:
        raise UserError("--data is measured with the base model: give --model")
    if arguments.signature is not None and arguments.public_key is None:
        raise UserError("--signature is checked with a key: give --public-key")
    arguments.adapter = adapter_folder(arguments.adapter)
    model, tokenizer = (None, None) if arguments.model is None else open_model(arguments)
    with user_errors(AdapterError):
        checks = verify_adapter(
            arguments.adapter, model=model, public_key=arguments.public_key, signature=arguments.signature
        )
    if arguments.data is not None:
        checks.append(measured(arguments, checks, model, tokenizer))
    checks = skipped(checks, arguments.skip)
    failed = [check.name for check in checks if check.failed]
    if arguments.json:
        facts = {"adapter": str(arguments.adapter), "failed": failed, "checks": as_dicts(checks)}
        results(to_json(facts, indent=2))
    else:
        results(table([(check.outcome, check.name, check.detail) for check in checks]))
    if failed:
        say(f"prefixcore verify: {arguments.adapter}: failed: {', '.join(failed)}")
        if all(check.detail == NOT_SAID for check in checks if check.failed):
            say(
                "Nothing is damaged: these statements are missing from the manifest. Say them with train's "
                "--license and --intended-use or the keywords of handle.save, or allow their lack with "
                + " ".join(f"--skip {name}" for name in failed)
            )
    return FOUND_WRONG if failed else OK


def skipped(checks: list[Check], names: list[str]) -> list[Check]:
    """The checks, of which those that may fail are not counted."""
    from ..adapters import Check

    known = [check.name for check in checks]
    for name in names:
        if name not in known:
            raise UserError(f"--skip {name}: no check of this name; there are {', '.join(known)}")
    return [Check(c.name, "skipped", c.detail) if c.failed and c.name in names else c for c in checks]


def measured(arguments: argparse.Namespace, checks: list[Check], model: Any, tokenizer: Any) -> Check:
    """Whether the metrics of the manifest come out again."""
    from ..adapters import AdapterError, Check, read_adapter
    from ..adapters.verify import FAILED, PASSED, UNCHECKED
    from ..training import DataError, remeasure

    name = "measured"
    before = [check.name for check in checks if check.failed and check.name in ("manifest", "digest", "loads", "model")]
    if before:
        return Check(name, UNCHECKED, f"what is measured would be another adapter's or model's: {', '.join(before)}")
    manifest = read_adapter(arguments.adapter).manifest
    try:
        handle = load_adapter(model, arguments.adapter)
        with handle:
            found = remeasure(model, tokenizer, manifest, arguments.data)
    except (AdapterError, DataError, NotImplementedError) as error:
        return Check(name, FAILED, str(error))
    if found.differences:
        return Check(name, FAILED, "; ".join(found.differences))
    text = ", ".join(f"{metric} {value:.4g}" for metric, value in found.metrics.items())
    data = {True: "; the training data is the manifest's", None: ""}.get(found.training_data)
    if data is None:
        return Check(
            name, FAILED, f"{arguments.data}: what is left for training has another digest than the manifest's"
        )
    return Check(name, PASSED, f"{text} on {found.examples} held-out examples{data}")
