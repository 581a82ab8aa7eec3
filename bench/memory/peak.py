"""Peak resident memory of training steps in a fresh process: `python -m bench.memory.peak CASE`, CASE as JSON.

What is reported is how far the peak of a few steps lies above what was resident before the first of them, with the
model loaded and the optimizer made. Linux only: the kernel's own high-water mark is reset before the steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
STEPS = 3


def resident(field: str) -> int:
    """Bytes; `VmRSS` is now, `VmHWM` the most there has been."""
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"{STATUS} has no {field}")


def can_measure() -> bool:
    return STATUS.exists() and os.access(CLEAR, os.W_OK)


def measure(case: dict[str, Any]) -> dict[str, int]:
    """`{"before", "peak", "state"}` in bytes, in this process."""
    from bench import models
    from bench.steps.contenders import MAKERS

    shape = models.Shape(**case["shape"])
    model = models.make(shape, positions=case["T"] + case["P"])
    batch = models.batch(shape, case["B"], case["T"])
    contender = MAKERS[case["contender"]](model, batch, case["P"])
    before = resident("VmRSS")
    CLEAR.write_text("5", encoding="ascii")
    for _ in range(STEPS):
        contender.step()
    return {"before": before, "peak": resident("VmHWM"), "state": contender.state_bytes}


def in_fresh_process(case: dict[str, Any]) -> dict[str, int]:
    """The same in a process of its own. glibc keeps to one arena, so that threads' caches do not blur the figure."""
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "bench.memory.peak", json.dumps(case)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the measuring process failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
