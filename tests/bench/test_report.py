"""The pages and their pictures say what bench/results/ says, and the report can tell when they do not."""

from __future__ import annotations

import copy
import json
import shutil
import xml.etree.ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import cells, cpus, front, front_picture, pages, pictures, report, runs, tables, targets

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


MODEL = {"model": "Llama 30M", "B": 1, "T": 1024, "P": 64}
STEP = {
    "table": "step",
    "case": {**MODEL, "ragged": False, "dtype": "bf16"},
    **timed(**{"bare model": 0.9, "PEFT prefix": 0.86}),
}
REAL = {"table": "step", "case": {**MODEL, "model": "SmolLM2-135M", "ragged": False, "dtype": "fp32"}}
PACKED = {
    "table": "packed step",
    "case": {**MODEL, "B": 4, "data": "lengths of 16 to 1024", "tokens": 2000, "labels": 400},
    **timed(**{"PEFT prefix": 0.44, "padded": 0.5}),
}
PARTS = {"attention": 20.0, "matrix products": 60.5}
PROFILE = {
    "table": "profile",
    "case": {**MODEL, "ragged": False, "dtype": "fp32"},
    "milliseconds": {"bare model": PARTS, "prefixcore prefix": {**PARTS, "attention": 10.0}},
}


def raw(bare: float = 0.41, also: Sequence[dict] = (), **stamp: object) -> dict:
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
        "benchmarks": [
            {"fullname": f"bench/x.py::y[{i}]", "extra_info": b} for i, b in enumerate([row, *points, *also])
        ],
    }


def content(readme: Path) -> dict[Path, report.Page]:
    return {readme: {"CPUs": report.results}}


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path]:
    """A README with marks, and a folder of one kept run, rendered."""
    readme, folder = tmp_path / "page" / "README.md", tmp_path / "results"
    readme.parent.mkdir()
    readme.write_text(f"above\n\n{pages.begin('CPUs')}\n{pages.END}\n\nbelow\n", encoding="utf-8")
    folder.mkdir()
    runs.write([runs.trimmed(raw())], folder / "one.json")
    report.render(content(readme), folder)
    return readme, folder


def test_what_is_committed_agrees() -> None:
    assert report.disagreements() == []


def test_rendering_keeps_what_stands_around_and_agrees_with_itself(place: tuple[Path, Path]) -> None:
    readme, folder = place
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "| 4,8,8,256,64,20 | fp32 | fwd+bwd | 1 | 0.41 | 0.33 | 0.30 | 0.82 (≥ 0.75) |" in text
    assert "a-host-name" not in text
    assert sorted(p.name for p in folder.glob("*.png")) == [
        "a-cpu-avx512-2-threads-attention.png",
        "a-cpu-avx512-2-threads-growth.png",
    ]
    assert report.disagreements(content(readme), folder) == []
    report.render(content(readme), folder)
    assert readme.read_text(encoding="utf-8") == text


def test_a_changed_figure_shows_in_page_and_picture(place: tuple[Path, Path]) -> None:
    readme, folder = place
    runs.write([runs.trimmed(raw(bare=0.45))], folder / "one.json")
    assert report.disagreements(content(readme), folder) == [
        "page/README.md does not say what results/ says",
        "a-cpu-avx512-2-threads-attention.png does not show what results/ says",
    ]


def test_a_page_changed_by_hand_shows(place: tuple[Path, Path]) -> None:
    readme, folder = place
    readme.write_text(readme.read_text(encoding="utf-8").replace("0.41", "0.14"), encoding="utf-8")
    assert report.disagreements(content(readme), folder) == ["page/README.md does not say what results/ says"]


def test_a_picture_of_nothing_shows_and_goes(place: tuple[Path, Path]) -> None:
    readme, folder = place
    shutil.copy(folder / "a-cpu-avx512-2-threads-growth.png", folder / "old.png")
    assert report.disagreements(content(readme), folder) == ["old.png belongs to no result"]
    report.render(content(readme), folder)
    assert report.disagreements(content(readme), folder) == []


