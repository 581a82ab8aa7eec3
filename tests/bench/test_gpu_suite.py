"""Every part of the GPU's suite without a GPU, on tiny shapes: by the CPU's kernels, and slowly by interpreted ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import machine
from bench.gpu import figures
from bench.gpu.figures import Figures
from bench.gpu.page import printed
from bench.gpu.paths import FORCED
from bench.gpu.tables import TABLES
from prefixcore.backends.triton import PATHS

ROOT = Path(__file__).parents[2]


def run(folder: Path, *options: str, **settings: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    """The rehearsal as `make gpu-rehearsal` starts it, with plugins of `folder`; and the part's file."""
    file = folder / "part.json"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--figures={file}", "--capture=no", *options]
    settings = {"PREFIXCORE_BENCH": "smoke", "PREFIXCORE_BENCH_DEVICE": "cpu", "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), **settings}  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)
    return done, figures.read(file) if file.exists() else {}


@pytest.fixture(scope="module", params=["cpu", pytest.param("interpreter", marks=pytest.mark.slow)])
def rehearsal(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[str, dict, Path]:
    folder = tmp_path_factory.mktemp("rehearsal")
    done, part = run(folder, "bench/gpu", PREFIXCORE_BENCH_DEVICE=request.param)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, part, folder / "part.json"


def test_every_table_has_rows_with_a_reference(rehearsal: tuple[str, dict, Path]) -> None:
    said, part, _ = rehearsal
    assert {row["table"] for row in part["rows"]} == set(TABLES)
    assert part["finished"]
    assert part["failed"] == []
    for row in part["rows"]:
        assert row["ratios"], row["id"]
        assert row["relative_error"] < 1e-3
    assert said.count("\nfigure: gpu ") == len(part["rows"])


def test_paths_are_measured_or_left_out_by_name(rehearsal: tuple[str, dict, Path]) -> None:
    _, part, _ = rehearsal
    for row in part["rows"]:
        if row["table"] == "gpu attention":
            left = {x["id"] for x in part["left_out"]}
            for path in FORCED:
                assert (f"{path} path" in row["ratios"]) != (f"{row['id']}, by the {path} path" in left)
    for path in set(FORCED) - set(PATHS):
        assert any(x["why"] == f"this tree has no path {path!r}" for x in part["left_out"])


def test_its_figures_can_be_shown(rehearsal: tuple[str, dict, Path]) -> None:
    text = printed([rehearsal[2]])
    for title, _ in TABLES.values():
        assert f"#### {title}" in text
    assert "rehearsal without a GPU: figures mean nothing" in text


def test_a_wrong_kernel_reports_nothing_and_the_rest_goes_on(tmp_path: Path) -> None:
    (tmp_path / "wrong_kernel.py").write_text(
        "import prefixcore\n"
        "right = prefixcore.prefix_attention\n"
        "def wrong(query, *args, **options):\n"
        "    return right(query, *args, **options) * (1.0 if str(query.dtype) == 'torch.float64' else 1.001)\n"
        "prefixcore.prefix_attention = wrong\n",
        encoding="utf-8",
    )
    done, part = run(tmp_path, "-p", "wrong_kernel", "bench/gpu/test_decode.py", "bench/gpu/test_soft_embedding.py")
    assert done.returncode == 1
    assert {row["table"] for row in part["rows"]} == {"gpu soft embedding"}
    (failed,) = part["failed"]
    assert failed["id"].startswith("test_decode[")
    assert "prefix_attention is wrong, so nothing is reported" in failed["why"]


def test_a_part_that_was_stopped_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"seconds": {"candidate": {"min": 1.0}}, "ratios": {"bare": {"of_minima": 1.0}}}

    def part(commit: str) -> Figures:
        monkeypatch.setattr(machine, "COMMIT", commit)
        return Figures(tmp_path / "part.json")

    part("0123456789ab").row("test[1]", "gpu decode", {"B": 1}, **facts)
    assert not part("fedcba987654").has("test[1]")
    assert part("0123456789ab").has("test[1]")
    assert not part("0123456789ab").has("test[2]")
    again = part("0123456789ab")
    again.row("test[2]", "gpu decode", {"B": 2}, **facts)
    again.finish()
    assert [row["id"] for row in figures.read(tmp_path / "part.json")["rows"]] == ["test[1]", "test[2]"]
    assert not part("0123456789ab").has("test[1]")  # it had finished: measured anew
    for unknown in ("unknown", "0123456789ab+changes"):
        part(unknown).row("test[1]", "gpu decode", {"B": 1}, **facts)
        assert not part(unknown).has("test[1]")
