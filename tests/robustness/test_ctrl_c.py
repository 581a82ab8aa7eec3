"""Ctrl-C ends every command at any moment, and what it says was written is true."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from prefixcore import _interrupt
from prefixcore.adapters import read_adapter, read_record, replace
from prefixcore.cli import train as train_command

from .commands import NEW, ROOT


def interrupted(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("prefixcore.cli.train.open_model", "nothing was written"),
        ("prefixcore.training.train", "nothing was written"),
        ("prefixcore.training.draw_curve", "nothing was written"),
        ("prefixcore.adapters.replace.recover", "as it was before, or the new adapter, whole"),
        ("prefixcore.adapters.replace.write_new", "as it was before, or the new adapter, whole"),
        ("prefixcore.adapters.replace._put_in_place", "as it was before, or the new adapter, whole"),
        ("prefixcore.adapters.replace.remove_leftovers", "as it was before, or the new adapter, whole"),
        ("prefixcore.cli.train_result.results", "the adapter is in"),
    ],
)
@pytest.mark.parametrize("earlier", [True, False], ids=["over an earlier one", "new"])
def test_what_ctrl_c_says_is_true(train, adapter, tmp_path, monkeypatch, where, said, earlier):
    out = tmp_path / "adapter"
    if earlier:
        shutil.copytree(adapter, out)
    monkeypatch.setattr(where, interrupted)
    code, printed, err = train(*NEW)
    assert (code, printed) == (130, "")
    line = err.splitlines()[-1]
    assert line.startswith("prefixcore train: stopped; ")
    assert said in line
    assert [path.name for path in tmp_path.iterdir()] == (["adapter"] if out.exists() else [])
    if not out.exists():
        assert not earlier
        assert "adapter is in" not in line
        return
    tokens, record = read_adapter(out).config.num_virtual_tokens, read_record(out)
    assert tokens in ((9, 2) if earlier else (2,))
    assert len(record["train_loss"]) == {9: 3, 2: 8}[tokens]
    if "nothing" in said:
        assert tokens == 9
    if "adapter is in" in line:
        assert tokens == 2


@pytest.mark.parametrize("when", ["saving", "scoring"])
def test_ctrl_c_after_the_adapter_is_written(train, tmp_path, monkeypatch, when):
    """The second save, with the scores after training, or what comes before it."""
    calls = []
    place = "prefixcore.adapters.replace.write_new" if when == "saving" else "prefixcore.training.evaluate"
    module, _, name = place.rpartition(".")
    original = getattr(sys.modules[module], name)

    def later(*args, **kwargs):
        if (tmp_path / "adapter").exists():
            raise KeyboardInterrupt
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(place, later)
    code, _, err = train(*NEW)
    assert calls
    assert code == 130
    assert err.splitlines()[-1] == f"prefixcore train: stopped; the adapter is in {tmp_path / 'adapter'}"
    assert read_adapter(tmp_path / "adapter").config.num_virtual_tokens == 2
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.fixture
def handler(monkeypatch):
    """The handler of the command line's own process, which says so in place of ending the process."""

    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    def write(number, data):
        return sys.stderr.write(data.decode()) if number == 2 else original(number, data)

    original = os.write
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(os, "write", write)
    _interrupt.take_over()
    yield Ended
    signal.signal(signal.SIGINT, before)


def ctrl_c(*args: object, **kwargs: object) -> None:
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_ends_the_process_at_once(train, handler, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_command, "open_model", ctrl_c)
    with pytest.raises(handler, match="130"):
        train(*NEW)
    assert capsys.readouterr().err == "\nprefixcore train: stopped; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_a_save_waits_and_a_second_one_takes_it_back(train, handler, adapter, tmp_path, monkeypatch):
    original = replace._put_in_place

    def once(new, target):
        ctrl_c()
        original(new, target)

    def twice(new, target):
        ctrl_c()
        ctrl_c()
        original(new, target)

    out = tmp_path / "adapter"
    shutil.copytree(adapter, out)
    for place, tokens, said in ((twice, 9, f"{out} is as it was before, or the new"), (once, 2, "the adapter is in")):
        monkeypatch.setattr(replace, "_put_in_place", place)
        code, _, err = train(*NEW)
        assert code == 130
        assert said in err.splitlines()[-1]
        assert read_adapter(out).config.num_virtual_tokens == tokens
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_program_of_its_own_keeps_its_handler(prefixcore, adapter):
    before = signal.getsignal(signal.SIGINT)
    prefixcore("inspect", adapter)
    assert signal.getsignal(signal.SIGINT) is before
    assert not _interrupt.is_command_line()


@pytest.mark.parametrize("attempts", [6, pytest.param(12, marks=pytest.mark.slow)])
def test_ctrl_c_at_random_early_moments(model_folder, data, adapter, tmp_path, attempts):
    """Imports, opening the model, a training of three steps, the end: never a traceback, an abort or a lie."""
    generator = random.Random(attempts)
    out = tmp_path / "new"
    commands = [
        ["doctor"],
        ["generate", "--model", model_folder, "--adapter", adapter, "--prompt", "a", "--max-new-tokens", 2],
        ["train", "--model", model_folder, "--data", data, "--out", out, *NEW, "--steps", 3],
    ]
    codes = []
    for attempt in range(attempts):
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "prefixcore", *map(str, commands[attempt % 3])]
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            time.sleep(generator.uniform(0.3, 6.0))  # Python itself starts in less
            process.send_signal(signal.SIGINT)
            try:
                _, err = process.communicate(timeout=120)
            finally:
                process.kill()
        codes.append(process.returncode)
        # Killed by the signal: before Python was there to handle it, or when all was done.
        assert process.returncode in (0, 130, -signal.SIGINT), err
        assert "Traceback" not in err
        assert "terminate called" not in err
        assert [path for path in tmp_path.iterdir() if path != out] == []
        if process.returncode == 130:
            said = err.splitlines()[-1]
            assert "stopped" in said
            if "nothing was" in said:
                assert not out.exists()
            if "adapter is in" in said or "saved what there is" in said:
                assert read_adapter(out).config.num_virtual_tokens == 2
        if out.exists():
            assert read_record(out)["train_loss"]
    assert 130 in codes