def test_of_several_runs_the_worst_is_quoted() -> None:
    (machine,) = runs.machines(runs.trimmed(raw(bare=x)) for x in (0.41, 0.52, 0.43))
    (row,) = machine.tables["attention"]
    assert row.worst("bare") == 0.52
    assert row.spread("bare") == (0.40, 0.54)
    assert row.over("merged", "bare") == pytest.approx(0.52 / 0.3, rel=1e-3)
    text = tables.of_machine(machine)
    assert "| fwd+bwd | 1 | 0.52 | 0.33 |" in text
    assert "Worst of 3 runs: quick 2026-01-02 03:04 (load average before: 0.5), quick" in text


def test_a_curve_shows_the_median_of_the_runs() -> None:
    several = [runs.trimmed(raw()) for _ in range(3)]
    for run, seconds in zip(several, (0.004, 0.001, 0.002), strict=True):
        run["benchmarks"][1]["seconds"]["candidate"]["min"] = seconds
    (machine,) = runs.machines(several)
    assert pictures.growth(machine)["T"]["candidate"] == [[128, 2.0], [256, 1.0]]


def test_where_runs_differ_in_what_they_hold_the_page_says_so() -> None:
    (machine,) = runs.machines([runs.trimmed(raw()), runs.trimmed(raw(also=[STEP]))])
    assert "Worst of 1 to 2 runs: " in tables.of_machine(machine)


def test_a_full_run_and_a_quick_one_of_the_same_row_are_put_together() -> None:
    more = {**STEP, **timed(**{"bare model": 0.8, "PEFT prefix": 0.7, "LoRA": 0.75})}
    for order in ([STEP, more], [more, STEP]):
        (machine,) = runs.machines(runs.trimmed(raw(also=[row])) for row in order)
        line = next(line for line in tables.of_machine(machine).splitlines() if "| Llama 30M | 1,1024,64" in line)
        assert "| 0.90 (≤ 1.00) |" in line
        assert "| 0.75 | - | - | - |" in line


def test_steps_and_packed_steps_stand_beside_their_goals() -> None:
    prompt = {**PACKED, "case": {**PACKED["case"], "kind": "prompt"}, **timed(**{"PEFT prompt": 0.53, "padded": 0.6})}
    (machine,) = runs.machines([runs.trimmed(raw(also=[STEP, PACKED, prompt]))])
    text = tables.of_machine(machine)
    assert "| Llama 30M | 1,1024,64 | bf16 | 1 | 0.90 (≤ 1.00) | 0.89..0.92 | **0.86** (missed ≤ 0.85) |" in text
    ragged = "| Llama 30M | lengths of 16 to 1024 |"
    assert f"{ragged} prefix | 4,1024,64 | 2000 of 4096 | 400 | 1 | 0.44 (≤ 0.50) |" in text
    assert f"{ragged} prompt | 4,1024,64 | 2000 of 4096 | 400 | 1 | **0.53** (missed ≤ 0.50) |" in text
    shown = front.benchmarks([machine])
    assert "| the same in bfloat16 | PEFT | 0.86 |\n|  | bare model | 0.90 |" in shown
    assert "| training step, texts of 16 to 1,024 tokens, packed | PEFT, padded | 0.44 |" in shown


def test_what_was_skipped_is_in_the_table_with_its_reason() -> None:
    left_out = {**REAL, "skipped": "no weights here"}
    measured = {**REAL, **timed(**{"bare model": 0.95, "PEFT prefix": 0.8})}
    (machine,) = runs.machines([runs.trimmed(raw(also=[left_out]))])
    assert "| SmolLM2-135M | 1,1024,64 | fp32 | skipped: no weights here | - |" in tables.of_machine(machine)
    assert "training step, 1,024 tokens" not in front.benchmarks([machine])
    for order in ([left_out, measured], [measured, left_out]):
        (machine,) = runs.machines(runs.trimmed(raw(also=[row])) for row in order)
        assert "| SmolLM2-135M | 1,1024,64 | fp32 | 1 | 0.95 (≤ 1.00) |" in tables.of_machine(machine)


