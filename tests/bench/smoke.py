"""The suite itself, run on toy shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(folder: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    """pytest on benchmarks, with plugins of `folder`; and the results, which it leaves there."""
    file = folder / "raw.json"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--benchmark-json={file}", *options]
    path = os.pathsep.join([str(folder), str(ROOT)])
    # Where pytest-xdist spreads these tests over processes, pytest-benchmark would think that it does so with those.
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"PREFIXCORE_BENCH": "smoke", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done, json.loads(file.read_text(encoding="utf-8") or "{}") if file.exists() else {}
