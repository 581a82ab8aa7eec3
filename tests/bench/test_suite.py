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