def test_a_profile_is_tabled_and_drawn(tmp_path: Path) -> None:
    (machine,) = runs.machines([runs.trimmed(raw(also=[PROFILE]))])
    text = tables.of_machine(machine)
    assert "| model | B,T,P | dtype | training | attention, ms | matrix products, ms | all, ms |" in text
    assert "| Llama 30M | 1,1024,64 | fp32 | prefixcore prefix | 10 | 60.5 | 70.5 |" in text
    assert "a-cpu-avx512-2-threads-profile.png" in [path.name for path in pictures.draw(machine, tmp_path)]


def test_a_picture_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine,) = runs.machines([runs.trimmed(raw(also=[PROFILE]))])
    paths = pictures.draw(machine, tmp_path)
    before = [path.read_bytes() for path in paths]

    def save(self: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
    monkeypatch.setattr(pictures, "digest_in", lambda path: "of another content")
    with pytest.raises(KeyboardInterrupt):
        pictures.draw(machine, tmp_path)
    assert [path.read_bytes() for path in paths] == before


def test_the_front_page_has_the_ratios() -> None:
    found = runs.machines([runs.trimmed(raw(also=[STEP]))])
    assert front.benchmarks(found).splitlines()[2:] == [
        "| attention, 128 to 2,048 tokens | PEFT's way | 0.33 |",
        "|  | no prefix | 0.41 |",
        "| the same in bfloat16 | PEFT | 0.86 |",
        "|  | bare model | 0.90 |",
    ]


def test_the_claim_has_the_least_and_the_greatest_of_all_machines() -> None:
    step = {**REAL, **timed(**{"bare model": 0.9, "PEFT prefix": 0.8})}
    slower = {**REAL, **timed(**{"bare model": 0.95, "PEFT prefix": 0.5})}
    one, other = raw(also=[step]), raw(also=[slower], cpu="B CPU")
    said = front.claim(runs.machines([runs.trimmed(one), runs.trimmed(other)]), [])
    assert "attention with a prefix runs **3.0 times** as fast as PEFT's way" in said
    assert "runs **1.2 to 2.0 times** as fast as PEFT's (- in bfloat16), in 0.90 to 0.95 of the time" in said
    assert "NVIDIA" not in said


def test_the_picture_shows_the_ratios_of_the_tables_and_says_them() -> None:
    step = {**REAL, **timed(**{"bare model": 0.9, "PEFT prefix": 0.75})}
    found = runs.machines([runs.trimmed(raw(also=[step]))])
    (panel,) = front_picture.panels(found, [])
    assert panel.times == {"prefixcore": 0.9, "bare": 1.0, "PEFT": pytest.approx(1.2)}
    for theme in front_picture.THEMES:
        drawn = front_picture.svg([panel], theme)
        assert xml.etree.ElementTree.fromstring(drawn).tag.endswith("svg")
        assert ">0.90<" in drawn
        assert ">1.20<" in drawn
    assert "prefixcore 0.90, bare 1.00, PEFT 1.20" in front_picture.element(found, [])
    assert front_picture.pictures([], []) == {}


def test_a_changed_picture_of_the_front_page_shows(tmp_path: Path) -> None:
    step = {**REAL, **timed(**{"bare model": 0.9, "PEFT prefix": 0.75})}
    runs.write([runs.trimmed(raw(also=[step]))], tmp_path / "one.json")
    report.render({}, tmp_path)
    assert report.disagreements({}, tmp_path) == []
    drawn = tmp_path / "front-dark.svg"
    drawn.write_text(drawn.read_text(encoding="utf-8").replace(">0.90<", ">0.80<"), encoding="utf-8")
    assert report.disagreements({}, tmp_path) == [f"front-dark.svg does not show what {tmp_path.name}/ says"]


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the marks '<!-- rendered from the results: CPUs -->'"):
        pages.with_parts("no marks", {"CPUs": "x"}, "README.md")


def test_runs_of_two_settings_are_kept_apart() -> None:
    held = raw(isa="avx2", torch_isa="AVX2")
    first, second = runs.machines(runs.trimmed(run) for run in (held, raw(also=[STEP])))
    # The one with most tables leads.
    assert (first.slug, second.slug) == ("a-cpu-avx512-2-threads", "a-cpu-avx2-2-threads")
    text = tables.of_machine(second)
    assert text.startswith("### A CPU, avx2, 2 threads\n")
    assert "| 0.41 (≤ 0.75) | 0.33 | 0.30 | 0.82 |" in text


def test_of_machines_with_as_many_tables_the_one_measured_last_leads() -> None:
    old, new = runs.trimmed(raw(cpu="Old CPU")), runs.trimmed(raw(cpu="New CPU"))
    old["stamp"]["time"], new["stamp"]["time"] = "2026-01-02T03:04", "2026-01-03T00:00"
    for order in ((old, new), (new, old)):
        assert [machine.name for machine in runs.machines(order)] == ["New CPU", "Old CPU"]


def test_a_full_run_leads_a_later_quick_one() -> None:
    full, quick = runs.trimmed(raw(cpu="Full CPU", scale="full")), runs.trimmed(raw(cpu="Quick CPU", scale="quick"))
    full["stamp"]["time"], quick["stamp"]["time"] = "2026-01-02T03:04", "2026-01-03T00:00"
    for order in ((full, quick), (quick, full)):
        assert [machine.name for machine in runs.machines(order)] == ["Full CPU", "Quick CPU"]


def test_cpus_have_the_names_that_people_know() -> None:
    assert cpus.product("AMD EPYC 7763 64-Core Processor, family 25, model 1") == "AMD EPYC, Zen 3"
    assert cpus.product("AMD EPYC, family 25, model 17") == "AMD EPYC, Zen 4"
    assert cpus.product("AMD EPYC, family 25, model 18") == "AMD EPYC model 18"
    assert cpus.product("Intel(R) Xeon(R) Processor, family 6, model 167") == "Intel Xeon, Sapphire Rapids or newer"
    assert cpus.product("Intel(R) Xeon(R) E-2388G CPU @ 3.20GHz, family 6, model 167") == "Intel Xeon model 167"


def test_models_of_a_maker_have_names_of_their_own() -> None:
    found = [runs.trimmed(raw(cpu=f"A CPU, family 25, model {n}")) for n in (1, 17)]
    assert {machine.slug for machine in runs.machines(found)} == {
        "a-cpu-model-1-avx512-2-threads",
        "a-cpu-model-17-avx512-2-threads",
    }


@pytest.mark.parametrize(
    ("run", "message"),
    [(raw(scale="smoke"), "smoke run"), (raw(cpu="A CPU, stepping 2"), "different machines")],
)
def test_what_cannot_be_kept_is_refused(run: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runs.machines([runs.trimmed(raw()), runs.trimmed(run)])


def test_keep_and_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "raw.json"
    file.write_text(json.dumps(raw()), encoding="utf-8")
    folder = tmp_path / "results"
    monkeypatch.setattr(report.keep_together, "__defaults__", (folder,))
    assert report.main(["keep", str(file), "--as", "one"]) == 0
    assert report.main(["show", str(file), str(folder / "one.json")]) == 0
    assert "Worst of 2 runs" in capsys.readouterr().out
    assert runs.kept(folder) == [runs.trimmed(raw())]


def test_what_is_wrong_with_the_files_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["keep-gpu", str(tmp_path), "--as", "x"]) == 1
    (tmp_path / "x.json").write_text('{"format": 0}', encoding="utf-8")
    assert report.main(["show", str(tmp_path / "x.json")]) == 1
    missing, old = capsys.readouterr().err.splitlines()
    assert "No such file" in missing
    assert "expected results of format 2" in old


def test_three_runs_are_kept_in_one_file_that_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    three = [runs.trimmed(raw(bare=x)) for x in (0.41, 0.52, 0.43)]
    runs.write([runs.trimmed(raw(cpu="A CPU, model 2"))], tmp_path / "mine.json")
    report.keep_together(three, "mine", tmp_path)
    assert runs.kept(tmp_path) == three
    text = (tmp_path / "mine.json").read_text(encoding="utf-8")
    assert len([line for line in text.splitlines() if line.startswith("  {")]) == 9  # a benchmark a line


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (raw(commit="fedcba987654"), "run 2 differs from run 1 in its commit: 'fedcba987654', not '0123456789ab'"),
        (raw(scale="full"), "in its scale"),
        (raw(threads=1), "in its threads"),
        (raw(also=[STEP]), r"do not hold the same benchmarks; bench/x.py::y\[3\] is in one of them only"),
        (raw(), "one of them is there twice"),
    ],
)
def test_what_does_not_belong_together_is_not_kept(tmp_path: Path, other: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report.keep_together([runs.trimmed(raw()), runs.trimmed(other)], "x", tmp_path)
    assert list(tmp_path.iterdir()) == []


OTHER = {**raw(), "machine_info": {"node": "a-host-name"}}
NAMELESS = {**raw(), "benchmarks": [{"fullname": "x.py::y", "extra_info": {}}]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 0}', "expected results of format 2"),
        ("[1]", "expected results of format 2"),
        ("", "an empty file: nothing was measured, or the run was broken off"),
        (json.dumps(raw())[:99], "what is no JSON"),
        (json.dumps(OTHER), "got one of other benchmarks"),
        (json.dumps(NAMELESS), "got one of other benchmarks"),
    ],
)
def test_what_are_no_results_of_ours_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"x\.json: .*{message}"):
        runs.read(tmp_path / "x.json")


