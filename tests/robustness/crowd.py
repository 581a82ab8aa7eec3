"""Readers and writers of one adapter, all at once: `python -m tests.robustness.crowd SECONDS [--no-exchange]`.

Two processes save adapters of two sizes over each other, each with its own record and curve; two read, and one loads
nothing but the record. Every read must find an adapter with its own record. Prints how many saves and reads there
were, and what went wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from prefixcore.adapters import read_adapter, read_record, replace

from .saves import save

SIZES = (2, 5)


def write(target: Path, tokens: int) -> None:
    save(target, tokens)


def read(target: Path, _: int) -> None:
    tokens = read_adapter(target).config.num_virtual_tokens
    if tokens not in SIZES:
        raise AssertionError(f"{tokens} virtual tokens")


def read_the_record(target: Path, _: int) -> None:
    """Whose record it is cannot be known, but that it is the record of the values beside it."""
    record = read_record(target)
    if record.get("model") not in {str(size) for size in SIZES}:
        raise AssertionError(f"a record of {record}")


def work(what: Any, target: Path, tokens: int, until: float, results: Any, no_exchange: bool) -> None:
    if no_exchange:
        replace.exchange = lambda first, second: False
    os.fsync = lambda descriptor: None
    done, failures = 0, []
    while time.monotonic() < until:
        try:
            what(target, tokens)
            done += 1
        except BaseException as error:
            failures.append(f"{what.__name__}: {type(error).__name__}: {error}")
    results.put((what.__name__, done, failures))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seconds", type=float)
    parser.add_argument("--no-exchange", action="store_true", help="as on a file system that cannot exchange folders")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    target = folder / "an adapter [1]"
    context = multiprocessing.get_context("fork")
    try:
        save(target, SIZES[0])
        (target / "notes.txt").write_text("kept")
        results = context.Queue()
        until = time.monotonic() + options.seconds
        jobs = [(write, SIZES[0]), (write, SIZES[1]), (read, 0), (read, 0), (read_the_record, 0)]
        processes = [
            context.Process(target=work, args=(what, target, size, until, results, options.no_exchange))
            for what, size in jobs
        ]
        for process in processes:
            process.start()
        found = [results.get() for _ in processes]
        for process in processes:
            process.join()
        counts: dict[str, int] = {}
        for name, done, _ in found:
            counts[name] = counts.get(name, 0) + done
        failures = [failure for *_, each in found for failure in each]
        save(target, 3)
        left = sorted(path.name for path in folder.iterdir())
        if left != [target.name] or (target / "notes.txt").read_text() != "kept":
            failures.append(f"left behind: {left}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"counts": counts, "failures": failures}))


if __name__ == "__main__":
    main()
