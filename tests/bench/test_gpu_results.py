"""The GPU's figures that are kept: the text is what its JSON says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.gpu.report import render

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "gpu" / "results"


@pytest.mark.parametrize("text", sorted(RESULTS.glob("*.txt")), ids=lambda path: path.stem)
def test_the_text_is_rendered_from_the_json(text: Path) -> None:
    files = sorted(RESULTS.glob(f"{text.stem}-*.json"))
    benchmarks = [benchmark for file in files for benchmark in json.loads(file.read_text())["benchmarks"]]
    assert benchmarks
    assert text.read_text() == render(benchmarks) + "\n"