def test_targets_are_judged_as_printed() -> None:
    assert targets.Target(0.5).met(0.504)
    assert not targets.Target(0.5).met(0.506)
    assert targets.Target(0.85, at_least=True).met(0.846)
    assert cells.judged(0.8, targets.Target(0.85, at_least=True)) == "**0.80** (missed ≥ 0.85)"


@pytest.mark.parametrize(
    ("isa", "length", "bare", "rate"),
    [
        ("avx2", 256, "≤ 0.75", "None"),
        ("avx2", 128, "None", "None"),
        ("avx512_bf16", 128, "None", "≥ 0.65"),
        ("amx", 256, "None", "≥ 0.75"),
        ("avx512", 2048, "None", "≥ 0.85"),
    ],
)
def test_the_goal_of_attention_depends_on_the_instruction_set(isa: str, length: int, bare: str, rate: str) -> None:
    (found,) = {shape[3]: shape for shape in targets.ATTENTION[:5] if shape[3] == length}.values()
    case = dict(zip(("B", "H", "Hkv", "T", "D", "P"), found, strict=True))
    assert str(targets.over_bare({**case, "dtype": "fp32"}, isa)) == bare
    assert str(targets.attention_rate({**case, "dtype": "fp32"}, isa)) == rate
    assert targets.over_bare({**case, "dtype": "bf16"}, isa) is None


def test_a_packed_prefix_on_short_texts_has_a_goal_of_its_own() -> None:
    assert targets.packed_over_peft({"data": "the demo"}).bound == 0.75
    assert targets.packed_over_peft({"data": "the demo", "kind": "prompt"}).bound == 0.5
    assert targets.packed_over_peft({"data": "lengths of 16 to 1024", "kind": "prefix"}).bound == 0.5


def test_figures_that_nothing_draws_change_no_digest() -> None:
    (machine,) = runs.machines([runs.trimmed(raw())])
    other = copy.deepcopy(machine)
    other.stamps[0]["commit"] = "another"
    assert {n: pictures.digest(c) for n, c in pictures.shown(machine).items()} == {
        n: pictures.digest(c) for n, c in pictures.shown(other).items()
    }
