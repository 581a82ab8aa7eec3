"""The GPU's figures: what is kept of a run, and the tables that are rendered from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import front
from bench.gpu import kept, report

CASE = {"B": 8, "H": 32, "Hkv": 8, "T": 2048, "D": 128, "P": 64}
PATH = {"forward": "merged: cuDNN does the sequence"}


def info(table: str, case: dict, ratios: dict[str, float], goals: dict[str, float], **more: object) -> dict:
    return {
        "table": table,
        "case": case,
        "seconds": {"candidate": {"min": 0.0026}},
        "ratios": {name: {"of_minima": ratio} for name, ratio in ratios.items()},
        "goals": goals,
        "device": "A GPU, CUDA 13",
        "real": True,
        "relative_error": 0.003,
        **more,
    }


ATTENTION = info(
    "gpu attention", {**CASE, "backward": True}, {"bare": 1.21, "concatenated": 0.37}, {"bare": 1.08}, path=PATH
)
STEP = info(
    "gpu step",
    {"model": "Llama 1B's shape", "B": 2, "T": 2048, "P": 64, "checkpointing": False},
    {"bare model": 1.02, "PEFT prefix": 0.84},
    {"bare model": 1.03, "peak": 1.01},
    peak_bytes={"prefixcore prefix": 2**30},
    peak_over_bare_and_state=1.02,
)


def out(folder: Path, *infos: dict, rehearsal: bool = False) -> Path:
    """A folder as `make gpu` leaves it."""
    folder.mkdir()
    steps = [{"step": "tests", "state": "passed", "tests": 9, "failures": 0, "errors": 0, "skipped": 2}]
    (folder / "gpu.json").write_text(json.dumps({"rehearsal": rehearsal, "steps": steps}))
    for found in infos:
        content = {
            "machine_info": {"node": "a-host-name", "prefixcore": {"commit": "0123456789ab"}},
            "benchmarks": [{"name": "test_x", "extra_info": found, "stats": {}}],
        }
        (folder / f"bench-{found['table'].removeprefix('gpu ')}.json").write_text(json.dumps(content))
    return folder


def test_there_are_figures() -> None:
    (session,) = kept.sessions()
    assert {"gpu attention", "gpu soft embedding", "gpu step"} <= set(session.rows)


def test_what_is_kept_is_rendered_with_its_goals(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    kept.keep(out(tmp_path / "out", ATTENTION, STEP), "h", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["h-attention.json", "h-step.json", "h.json"]
    assert "a-host-name" not in "".join(path.read_text() for path in folder.iterdir())
    found = kept.sessions(folder)
    text = report.rendered(found)
    assert (
        "A GPU, CUDA 13. Commit 0123456789ab. Steps: tests passed (9 tests, 0 failures, 0 errors, 2 skipped)." in text
    )
    assert "| 8,32,8,2048,128,64 | fwd+bwd | 2.6 | **1.21** (missed ≤ 1.08) | 0.37 | - |" in text
    assert "| no | 2.6 | 1.02 (≤ 1.03) | 0.84 | 1024 | **1.02** (missed ≤ 1.01) |" in text
    shown = front.gpu(found)
    assert "| attention | PEFT's way | 0.37 |\n|  | no prefix | 1.21 |" in shown
    assert "| training step, Llama 1B's shape | PEFT | 0.84 |\n|  | bare model | 1.02 |" in shown
    assert shown.endswith("A GPU: 7 of 9 tests passed, 2 skipped.")
    assert "(Llama 1B's shape) runs **1.2 times** as fast as PEFT's, in 1.02 of the time without" in front.claim(
        [], found
    )


def test_what_was_measured_is_printed_with_the_device(tmp_path: Path) -> None:
    folder = out(tmp_path / "out", ATTENTION, STEP)
    said = report.printed(sorted(folder.glob("bench-*.json")))
    assert said.startswith("A GPU, CUDA 13\n\n#### `prefix_attention`\n\n| B,H,Hkv,T,D,P |")
    assert "#### Whole training steps" in said


def test_keeping_takes_the_place_of_what_was_kept_by_that_name(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    kept.keep(out(tmp_path / "one", ATTENTION, STEP), "h", folder)
    kept.keep(out(tmp_path / "two", STEP), "h", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["h-step.json", "h.json"]


def test_what_means_nothing_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a rehearsal"):
        kept.keep(out(tmp_path / "one", STEP, rehearsal=True), "h", tmp_path / "results")
    with pytest.raises(ValueError, match="expected figures"):
        kept.keep(out(tmp_path / "two"), "h", tmp_path / "results")
    assert not (tmp_path / "results").exists()
