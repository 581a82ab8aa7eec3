"""`make gpu`: its parts, what becomes of them, what a second run goes on with; and where there is no GPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.gpu import environment, parts, processes
from bench.gpu.parts import Part, Run
from bench.gpu.session import Session
from prefixcore.backends.triton import PATHS
from tests.device import shard

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {"cores": 2, "nvcc": False, "commit": "0123456789ab"}


def part(name: str = "one", seconds: int = 10, limit: int = 60, **settings: str) -> Part:
    return Part(name, "what it shows", seconds, limit, "benchmark", (Run("", ("bench/gpu/test_x.py",), settings),))


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What a part runs, by its name, in the place of pytest."""
    found: dict[str, list[str]] = {}
    monkeypatch.setattr("bench.gpu.session.command", lambda run, kind, folder, stem: found.get(stem, ["true"]))
    return found


def test_a_switch_that_the_tree_does_not_know_is_left_out_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "reads", lambda variable: variable == "PREFIXCORE_REPLAY")
    assert parts.lacking(part(), Run("", ("x.py",), parts.OFF)) is None
    assert parts.lacking(part(), Run("", ("x.py",), parts.REPLAY)) is None
    said = "this tree knows no 'fewer launches' (nothing reads PREFIXCORE_FEWER_LAUNCHES)"
    assert parts.lacking(part(), Run("", ("x.py",), parts.BOTH)) == said
    assert parts.switched(parts.BOTH) == "plans replayed, fewer launches, streamed embedding"


def states(session: Session) -> dict[str, str]:
    return {step["step"]: step["state"] for step in session.steps}


def test_without_a_gpu_it_says_so_and_fails(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / ".ci" / "gpu.py", "--out", tmp_path / "out"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # the GPU of the machine, if there is one
    result = subprocess.run(command, capture_output=True, text=True, env=hidden)
    assert result.returncode == 1
    assert "finds no NVIDIA GPU here, so nothing was run" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--wheels", "none"], "WHEELS=none is not a folder"),
        (["--parts", "launching", "decoding"], "unknown part decoding; there are: tests launching"),
    ],
)
def test_what_is_asked_for_and_is_not_there_is_named(options: list[str], said: str) -> None:
    result = subprocess.run([sys.executable, ROOT / ".ci" / "gpu.py", *options], capture_output=True, text=True)
    assert result.returncode == 1
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_its_parts_are_files_that_are_there() -> None:
    for each in parts.PARTS:
        for run in each.runs:
            for file in run.what:
                assert not file.endswith(".py") or (ROOT / file).exists(), f"{each.name} runs {file}"
        assert each.seconds < each.limit
    assert set(PATHS) <= set(parts.PATHS), "each path of the backend is forced"
    measured = {run.what[0] for each in parts.PARTS if each.kind == "benchmark" for run in each.runs}
    assert measured == {str(file.relative_to(ROOT)) for file in (ROOT / "bench" / "gpu").glob("test_*.py")}


def test_what_only_models_need_leaves_out_their_parts_alone(
    tmp_path: Path, commands: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "missing", lambda packages: ["peft>=0.21"])
    session = Session(tmp_path, False, MACHINE)
    session.part(part("ops"))
    session.part(replace(part("steps"), models=True))
    assert states(session) == {"ops": "passed", "steps": "left out"}
    assert session.steps[1]["why"] == "peft>=0.21 is not here"
    assert {each.name for each in parts.PARTS if each.models} == {"small-steps", "compiled", "generation", "steps"}


