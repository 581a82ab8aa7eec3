"""What compilers made for a test, kept by content, so that only what has changed is compiled again.

    python tests/compiler_cache.py g++ -O1 -c x.cpp -o x.o      the object from the cache, or else from g++

An object is found by the compiler's version, the options, and the text of the source and of every header that it read.
It lies in ``PREFIXCORE_TEST_CACHE``, by default ``~/.cache/prefixcore/tests`` (or in ``XDG_CACHE_HOME``); that folder
may be removed at any time. What nobody has asked for in a month is removed when something is added.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
MONTH = 30 * 24 * 3600


def folder() -> Path:
    if asked := os.environ.get("PREFIXCORE_TEST_CACHE"):
        return Path(asked)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefixcore" / "tests"


def digest(*parts: str | bytes) -> str:
    """Of all parts; where one ends and the next begins counts."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(f"{len(data)}:".encode() + data)
    return found.hexdigest()


def load(key: str) -> bytes | None:
    path = folder() / key
    try:
        data = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    return data


def store(key: str, data: bytes) -> None:
    path = folder() / key
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_bytes(data)
    unfinished.replace(path)
    for other in path.parent.iterdir():
        try:
            if other.stat().st_mtime < time.time() - MONTH:
                other.unlink()
        except OSError:  # another process was quicker
            continue


def remembered(kind: str, parts: Sequence[str], make: Callable[[], Any]) -> Any:
    """The JSON value that ``make`` returns; it is called where no process has called it for these ``parts``."""
    key = f"{kind}/{digest(*parts)}.json"
    if (found := load(key)) is not None:
        return json.loads(found)
    value = make()
    store(key, json.dumps(value).encode())
    return value


# --- objects --------------------------------------------------------------------------------------


def stand_in(compiler: str, path: Path) -> str:
    """Writes a script to ``path`` that compiles as ``compiler`` does, with the cache."""
    command = shlex.join([sys.executable, str(Path(__file__).resolve()), *compiler.split()])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    path.chmod(0o755)
    return str(path)


def compile_object(command: list[str]) -> int:
    """Runs ``compiler ... -c source -o object``, or does what it did the last time; its exit status."""
    target, read = Path(_option(command, "-o")), _option(command, "-MF")
    if not read:
        read = f"{target}.d"
        command = [*command, "-MD", "-MF", read]
    compiler = list(takewhile(lambda word: not word.startswith("-"), command))  # two words, where one wraps another
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    options = [x for x, before in zip(command, ["", *command], strict=False) if before not in ("-o", "-MF")]
    call = digest(version, *map(_anywhere, options))
    (folder() / "objects").mkdir(parents=True, exist_ok=True)
    with FileLock(folder() / "objects" / f"{call}.lock"):  # two processes that want the same object: one compiles
        if (entry := _entry(call)) is not None and (data := load(f"{entry}.o")) is not None:
            output = load(f"{entry}.txt") or b""
            target.write_bytes(data)
            Path(read).write_text(f"{target}: {' '.join(_headers(call))}\n")
            sys.stderr.buffer.write(output)
            return 0
        began = time.time()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        sys.stderr.buffer.write(done.stdout)
        if done.returncode == 0:
            names = Path(read).read_text().replace("\\\n", " ").split(":", 1)[1].split()
            if any(Path(name).stat().st_mtime >= began for name in names):
                return 0  # edited while it was compiled: of which text the object is, nobody knows
            store(f"objects/{call}.json", json.dumps([_anywhere(name) for name in names]).encode())
            if (entry := _entry(call)) is not None:
                store(f"{entry}.txt", done.stdout)
                store(f"{entry}.o", target.read_bytes())
        return done.returncode


def _option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1] if name in command else ""


def _anywhere(text: str) -> str:
    """The same text for every checkout."""
    return text.replace(str(ROOT), "{root}")


def _headers(call: str) -> list[str]:
    """What this call read, source included, when it was last made."""
    return [name.replace("{root}", str(ROOT)) for name in json.loads(load(f"objects/{call}.json") or b"[]")]


def _entry(call: str) -> str | None:
    """Where the object lies, or would lie, for the files that this call reads as they are now."""
    headers = _headers(call)
    try:
        return f"objects/{digest(call, *(Path(name).read_bytes() for name in headers))}" if headers else None
    except OSError:  # a header has gone
        return None


def main(command: list[str]) -> int:
    if "-c" in command and "-o" in command:
        return compile_object(command)
    return subprocess.run(command).returncode


if __name__ == "__main__":
    if shutil.which(sys.argv[1]) is None:
        raise SystemExit(f"{sys.argv[1]}: not found")
    raise SystemExit(main(sys.argv[1:]))
