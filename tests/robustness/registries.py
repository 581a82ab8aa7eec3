"""Writers of a registry that die at every moment, or write at once: `python -m tests.robustness.registries die|crowd`.

`die`: a forked child puts `new` in the place of `old`, which does the same task, and is ended at one line of the code
that writes. Then every entry must be whole, and after the next writer one of the two is there, the history says which,
and nothing is left over. `crowd`: writers replace one adapter again and again, others try to add a second one for its
task, and readers list what there is. Prints what was tried, and what failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from torch import nn

from prefixcore.adapters import AdapterError, Manifest, Registry, registry, registry_log, replace, write_adapter
from prefixcore.nn import PromptTuningConfig, SoftPrompt

from . import saves

TASK = "country -> capital"
BASE = nn.Linear(2, 2)


def save(folder: Path, tokens: int, task: str = TASK) -> Path:
    config = PromptTuningConfig(tokens, init="zero")
    manifest = Manifest.create(BASE, config, task=task)
    return write_adapter(folder, module=SoftPrompt(4, config), config=config, manifest=manifest)


def child(directory: Path, source: Path, moment: int) -> int:
    """Adds `source` in a forked process that ends at line `moment`; returns its exit status."""
    number = os.fork()
    if not number:
        code = 1
        try:
            sys.settrace(saves.end_at(moment, lambda: os._exit(9)))
            Registry(directory).add(source, name="new", replace=True)
            sys.settrace(None)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(number, 0)
    return os.waitstatus_to_exitcode(status)


def problem(directory: Path, third: Path, digests: dict[str, str]) -> str | None:
    """What is wrong with a registry whose writer died, if anything is."""
    found = Registry(directory)
    if wrong := [entry for entry in found.entries(whole=True) if entry.problem]:
        return f"{wrong[0].name}: {wrong[0].problem}"
    found.add(third)
    names = [entry.name for entry in found.entries()]
    if names not in (["new", "third"], ["old", "third"]):
        return f"there are {names}"
    events = [(event.action, event.name) for event in found.history()]
    expected = [("add", "old"), *([("replace", "new")] if names[0] == "new" else []), ("add", "third")]
    if events != expected:
        return f"with {names} the history is {events}"
    if names[0] == "new" and found.history()[1].replaced[0].digest != digests["old"]:
        return "the history names another digest for what was replaced"
    if found.find(names[0]).digest != digests[names[0]]:
        return f"{names[0]} has another digest"
    left = sorted(path.name for path in directory.iterdir() if path.name not in (*names, registry_log.STATE))
    left += [path.name for path in (directory / registry_log.STATE).iterdir() if path.name.startswith("pending")]
    return f"left behind: {left}" if left else None


def die(folder: Path, every: int) -> dict[str, Any]:
    saves.WRITERS = {module.__file__ for module in (registry, registry_log, replace)}
    old, new = save(folder / "old", 1), save(folder / "new", 2)
    third = save(folder / "third", 3, task="another")
    tried, failures, moment = 0, [], 1
    while True:
        directory = folder / f"registry-{moment}"
        first = Registry(directory).add(old)
        digests = {"old": str(first.digest), "new": str(Registry(folder / "other").add(new, replace=True).digest)}
        tried += 1
        code = child(directory, new, moment)
        if failure := problem(directory, third, digests):
            failures.append(f"line {moment}: {failure}")
        shutil.rmtree(directory)
        if code != 9:
            return {"tried": tried, "failures": failures + ([] if code == 0 else [f"the child ended with {code}"])}
        moment += every


def replacing(directory: Path, sources: list[Path], turn: int) -> None:
    Registry(directory).add(sources[turn % 2], name="capitals", replace=True)


def a_second(directory: Path, sources: list[Path], turn: int) -> None:
    try:
        Registry(directory).add(sources[turn % 2], name=f"second-{os.getpid()}")
    except AdapterError as error:
        if "does this task" not in str(error):
            raise
    else:
        raise AssertionError("a second one for this task was added")


def reading(directory: Path, sources: list[Path], turn: int) -> None:
    entries = Registry(directory).entries(whole=bool(turn % 2))
    if [entry.name for entry in entries] != ["capitals"] or entries[0].problem:
        raise AssertionError(f"{[(entry.name, entry.problem) for entry in entries]}")


def work(what: Any, directory: Path, sources: list[Path], until: float, results: Any) -> None:
    os.fsync = lambda descriptor: None
    done, failures = 0, []
    while time.monotonic() < until:
        try:
            what(directory, sources, done)
            done += 1
        except BaseException as error:
            failures.append(f"{what.__name__}: {type(error).__name__}: {error}")
    results.put((what.__name__, done, failures))


def crowd(folder: Path, seconds: float) -> dict[str, Any]:
    sources, directory = [save(folder / "one", 1), save(folder / "two", 2)], folder / "registry"
    replacing(directory, sources, 0)
    context = multiprocessing.get_context("fork")
    results, until = context.Queue(), time.monotonic() + seconds
    jobs = (replacing, replacing, a_second, reading)
    processes = [context.Process(target=work, args=(what, directory, sources, until, results)) for what in jobs]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    failures = [failure for _, _, some in found for failure in some]
    history = Registry(directory).history()
    for before, event in zip(history, history[1:], strict=False):
        if [old.digest for old in event.replaced] != [before.digest]:
            failures.append(f"the history has {before} and then {event}")
    if history[-1].digest != Registry(directory).find("capitals").digest:
        failures.append("the last event is not what is there")
    counts = {name: sum(done for other, done, _ in found if other == name) for name, _, _ in found}
    return {"counts": counts, "replaced": len(history) - 1, "failures": failures}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("how", choices=("die", "crowd"))
    parser.add_argument("--every", type=int, default=1, help="leave out all moments but every so many")
    parser.add_argument("--seconds", type=float, default=3)
    options = parser.parse_args()
    os.fsync = lambda descriptor: None  # it guards against a machine that dies, and takes most of the time
    folder = Path(tempfile.mkdtemp())
    try:
        result = die(folder, options.every) if options.how == "die" else crowd(folder, options.seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