def test_it_goes_on_where_pip_cannot_fetch_what_only_models_need(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine without a network may have an older PEFT: its tests and all else are not lost for that."""
    lacking = {"peft": environment.OF_MODELS}
    asked: list[list[str]] = []

    def without_network(command: list[str], **options: object) -> SimpleNamespace:
        asked.append([str(word) for word in command])
        return SimpleNamespace(returncode=int("pip" in command))

    monkeypatch.delenv("PREFIXCORE_GPU_ENVIRONMENT", raising=False)
    monkeypatch.setattr(environment, "missing", lambda of: [name for name, where in lacking.items() if of is where])
    monkeypatch.setattr(environment, "environment", lambda: Path(sys.executable))
    monkeypatch.setattr(environment.subprocess, "run", without_network)
    with pytest.raises(SystemExit) as ended:
        environment.with_everything(None)
    assert ended.value.code == 0
    assert "without peft, so without the parts that need it" in capsys.readouterr().out
    assert [command[-1] for command in asked] == ["peft", sys.argv[-1]]  # pip, and then itself again
    lacking["ninja"] = environment.NEEDED
    with pytest.raises(SystemExit, match="ninja could not be installed"):
        environment.with_everything(None)
    monkeypatch.setenv("PREFIXCORE_GPU_ENVIRONMENT", "1")
    del lacking["ninja"]
    environment.with_everything(None)


def test_the_rules_are_tested_whatever_is_switched_on() -> None:
    """Its tests are among those of the device, which run once more with all switches on."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n0",
        "-p",
        "no:cacheprovider",
        "tests/backends/triton/test_choose.py",
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **parts.BOTH})
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
def test_what_is_watched_is_watched_where_plans_are_replayed() -> None:
    """Some of the problems come twice, and the second time there is a plan for them."""
    plugin = ["-p", "tests.backends.triton.always_replayed", "-p", "no:cacheprovider"]
    watching = ("test_grad_once.py::test_forward_in_one_launch_backward_in_two_and_the_same_bits",
                "test_merged.py::test_options", "test_folded.py::test_options")  # fmt: skip
    tests = [f"tests/backends/triton/{name}" for name in watching]
    settings = {**os.environ, "PREFIXCORE_TEST_DEVICE": "interpreter"}
    command = [sys.executable, "-m", "pytest", "-q", "-n0", *plugin, *tests]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=settings)
    assert result.returncode == 0, result.stdout


