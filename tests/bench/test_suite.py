"""The whole suite end to end on toy shapes, and what it does with a kernel that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import pictures, runs, tables
from tests.bench.smoke import run


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict:
    done, raw = run(tmp_path_factory.mktemp("smoke"), "bench")
    assert done.returncode == 0, done.stdout + done.stderr
    return raw


def test_every_table_and_picture_has_its_benchmark(smoke: dict) -> None:
    measured = {benchmark["extra_info"]["table"] for benchmark in smoke["benchmarks"]}
    assert measured == {*tables.TABLES, *tables.PICTURES} - {"flex"}  # compiling is left out of a smoke run


def test_its_results_can_be_shown_and_drawn(smoke: dict, tmp_path: Path) -> None:
    smoke["machine_info"]["prefixcore"]["scale"] = "quick"
    (machine,) = runs.machines([runs.trimmed(smoke)])
    text = tables.of_machine(machine)
    for name in set(machine.tables) - set(tables.PICTURES):
        assert f"### {tables.TABLES[name][0]}" in text
    assert len(pictures.draw(machine, tmp_path)) == len(pictures.OF_CPU)


def test_pytest_benchmark_shows_the_time_of_one_call(smoke: dict) -> None:
    timed = [benchmark for benchmark in smoke["benchmarks"] if "seconds" in benchmark["extra_info"]]
    assert any(benchmark["stats"]["iterations"] > 1 for benchmark in timed)
    for benchmark in timed:
        stats, figures = benchmark["stats"], benchmark["extra_info"]
        assert stats["min"] == figures["seconds"]["candidate"]["min"]
        assert stats["iterations"] == figures["calls_a_round"]
        assert stats["rounds"] == figures["rounds"]


def test_runs_are_compared_and_what_they_differ_in_is_said(tmp_path: Path) -> None:
    options = ["bench/ops/test_soft_embedding.py", f"--benchmark-storage={tmp_path}", "-k", "bf16"]
    done, _ = run(tmp_path, *options, "--benchmark-save=first")
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*/0001_first.json")

    def compared() -> str:
        done, _ = run(tmp_path, *options, "--benchmark-compare=0001")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "(0001_first)" in done.stdout
        return done.stdout + done.stderr

    assert "machine_info" not in (same := compared())
    assert "compared with" not in same
    file.write_text(file.read_text(encoding="utf-8").replace('"threads": 1', '"threads": 7'), encoding="utf-8")
    assert "machine_info" not in (other := compared())
    assert "compared with a run of another threads: 7, now 1" in other


def test_what_is_left_out_is_in_the_tables_and_is_no_time(tmp_path: Path) -> None:
    (tmp_path / "no_weights.py").write_text(
        "from bench import models\n"
        "real = models.missing\n"
        "models.missing = lambda shape: 'no weights' if shape is models.SMOLLM2_REAL else real(shape)\n",
        encoding="utf-8",
    )
    done, raw = run(tmp_path, "-p", "no_weights", "bench/steps/test_packed_step.py", "-k", "demo or prompt")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ["demo" in benchmark["fullname"] for benchmark in raw["benchmarks"]] == [False]
    raw["machine_info"]["prefixcore"]["scale"] = "quick"
    (found,) = runs.machines([runs.trimmed(raw)])
    assert [row.skipped for row in found.tables["packed step"]] == [None, "no weights", "no weights"]
    assert tables.of_machine(found).count("skipped: no weights") == 2


def test_a_wrong_kernel_reports_nothing(tmp_path: Path) -> None:
    (tmp_path / "wrong_kernel.py").write_text(
        "import prefixcore, torch\n"
        "right = prefixcore.prefix_attention\n"
        "def wrong(query, *args, **options):\n"
        "    return right(query, *args, **options) * (1.0 if query.dtype == torch.float64 else 1.001)\n"
        "prefixcore.prefix_attention = wrong\n",
        encoding="utf-8",
    )
    done, raw = run(tmp_path, "-p", "wrong_kernel", "bench/ops/test_attention.py", "-k", "test_rows and fp32")
    assert done.returncode == 1
    assert "prefix_attention is wrong, so nothing is reported" in done.stdout
    assert raw.get("benchmarks", []) == []
