"""`python -m tests.peft [--plain] [pytest's options]`: runs them; `--plain` without `accelerate`, for comparison."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from .selection import FILES
from .source import PACKAGE, fetch_packages, fetch_tests

ROOT = Path(__file__).parents[2]


def main(arguments: list[str]) -> int:
    cache = ROOT / "build" / "peft"
    cache.mkdir(parents=True, exist_ok=True)
    folder, packages = fetch_tests(cache, version("peft")), fetch_packages(cache)
    mode = [] if "--plain" in arguments else ["--accelerate"]
    options = [each for each in arguments if each != "--plain"]
    paths = [str(ROOT), str(folder.parent), os.environ.get("PYTHONPATH", ""), str(packages)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "HF_HOME": str(cache / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    make = (
        "from pathlib import Path; import sys; from tests.peft.stand_ins import make_hub; make_hub(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", make, str(cache / "hub")], env=environment, check=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.peft.plugin",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(folder),
    ]
    command += ["-q", "-W", "ignore", *mode, *options, *(f"{PACKAGE}/{name}" for name in FILES)]
    return subprocess.run(command, cwd=folder.parent, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
