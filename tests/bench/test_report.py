"""The pages and their pictures say what bench/results/ says, and the report can tell when they do not."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest

from bench import pictures, report, runs, tables, targets

STAMP = {
    "scale": "quick",
    "cpu": "A CPU",
    "cores": 2,
    "memory_gib": 8,
    "threads": 2,
    "isa": "avx512",
    "torch_isa": "AVX512",
    "load": 0.5,
    "system": "Linux x86_64",
    "compiler": "g++ 1",
    "versions": {"python": "3.11", "torch": "2.13"},
    "commit": "0123456789ab",
}
SHAPE = {"B": 4, "H": 8, "Hkv": 8, "T": 256, "D": 64, "P": 20}


def timed(**over: float) -> dict:
    return {
        "seconds": {"candidate": {"min": 0.001}, **{name: {"min": 0.001 / x} for name, x in over.items()}},
        "ratios": {n: {"of_minima": x, "median": x, "low": x - 0.01, "high": x + 0.02} for n, x in over.items()},
    }


def raw(bare: float = 0.41, **stamp: object) -> dict:
    """As pytest-benchmark writes it, as far as we read it."""
    row = {"table": "attention", "case": {**SHAPE, "dtype": "fp32", "backward": True}, "flops": 1e9, "sgemm_flops": 2e9}
    points = [
        {"table": "attention sweep", "case": {**SHAPE, "axis": "T", "value": value}, **timed(bare=0.5, merged=0.4)}
        for value in (128, 256)
    ]
    row = {**row, **timed(bare=bare, concatenated=0.333333333, merged=0.3, sgemm=0.61)}
    return {
        "datetime": "2026-01-02T03:04:05.678",
        "machine_info": {"node": "a-host-name", "prefixcore": {**STAMP, **stamp}},
        "benchmarks": [{"fullname": f"bench/x.py::y[{i}]", "extra_info": b} for i, b in enumerate([row, *points])],
    }


def pages(readme: Path) -> dict[Path, report.Page]:
    return {readme: report.rendered}


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path]:
    """A README with marks, and a folder of one kept run, rendered."""
    readme, folder = tmp_path / "page" / "README.md", tmp_path / "results"
    readme.parent.mkdir()
    readme.write_text(f"above\n\n{report.BEGIN}\n{report.END}\n\nbelow\n", encoding="utf-8")
    folder.mkdir()
    runs.write(runs.trimmed(raw()), folder / "one.json")
    report.render(pages(readme), folder)
    return readme, folder


def test_what_is_committed_agrees() -> None:
    assert report.disagreements() == []


def test_rendering_keeps_what_stands_around_and_agrees_with_itself(place: tuple[Path, Path]) -> None:
    readme, folder = place
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "| 4,8,8,256,64,20 | fp32 | fwd+bwd | 1 | 0.41 (≤ 0.50) | 0.33 (≤ 0.40) | 0.30 | 0.82 |" in text
    assert "a-host-name" not in text
    assert sorted(p.name for p in folder.glob("*.png")) == [
        "avx512-2-threads-attention.png",
        "avx512-2-threads-growth.png",
    ]
    assert report.disagreements(pages(readme), folder) == []
    report.render(pages(readme), folder)
    assert readme.read_text(encoding="utf-8") == text


def test_a_changed_figure_shows_in_page_and_picture(place: tuple[Path, Path]) -> None:
    readme, folder = place
    runs.write(runs.trimmed(raw(bare=0.45)), folder / "one.json")
    assert report.disagreements(pages(readme), folder) == [
        "page/README.md does not say what results/ says",
        "avx512-2-threads-attention.png does not show what results/ says",
    ]


def test_a_page_changed_by_hand_shows(place: tuple[Path, Path]) -> None:
    readme, folder = place
    readme.write_text(readme.read_text(encoding="utf-8").replace("0.41", "0.14"), encoding="utf-8")
    assert report.disagreements(pages(readme), folder) == ["page/README.md does not say what results/ says"]


def test_a_picture_of_nothing_shows_and_goes(place: tuple[Path, Path]) -> None:
    readme, folder = place
    shutil.copy(folder / "avx512-2-threads-growth.png", folder / "old.png")
    assert report.disagreements(pages(readme), folder) == ["old.png belongs to no result"]
    report.render(pages(readme), folder)
    assert report.disagreements(pages(readme), folder) == []


def test_of_several_runs_the_worst_is_quoted() -> None:
    (machine,) = runs.machines(runs.trimmed(raw(bare=x)) for x in (0.41, 0.52, 0.43))
    (row,) = machine.tables["attention"]
    assert row.worst("bare") == 0.52
    assert row.spread("bare") == (0.40, 0.54)
    assert row.over("merged", "bare") == pytest.approx(0.52 / 0.3, rel=1e-3)
    text = tables.sections(machine)
    assert "**0.52** (missed ≤ 0.50)" in text
    assert "3 sittings" in text


def test_the_front_page_has_the_ratios() -> None:
    assert report.front([]) == report.NOTHING
    found = runs.machines([runs.trimmed(raw())])
    assert report.front(found).splitlines()[2:] == ["| `prefix_attention`, 4,8,8,256,64,20 | 0.41 | 0.33 |"]


def test_runs_of_two_settings_are_kept_apart() -> None:
    first, second = runs.machines(runs.trimmed(run) for run in (raw(), raw(isa="avx2", torch_isa="AVX2")))
    assert (first.slug, second.slug) == ("avx512-2-threads", "avx2-2-threads")
    assert "0.41 (≤ 0.75)" in tables.sections(second)


@pytest.mark.parametrize(
    ("run", "message"),
    [(raw(scale="smoke"), "smoke run"), (raw(cpu="Another CPU"), "different machines")],
)
def test_what_cannot_be_kept_is_refused(run: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runs.machines([runs.trimmed(raw()), runs.trimmed(run)])


def test_keep_and_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "raw.json"
    file.write_text(json.dumps(raw()), encoding="utf-8")
    monkeypatch.setattr(report, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(runs, "kept", lambda: [])
    assert report.main(["keep", str(file), "--as", "one"]) == 0
    assert report.main(["show", str(file), str(tmp_path / "results" / "one.json")]) == 0
    assert "2 sittings" in capsys.readouterr().out
    assert runs.read(tmp_path / "results" / "one.json") == runs.trimmed(raw())


def test_results_of_another_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"format": 0}', encoding="utf-8")
    with pytest.raises(ValueError, match="expected results of format 1"):
        runs.read(tmp_path / "x.json")


def test_targets_are_judged_as_printed() -> None:
    assert targets.Target(0.5).met(0.504)
    assert not targets.Target(0.5).met(0.506)
    assert targets.Target(0.85, at_least=True).met(0.846)
    assert tables.judged(0.8, targets.Target(0.85, at_least=True)) == "**0.80** (missed ≥ 0.85)"


def test_figures_that_nothing_draws_change_no_digest() -> None:
    (machine,) = runs.machines([runs.trimmed(raw())])
    other = copy.deepcopy(machine)
    other.stamps[0]["commit"] = "another"
    assert {n: pictures.digest(c) for n, c in pictures.shown(machine).items()} == {
        n: pictures.digest(c) for n, c in pictures.shown(other).items()
    }
