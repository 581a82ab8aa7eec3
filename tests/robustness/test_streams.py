"""Standard input that is no text, and standard output that is closed, full or gone."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from prefixcore.adapters import read_adapter
from prefixcore.cli import output
from prefixcore.cli import train as train_command

from .commands import NEW, ROOT


def test_standard_input_that_is_no_text(refused_generation, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xe9\n"), encoding="utf-8"))
    assert "standard input is not UTF-8 text" in refused_generation()
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xe9\n"), encoding="ascii", errors="surrogateescape")
    )
    assert "not UTF-8" in refused_generation()
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed" in refused_generation()


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")], ids=str)
def test_results_that_cannot_be_printed(train, adapter, tmp_path, capsys, monkeypatch, error):
    class Closed(io.StringIO):
        encoding = "utf-8"

        def write(self, text):
            raise error

    monkeypatch.setattr(sys, "stdout", Closed())
    code, _, err = train(*NEW)
    assert code == 2
    assert f"standard output cannot be written: {error.strerror} (the adapter is in {tmp_path}" in err.splitlines()[-1]
    assert read_adapter(tmp_path / "adapter").config.num_virtual_tokens == 2


def test_a_closed_standard_output_is_known_before_training(train, tmp_path, monkeypatch):
    monkeypatch.setattr(train_command, "open_model", None)
    monkeypatch.setattr(sys, "stdout", None)
    code, _, err = train(*NEW)
    assert code == 2
    assert "standard output is closed" in err
    assert list(tmp_path.iterdir()) == []


def shell(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A line of bash in which `$1` is Python and `"${@:2}"` what is given to `prefixcore`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)
    line = ["bash", "-c", command, "bash", sys.executable, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ('"$1" -m prefixcore "${@:2}" | true; exit ${PIPESTATUS[0]}', "cannot be written: Broken pipe"),
        ('"$1" -m prefixcore "${@:2}" >/dev/full', "cannot be written: No space left on device"),
        ('"$1" -m prefixcore "${@:2}" >&-', "standard output is closed"),
    ],
)
def test_standard_output_for_real(adapter, command, expected):
    done = shell(command, "inspect", adapter)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("prefixcore inspect: error: standard output")
    assert expected in line


def test_output_in_another_encoding(monkeypatch):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding="ascii"))
    for text in ("é\x9b", "\U0001f600\ud800"):
        written = output.to_json({"a": text})
        assert written.isascii()
        assert json.loads(written) == {"a": text}


@pytest.mark.parametrize("arguments", ["--help", "--version", "train --help"])
@pytest.mark.parametrize(("place", "expected"), [("/dev/full", "No space left"), ("&-", "standard output is closed")])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_help_that_cannot_be_printed(arguments, place, expected, buffered):
    done = shell(f'PYTHONUNBUFFERED={buffered} "$1" -m prefixcore {arguments} >{place}')
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert expected in line