def test_each_state_of_a_part_and_the_exit_status(
    tmp_path: Path, commands: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session(tmp_path, False, MACHINE)
    commands["failing"] = ["false"]
    commands["long"] = ["sh", "-c", "echo 'figure: the first row'; sleep 60"]
    session.part(part("passing"))
    assert session.write(finished=True) == 0
    session.part(Part("lacking", "", 1, 60, "tests", (Run("", ("x.py",), path="no such"),)))
    assert session.write(finished=True) == 0  # what the tree does not have fails nothing
    session.part(part("long", limit=1))
    session.limit = 30
    session.part(part("later", seconds=60))
    assert session.write(finished=True) == 2
    session.part(part("failing"))
    session.part(part("after"))
    assert session.write(finished=True) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [step["state"] for step in found["steps"]] == [
        "passed", "left out", "cut", "not run", "failed", "passed",
    ]  # fmt: skip
    assert found["steps"][4]["logs"] == ["logs/failing.log"]
    assert "this tree has no" in found["steps"][1]["why"]
    assert found["steps"][3]["why"].startswith("it takes about 60 s, and ")
    said = capsys.readouterr().out
    assert "long: what it shows; about 10 s, at most 1 s\n  the first row\n" in said  # while it runs


def test_a_second_run_goes_on_where_the_first_was_stopped(tmp_path: Path, commands: dict[str, list[str]]) -> None:
    first = Session(tmp_path, False, MACHINE)
    commands["two"] = ["false"]
    first.part(part("one"))
    first.part(part("two"))
    again = Session(tmp_path, False, MACHINE)
    commands.update(one=["false"], two=["true"])
    again.part(part("one"))
    again.part(part("two"))
    assert states(again) == {"one": "passed", "two": "passed"}
    third = Session(tmp_path, False, MACHINE)
    third.part(part("three"))
    kept = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert [step["step"] for step in kept] == ["one", "two", "three"]  # it was not asked for the first two
    for other in ({**MACHINE, "commit": "fedcba987654"}, {**MACHINE, "cores": 3}):
        assert Session(tmp_path, False, other).before == {}
    for unknown in ("unknown", "0123456789ab+changes"):
        Session(tmp_path, False, {**MACHINE, "commit": unknown}).write()
        assert Session(tmp_path, False, {**MACHINE, "commit": unknown}).before == {}


def test_what_failed_before_it_was_stopped_has_failed(tmp_path: Path, commands: dict[str, list[str]]) -> None:
    session = Session(tmp_path, False, MACHINE)
    figures = tmp_path / "long.json"
    commands["long"] = ["sh", "-c", f"""echo '{{"failed": [{{"id": "x", "why": "wrong"}}]}}' > {figures}; sleep 60"""]
    session.part(part("long", limit=1))
    assert states(session) == {"long": "failed"}
    assert session.write(finished=True) == 1


def test_tests_that_are_all_skipped_show_nothing(tmp_path: Path) -> None:
    session = Session(tmp_path, False, MACHINE)
    case = '<testcase classname="a" name="b"><skipped message="not installed"/></testcase>'
    text = f'<testsuites><testsuite tests="1" failures="0" errors="0" skipped="1">{case}</testsuite></testsuites>'
    (session.logs / "one-0.xml").write_text(text)
    (session.logs / "one-1.xml").write_text("<testsuites><testsuite")  # of a process that was killed
    assert not session.run("one", [["true"], ["true"]], 60)
    assert session.steps[0]["state"] == "left out"
    assert session.steps[0]["why"] == "not installed"


def test_everything_is_in_one_file_after_every_step(tmp_path: Path, commands: dict[str, list[str]]) -> None:
    session = Session(tmp_path / "out", False, MACHINE)
    session.pack = tmp_path / "packed"
    session.part(part("one"))
    assert sorted(path.name for path in session.pack.iterdir()) == ["gpu.json", "gpu.tar.gz"]
    with tarfile.open(session.pack / "gpu.tar.gz") as archive:
        assert {"gpu/gpu.json", "gpu/logs/one.log"} <= set(archive.getnames())


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_what_runs_too_long_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    began = time.monotonic()
    slow = ["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/child; wait"]
    logs = [tmp_path / "slow.log", tmp_path / "quick.log"]
    assert processes.side_by_side([slow, ["true"]], logs, 0.5, {}, tmp_path) == [processes.LATE, 0]
    assert time.monotonic() - began < 30
    child = int((tmp_path / "child").read_text())
    while is_alive(child):
        assert time.monotonic() - began < 30
        time.sleep(0.1)


def test_versions_that_are_too_old_count_as_missing(tmp_path: Path) -> None:
    assert environment.missing({"pytest": "pytest>=8", "torch": "torch>=2.10"}) == []
    assert environment.missing({"pytest": "pytest>=1000", "no_such": "no-such>=1"}) == ["no-such>=1", "pytest>=1000"]
    there = importlib.metadata.version("pytest")
    for wheel in (f"pytest-{there}", "pytest-1000", "no_such-1"):
        (tmp_path / f"{wheel}-py3-none-any.whl").touch()
    assert [path.name[:11] for path in environment.not_installed(tmp_path)] == ["no_such-1-p", "pytest-1000"]


@pytest.mark.parametrize(
    ("triton", "numpy", "lacking"),
    [("3.6.0", "2.4.0", ["numpy<2.4"]), ("3.6.0", "2.3.5", []), ("3.7.0", "2.5.0", [])],
)
def test_an_old_interpreter_needs_an_old_numpy(
    triton: str, numpy: str, lacking: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", {"triton": triton, "numpy": numpy}.__getitem__)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert environment.lacking_to_interpret() == lacking


def test_every_test_is_in_one_share(request: pytest.FixtureRequest) -> None:
    items = request.session.items
    shares = [shard(items, f"{index}/3") for index in range(3)]
    assert sorted(item.nodeid for share in shares for item in share) == sorted(item.nodeid for item in items)
