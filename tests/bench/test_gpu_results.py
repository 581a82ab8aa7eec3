"""The GPU's figures: what is kept of a run, the goals beside them, and what is rendered from them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bench import front, pictures
from bench.gpu import figures, kept, page
from bench.gpu.goals import GOALS
from bench.gpu.outcomes import packed
from bench.gpu.parts import PARTS
from bench.gpu.tables import PARTS as MEASURED_BY
from bench.gpu.tables import TABLES

CASE = {"B": 8, "H": 32, "Hkv": 8, "T": 2048, "D": 128, "P": 64}
PATH = {"forward": "merged: cuDNN does the sequence", "backward": "merged: cuDNN does the sequence"}
STAMP = {"commit": "0123456789ab", "device": "A GPU, CUDA 13", "real": True, "scale": "quick", "switched": ""}


def row(table: str, case: dict[str, Any], over: dict[str, float], **more: object) -> dict[str, Any]:
    """One whose candidate takes 2.6 ms."""
    spread = {name: {"of_minima": x, "median": x, "low": x, "high": x} for name, x in over.items()}
    seconds = {"candidate": {"min": 0.0026}, **{name: {"min": 0.0026 / x} for name, x in over.items()}}
    facts = {"seconds": seconds, "ratios": spread, "relative_error": 0.003, **more}
    return {"id": f"test_{table}{sorted(case.items())}", "table": table, "case": case, **facts}


ATTENTION = row("gpu attention", {**CASE, "backward": True}, {"bare": 1.21, "concatenated": 0.37}, path=PATH)
STEP = row(
    "gpu step",
    {"model": "Llama 1B's shape", "B": 2, "T": 2048, "P": 64, "checkpointing": False},
    {"bare model": 1.02, "PEFT prefix": 0.84},
    peak_bytes={"prefixcore prefix": 2**30},
    peak_over_bare_and_state=1.02,
)
SMALL = row(
    "gpu small step",
    {"model": "SmolLM2-135M's shape", "B": 8, "T": 64, "P": 20},
    {"bare model": 1.05, "PEFT prefix": 0.9, "LoRA": 0.8},
)


def content(*rows: dict[str, Any], **stamp: object) -> dict[str, Any]:
    stamped = {**STAMP, "versions": {"python": "3.12"}, **stamp}
    return {"format": figures.FORMAT, "stamp": stamped, "finished": True, "seconds": 9.0, "rows": list(rows),
            "left_out": [], "failed": []}  # fmt: skip


def out(folder: Path, rehearsal: bool = False, commit: str = "0123456789ab", **parts: dict[str, Any]) -> Path:
    """A folder as `make gpu` leaves it."""
    folder.mkdir()
    steps = [{"step": "tests", "state": "passed", "tests": 9, "failures": 0, "errors": 0, "skipped": 2}]
    report = {"rehearsal": rehearsal, "machine": {"commit": commit}, "steps": steps}
    (folder / "gpu.json").write_text(json.dumps(report))
    for name, part in parts.items():
        figures.write(part, folder / f"{name}.json")
    return folder


def test_every_figure_that_is_kept_has_its_reference_and_its_table() -> None:
    (session,) = kept.sessions()
    assert {"gpu attention", "gpu soft embedding", "gpu step"} <= set(session.tables)
    for part in session.parts.values():
        assert part["stamp"]["real"]
        assert part["stamp"]["commit"]
        for info in part["rows"]:
            assert info["table"] in TABLES
            assert info["ratios"], info["id"]
            assert set(info["seconds"]) == {"candidate", *info["ratios"]}, info["id"]
            assert info["relative_error"] <= 0.1, info["id"]
    for step in session.report["steps"]:
        assert {"step", "state", "commit"} <= set(step)


def test_goals_name_tables_and_parts_that_there_are() -> None:
    names = {part.name for part in PARTS if part.kind == "benchmark"}
    assert {goal.part for goal in GOALS} == names == set(MEASURED_BY.values())
    assert set(MEASURED_BY) == set(TABLES)
    for goal in GOALS:
        assert MEASURED_BY[goal.table] == goal.part
    assert len({(goal.what, goal.beside) for goal in GOALS}) == len(GOALS)


def test_what_is_kept_is_rendered_with_its_goals(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    kept.keep(out(tmp_path / "out", attention=content(ATTENTION), steps=content(STEP)), "h", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["h-attention.json", "h-steps.json", "h.json"]
    found = kept.sessions(folder)
    text = page.rendered(found)
    assert "A GPU, CUDA 13; python 3.12. Commit 0123456789ab: tests passed (9 tests, 0 failures," in text
    assert "| 8,32,8,2048,128,64 | fwd+bwd | 2.6 | **1.21** (missed ≤ 1.20) | - | 0.37 (≤ 0.40) | - |" in text
    assert "| no | 2.6 | 1.02 (≤ 1.03) | 0.84 | 1024 | **1.02** (missed ≤ 1.01) |" in text
    assert "Greedy generation: not yet measured, `make gpu PARTS=generation` does" in text
    goals = page.goals_table(found)
    assert "P = 64 | cuDNN without a prefix | ≤ 1.20 | **1.21**, missed; 0123456789ab |" in goals
    assert (
        "by FlashAttention-4 | cuDNN without a prefix | ≤ 1.08 | not yet measured: `make gpu PARTS=attention` |"
        in goals
    )
    assert "| step, Llama 1B's shape, P = 64 | bare model | ≤ 1.03 | 1.02, met; 0123456789ab |" in goals
    shown = front.gpu(found)
    assert "| attention | PEFT's way | 0.37 |\n|  | no prefix | 1.21 |" in shown
    assert "| training step, Llama 1B's shape | PEFT | 0.84 |\n|  | bare model | 1.02 |" in shown
    assert shown.endswith("A GPU: 7 of 9 tests passed, 2 skipped.")
    assert "(Llama 1B's shape) runs **1.2 times** as fast as PEFT's, in 1.02 of the time without" in front.claim(
        [], found
    )


def test_a_pack_is_kept_as_the_folder_that_is_in_it(tmp_path: Path) -> None:
    made = out(tmp_path / "made", attention=content(ATTENTION))
    packed(made, tmp_path / "pack")
    wanted = kept.keep(made, "h", tmp_path / "folder")
    for which in (tmp_path / "pack", tmp_path / "pack" / "gpu.tar.gz"):
        got = kept.keep(which, "h", tmp_path / "of the pack")
        assert [path.name for path in got] == [path.name for path in wanted]
        assert all(a.read_text() == b.read_text() for a, b in zip(got, wanted, strict=True))
    with pytest.raises(ValueError, match="gpu.json: expected the gpu.tar.gz that 'make gpu PACK=' leaves"):
        kept.keep(made / "gpu.json", "h", tmp_path / "folder")
    packed(out(tmp_path / "other", rehearsal=True), tmp_path / "pack")
    with pytest.raises(ValueError, match="pack holds a rehearsal"):
        kept.keep(tmp_path / "pack", "h", tmp_path / "folder")


def test_a_goal_is_met_by_the_quickest_path_that_it_is_for(tmp_path: Path) -> None:
    ways = {"bare": 1.3, "merged path": 1.05, "folded path": 1.25, "fa4 path": 1.3}  # ours over each of them
    info = row("gpu attention", {**CASE, "backward": True}, ways, path=PATH)
    session = kept.Session("h", {}, {"attention": content(info)})
    goals = page.goals_table([session])
    assert "P = 64 | cuDNN without a prefix | ≤ 1.20 | 1.04, met" in goals  # folded: 1.3 / 1.25
    assert "P = 64, by FlashAttention-4 | cuDNN without a prefix | ≤ 1.08 | 1.00, met" in goals
    chosen = {**info, "path": {"forward": "fa4: both side by side", "backward": "fa4: both side by side"}}
    text = page.rendered([kept.Session("h", {"steps": []}, {"attention": content(chosen)})])
    assert "**1.30** (missed ≤ 1.08) | merged 1.24, folded 1.04, fa4 1.00 |" in text


def test_figures_with_more_switched_on_stand_beside_the_others() -> None:
    switched = copy.deepcopy(SMALL)
    switched["case"]["with"] = "plans replayed"
    switched["ratios"]["PEFT prefix"]["of_minima"] = 0.8
    session = kept.Session("h", {}, {"small-steps": content(SMALL), "small-steps-replay": content(switched)})
    goals = page.goals_table([session])
    assert "8 x 64 | PEFT prefix | ≤ 0.85 | **0.90**, missed; 0.80, met (plans replayed); 0123456789ab |" in goals
    assert len(session.tables["gpu small step"]) == 2


def test_what_was_left_out_is_said_once_a_reason() -> None:
    part = content(ATTENTION)
    part["left_out"] = [{"id": f"test[{n}], by the fa4 path", "why": "not installed"} for n in range(3)]
    part["failed"] = [{"id": "test[9]", "why": "prefix_attention is wrong"}]
    text = page.rendered([kept.Session("h", {"steps": []}, {"attention": part})])
    assert "- attention, by the fa4 path (3 rows) left out: not installed\n" in text
    assert "- attention, test[9] failed: prefix_attention is wrong" in text


def test_pictures_show_growth_and_steps(tmp_path: Path) -> None:
    longer = row("gpu attention", {**CASE, "P": 512, "backward": True}, {"bare": 2.0, "concatenated": 0.5}, path=PATH)
    session = kept.Session("h", {}, {"attention": content(ATTENTION, longer), "small-steps": content(SMALL, STEP)})
    shown = pictures.shown(session)
    assert shown["h-growth.png"]["P"]["candidate"] == [[64, 2.6], [512, 2.6]]
    assert "T" not in shown["h-growth.png"]  # one length alone is no curve
    small, large = shown["h-steps.png"]
    assert small["over_bare"] == {"candidate": 1.05, "PEFT prefix": 1.1667, "LoRA": 1.3125}
    assert large["label"] == "Llama 1B's shape\n2 x 2,048, P = 64"
    assert [path.name for path in pictures.draw(session, tmp_path)] == ["h-growth.png", "h-steps.png"]


def test_parts_that_were_not_measured_anew_stay_with_their_commit(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    kept.keep(out(tmp_path / "one", attention=content(ATTENTION), steps=content(STEP)), "h", folder)
    newer = row("gpu attention", ATTENTION["case"], {"bare": 1.1, "concatenated": 0.3}, path=PATH)
    later = out(tmp_path / "two", commit="fedcba987654", attention=content(newer, commit="fedcba987654"))
    kept.keep(later, "h", folder)
    (session,) = kept.sessions(folder)
    goals = page.goals_table([session])
    assert "| 1.10, met; fedcba987654 |" in goals
    assert "| 1.02, met; 0123456789ab |" in goals
    assert [step["commit"] for step in session.report["steps"]] == ["fedcba987654"]


def test_what_means_nothing_is_not_kept(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    with pytest.raises(ValueError, match="holds a rehearsal"):
        kept.keep(out(tmp_path / "one", rehearsal=True, steps=content(STEP)), "h", folder)
    with pytest.raises(ValueError, match="expected a part's figures"):
        kept.keep(out(tmp_path / "two", steps=content()), "h", folder)
    assert not folder.exists()
    kept.keep(out(tmp_path / "three", steps=content(STEP)), "h", folder)
    with pytest.raises(ValueError, match="expected figures of one GPU by the name 'h', got A GPU, B GPU"):
        kept.keep(out(tmp_path / "four", attention=content(ATTENTION, device="B GPU, CUDA 13")), "h", folder)
    (tmp_path / "three" / "steps.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="expected a part's figures of format 1"):
        kept.keep(tmp_path / "three", "h", folder)


def test_what_was_measured_is_printed_with_the_device_and_the_goals(tmp_path: Path) -> None:
    folder = out(tmp_path / "out", attention=content(ATTENTION), steps=content(STEP))
    said = page.printed([folder / "attention.json", folder / "steps.json"])
    assert said.startswith("### Figures\n\nA GPU, CUDA 13; commit 0123456789ab\n\n#### `prefix_attention`\n\n| B,H")
    assert "#### Whole training steps" in said
    assert "P = 64 | cuDNN without a prefix | ≤ 1.20 | **1.21**, missed; here |" in said
