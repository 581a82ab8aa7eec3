"""The cache of compiled objects: found again where nothing has changed, compiled where anything has."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests import compiler_cache

COMPILER = os.environ.get("CXX") or next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


class Project:
    """A source, a header, and a compiler that says on standard error that it has run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        real = folder / "real"
        real.write_text(f'#!/bin/sh\ncase "$*" in *-c*) echo "compiled it" >&2;; esac\nexec {COMPILER} "$@"\n')
        real.chmod(0o755)
        self.compiler = compiler_cache.stand_in(str(real), folder / "c++")
        self.calls = folder / "calls"
        real.write_text(real.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\necho \"$*\" >> '{self.calls}'\n"))
        self.write("answer.h", "#define ANSWER 42")
        self.write("source.cpp", '#include "answer.h"\nint answer() { return ANSWER; }')

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text + "\n")
        written = time.time() - 60  # a file as young as its object might have been edited under the compiler
        os.utime(self.folder / name, (written, written))

    def compile(self, *options: str, target: str = "source.o") -> subprocess.CompletedProcess[str]:
        command = [self.compiler, *options, "-c", str(self.folder / "source.cpp"), "-o", str(self.folder / target)]
        return subprocess.run(command, capture_output=True, text=True, cwd=self.folder)

    def compilations(self) -> int:
        """How often the real compiler has compiled."""
        return sum("-c " in call for call in self.calls.read_text().splitlines())


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("PREFIXCORE_TEST_CACHE", str(tmp_path / "cache"))
    return Project(tmp_path)


def test_the_same_object_and_the_same_words(project: Project) -> None:
    first = project.compile("-MD", "-MF", "one.d")
    again = project.compile("-MD", "-MF", "two.d", target="again.o")
    assert (first.returncode, again.returncode, project.compilations()) == (0, 0, 1)
    assert first.stderr == again.stderr == "compiled it\n"
    assert (project.folder / "again.o").read_bytes() == (project.folder / "source.o").read_bytes()
    names = [(project.folder / name).read_text().replace("\\\n", " ").split()[1:] for name in ("one.d", "two.d")]
    assert names[0] == names[1]
    assert str(project.folder / "answer.h") in names[0]


def test_a_changed_header_source_or_option_is_compiled_and_the_old_is_kept(project: Project) -> None:
    project.compile()
    project.write("answer.h", "#define ANSWER 43")
    project.compile()
    assert project.compilations() == 2
    project.compile("-O1")
    assert project.compilations() == 3
    project.write("source.cpp", "int answer() { return 1; }")
    project.compile()
    assert project.compilations() == 4
    project.write("source.cpp", '#include "answer.h"\nint answer() { return ANSWER; }')
    project.compile()  # includes more than the version before, which is all that is known of it
    project.compile()
    assert project.compilations() == 5


def test_what_does_not_compile_is_not_kept(project: Project) -> None:
    project.write("answer.h", "#error no answer")
    for _ in range(2):
        failed = project.compile()
        assert failed.returncode != 0
        assert "no answer" in failed.stderr
    assert project.compilations() == 2


def test_what_is_edited_while_it_is_compiled_is_not_kept(project: Project) -> None:
    os.utime(project.folder / "answer.h", (time.time() + 60, time.time() + 60))
    assert project.compile().returncode == project.compile().returncode == 0
    assert project.compilations() == 2


def test_what_nobody_asked_for_in_a_month_goes(project: Project) -> None:
    old = compiler_cache.folder() / "kind" / "old"
    compiler_cache.store("kind/old", b"1")
    compiler_cache.store("kind/young", b"2")
    past = time.time() - compiler_cache.MONTH - 60
    os.utime(old, (past, past))
    compiler_cache.store("kind/new", b"3")
    assert not old.exists()
    assert (compiler_cache.load("kind/young"), compiler_cache.load("kind/new")) == (b"2", b"3")


def test_a_value_is_made_once_for_the_same_parts(project: Project) -> None:
    made: list[int] = []

    def make() -> dict[str, int]:
        made.append(len(made))
        return {"made": len(made)}

    assert [compiler_cache.remembered("kind", parts, make) for parts in (["a", "bc"], ["ab", "c"], ["a", "bc"])] == [
        {"made": 1}, {"made": 2}, {"made": 1},
    ]  # fmt: skip


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PREFIXCORE_TEST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler_cache.folder() == tmp_path / "prefixcore" / "tests"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert compiler_cache.folder() == tmp_path / "home" / ".cache" / "prefixcore" / "tests"
