"""Saves that die or are interrupted at every moment: `python -m tests.robustness.saves die|interrupt|random`.

An adapter `old` is saved; then a forked child saves `new` over it and is ended at one line of the code that writes
(before and after each call of the file system lies a line). Afterwards the folder must be `old` or `new`, whole, with
its own record, and the next save must leave nothing beside it. Prints how many moments were tried, and what failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from prefixcore import adapters
from prefixcore.adapters import AdapterError, Manifest, exchange, read_adapter, read_record, replace, writing
from prefixcore.adapters.storage import write_new
from prefixcore.nn import PromptTuningConfig, SoftPrompt

WRITERS = {module.__file__ for module in (replace, exchange, writing)}
RANDOM_DEATHS = 150


def save(target: Path, tokens: int, record: bool = True) -> None:
    """An adapter of so many virtual tokens, whose record, if it gets one, says the same."""
    config = PromptTuningConfig(tokens, init="zero")
    adapters.write_adapter(
        target,
        module=SoftPrompt(4, config),
        config=config,
        manifest=Manifest.create(nn.Linear(2, 2), config),
        record={"model": str(tokens), "train_loss": []} if record else None,
        curve=b"a picture" if record else None,
    )


def end_at(moment: int, what: Callable[[], Any]) -> Callable[..., Any]:
    """A trace function that calls `what` at line number `moment` of those that are run in the writers' files."""
    seen = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal seen
        if frame.f_code.co_filename not in WRITERS and frame.f_code is not write_new.__code__:
            return None
        if event == "line":
            seen += 1
            if seen == moment:
                sys.settrace(None)
                what()
        return trace

    return trace


def child(target: Path, trace: Callable[..., Any] | None) -> int:
    """Saves `new` in a forked process, traced; returns the process's number."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        sys.settrace(trace)
        save(target, 2)
        sys.settrace(None)
        code = 0
    except KeyboardInterrupt:
        code = 3
    finally:
        os._exit(code)


def interrupt() -> None:
    raise KeyboardInterrupt


def problem(target: Path) -> str | None:
    """What is wrong with the folder, if anything is."""
    try:
        tokens = read_adapter(target).config.num_virtual_tokens
        record = read_record(target)
    except AdapterError as error:
        return str(error)
    if tokens not in (1, 2):
        return f"{tokens} virtual tokens"
    if record.get("model") != str(tokens) or not (target / "curve.png").exists():
        return f"an adapter of {tokens} tokens with the record of one of {record.get('model')}"
    save(target, 3)
    left = sorted(path.name for path in target.parent.iterdir())
    return None if left == [target.name] else f"left behind: {left}"


def moments(what: Callable[[], Any], target: Path, every: int) -> tuple[int, list[str]]:
    """Ends a save at each line in turn, or at every so many, until one gets through."""
    tried, failures = 0, []
    for moment in itertools.count(1, every):
        save(target, 1)
        tried += 1
        _, status = os.waitpid(child(target, end_at(moment, what)), 0)
        if failure := problem(target):
            failures.append(f"line {moment}: {failure}")
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            break
    return tried, failures


def random_deaths(target: Path, every: int) -> tuple[int, list[str]]:
    """Kills a save after a random time, not longer than a whole one takes."""
    generator, failures = random.Random(0), []
    began = time.perf_counter()
    save(target, 1)
    whole = time.perf_counter() - began
    attempts = range(0, RANDOM_DEATHS, every)
    for attempt in attempts:
        save(target, 1)
        number = child(target, None)
        time.sleep(generator.uniform(0, 2 * whole))
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        if failure := problem(target):
            failures.append(f"death {attempt}: {failure}")
    return len(attempts), failures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("how", choices=("die", "interrupt", "random"))
    parser.add_argument("--no-exchange", action="store_true", help="as on a file system that cannot exchange folders")
    parser.add_argument("--every", type=int, default=1, help="leave out all moments but every so many")
    options = parser.parse_args()
    if options.no_exchange:
        replace.exchange = lambda first, second: False
    os.fsync = lambda descriptor: None  # it guards against a machine that dies, and takes most of the time
    folder = Path(tempfile.mkdtemp())
    target = folder / "an adapter [1]"
    try:
        if options.how == "random":
            tried, failures = random_deaths(target, options.every)
        else:
            what = {"die": lambda: os._exit(9), "interrupt": interrupt}[options.how]
            tried, failures = moments(what, target, options.every)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"tried": tried, "failures": failures}))


if __name__ == "__main__":
    main()
