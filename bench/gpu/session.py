"""One run of `make gpu`: its parts, what became of each, the time that is left, and what an earlier run has done."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .outcomes import counted, earlier, failed_rows, packed
from .parts import (
    CUDA_TESTS,
    DEVICE_TESTS,
    REHEARSED,
    REHEARSED_FORCED,
    ROOT,
    SANITIZED_CUDA,
    Part,
    Run,
    command,
    lacking,
)
from .processes import LATE, side_by_side

PASSED, FAILED, CUT, NOT_RUN, LEFT_OUT = "passed", "failed", "cut", "not run", "left out"
KEPT = 5.0  # seconds of all that are left for writing the results
PATIENCE = 5  # times as long a part may take where its kernels are interpreted
SHORTEST = 5.0  # seconds: with less nothing is begun


class Session:
    """The steps, their results, and the time that is left.

    Attributes:
        out: the folder of results.
        limit: seconds for everything; None: each part has its own limit alone.
        machine: what is measured on, as the report says it.
        steps: what became of each step, in order.
    """

    def __init__(self, out: Path, rehearsal: bool, machine: dict[str, Any], limit: float | None = None) -> None:
        self.out, self.rehearsal, self.limit, self.machine = out, rehearsal, limit, machine
        self.began = time.monotonic()
        self.steps: list[dict[str, Any]] = []
        self.pack: Path | None = None
        self.logs = out / "logs"
        self.earlier = earlier(out, machine, rehearsal)
        self.before = {step["step"]: step for step in self.earlier if step["state"] == PASSED}
        self.logs.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        if self.limit is None:
            return float("inf")
        return self.limit - KEPT - (time.monotonic() - self.began)

    def note(self, name: str, state: str, **more: Any) -> bool:
        """Keep and say what became of a step."""
        self.steps.append({"step": name, "state": state, **more})
        self.write()
        print(f"{name}: {state}" + "".join(f"; {key} {value}" for key, value in more.items()), flush=True)
        return state == PASSED

    def run(self, name: str, commands: Sequence[Sequence[str]], limit: float, **settings: str) -> bool:
        """The commands side by side, each with a log of its own; passed if all of them are."""
        began = time.monotonic()
        if self.left() < SHORTEST:
            return self.note(name, NOT_RUN, why="no time was left")
        limit = min(limit, self.left())
        stem = name.replace(" ", "-")
        several = [f"-{number}" if len(commands) > 1 else "" for number in range(len(commands))]
        logs = [self.logs / f"{stem}{number}.log" for number in several]
        codes = side_by_side(commands, logs, limit, settings, ROOT)
        more: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
        if any(codes):
            more["exit"] = codes
            more["logs"] = [str(log.relative_to(self.out)) for log, code in zip(logs, codes, strict=True) if code]
        results = counted(sorted(self.logs.glob(f"{stem}-[0-9]*.xml")))
        wrong = results.get("failures") or results.get("errors") or failed_rows(self.out / f"{stem}.json")
        cut = LATE in codes and set(codes) <= {0, LATE} and not wrong
        state = CUT if cut else FAILED if any(codes) else PASSED
        if results and results["skipped"] == results["tests"]:  # nothing was tested
            state, more["why"] = LEFT_OUT, results.pop("reason")
        results.pop("reason", None)
        return self.note(name, state, **more, **results)

    def part(self, part: Part) -> None:
        """All runs of a part that this tree has, as far as the time goes."""
        about = part.seconds / len(part.runs)
        for run in part.runs:
            name, limit = f"{part.name} {run.name}".strip(), part.limit * (PATIENCE if self.rehearsal else 1)
            if why := lacking(part, run):
                self.note(name, LEFT_OUT, why=why)
            elif name in self.before:
                self.steps.append(self.before[name])
                self.write()
                print(f"{name}: passed in an earlier run of this commit here, and is kept", flush=True)
            elif self.left() < about:
                self.note(name, NOT_RUN, why=f"it takes about {about:.0f} s, and {self.left():.0f} s are left")
            else:
                print(f"{name}: {part.what}; about {about:.0f} s, at most {limit} s", flush=True)
                self.start(name, part, run, limit)

    def start(self, name: str, part: Part, run: Run, limit: float) -> None:
        if part.kind == "sanitizer":
            self.sanitize(name, part)
        elif part.kind == "tests":
            self.tests(name, run, limit)
        else:
            device, scale = ("interpreter", "smoke") if self.rehearsal else ("cuda", "quick")
            settings = {"PREFIXCORE_BENCH_DEVICE": device, "PREFIXCORE_BENCH": scale, **run.settings}
            self.run(name, [command(run, part.kind, self.out, name.replace(" ", "-"))], limit, **settings)

    def tests(self, name: str, run: Run, limit: float) -> None:
        cores, stem = os.cpu_count() or 1, name.replace(" ", "-")
        for old in self.logs.glob(f"{stem}-[0-9]*.xml"):
            old.unlink()
        what = run.what
        if self.rehearsal:
            what = REHEARSED_FORCED if run.path else REHEARSED
        elif run.what == DEVICE_TESTS and self.machine["nvcc"]:
            what = (*DEVICE_TESTS, *CUDA_TESTS)
        processes = max(1, cores // 2) if self.rehearsal else min(16, cores)
        shared = Run(run.name, what, run.settings, run.path)
        commands = [
            ["env", f"PREFIXCORE_TEST_SHARD={n}/{processes}", *command(shared, "tests", self.logs, f"{stem}-{n}")]
            for n in range(processes)
        ]
        device = "interpreter" if self.rehearsal else "cuda"
        forced = {"PREFIXCORE_GPU_PATH": run.path} if run.path else {}
        settings = {"PREFIXCORE_TEST_DEVICE": device, "OMP_NUM_THREADS": "1", **forced, **run.settings}
        self.run(name, commands, limit, **settings)

    def sanitize(self, name: str, part: Part) -> None:
        """A part of the tests again, watched for accesses out of bounds and for races."""
        sanitizer = shutil.which("compute-sanitizer")
        if self.rehearsal or sanitizer is None:
            why = "there is no GPU" if self.rehearsal else "compute-sanitizer is not on PATH"
            self.note(name, LEFT_OUT, why=why)
            return
        sanitized = [("memcheck", part.runs[0].what)]
        if self.machine["nvcc"]:  # the kernels that use shared memory by hand
            sanitized += [("memcheck", SANITIZED_CUDA), ("racecheck", SANITIZED_CUDA)]
        commands = [
            [sanitizer, f"--tool={tool}", "--error-exitcode=9", sys.executable, "-m", "pytest", *tests]
            for tool, tests in sanitized
        ]
        self.run(name, commands, part.limit, PREFIXCORE_TEST_DEVICE="cuda", PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    def write(self, *, finished: bool = False) -> int:
        """After every step, so that whatever ends the run leaves what was found; returns the exit status.

        0: all passed; 1: something failed; 2: nothing failed, but time ran out before all had run. What an earlier
        run into this folder found, and this one was not asked for, stays in the report.
        """
        named = {step["step"] for step in self.steps}
        steps = [*(step for step in self.earlier if step["step"] not in named), *self.steps]
        states = {step["state"] for step in self.steps}
        status = 1 if FAILED in states or not finished else 2 if states & {CUT, NOT_RUN} else 0
        report = {
            "rehearsal": self.rehearsal,
            "finished": finished,
            "passed": status == 0 and all(step["state"] in (PASSED, LEFT_OUT) for step in steps),
            "seconds": round(time.monotonic() - self.began, 1),
            "machine": self.machine,
            "steps": steps,
        }
        (self.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if self.pack:
            packed(self.out, self.pack)
        return status
