"""Trackers get the numbers of a run, and one that fails does not end the training."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prefixcore.training import tracking
from prefixcore.training.tracking import TRACKERS, TrackerError, Trackers, check_trackers


def scalars(folder):
    """By name, the steps and values that TensorBoard finds."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_finds_what_was_logged(tmp_path, capsys):
    trackers = Trackers(["tensorboard"], "run", {"lr": 0.5, "method": "prefix", "end": None}, tmp_path, print)
    for step in (1, 2):
        trackers.log({"train/loss": 1 / step, "train/prefix_norm/layer_0": 2.0}, step)
    trackers.finish()
    [folder] = tmp_path.iterdir()
    assert folder.name.startswith("run-")
    assert scalars(folder) == {"train/loss": [(1, 1.0), (2, 0.5)], "train/prefix_norm/layer_0": [(1, 2.0), (2, 2.0)]}
    assert capsys.readouterr().out == ""


class Broken:
    name = "tensorboard"

    def store_init_configuration(self, values):
        pass

    def log(self, values, step):
        print("noise")
        raise RuntimeError("the disk is full\nand more")

    def finish(self):
        raise AssertionError("it was given up")


def test_a_tracker_that_fails_is_given_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "_start", lambda *rest: Broken())
    said = []
    trackers = Trackers(["tensorboard"], "run", {}, tmp_path, said.append)
    trackers.log({"train/loss": 1.0}, 1)
    trackers.log({"train/loss": 1.0}, 2)
    trackers.finish()
    assert said == ["warning: tensorboard failed (the disk is full); the training goes on without it"]
    assert capsys.readouterr().out == ""


def test_what_is_not_known_or_not_installed_is_named(monkeypatch):
    with pytest.raises(TrackerError, match="no tracker is called 'excel': one of tensorboard, mlflow, wandb, trackio"):
        check_trackers(["excel"])
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name != "accelerate" else object())
    for name in TRACKERS:
        with pytest.raises(TrackerError, match=f"{name} needs {name}, .* pip install accelerate {name}"):
            check_trackers([name])


def test_a_tracker_that_does_not_start(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackerError, match="tensorboard does not start: "):
        Trackers(["tensorboard"], "run", {}, tmp_path / "file", print)
