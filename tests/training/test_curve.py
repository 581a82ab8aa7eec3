"""The picture is a PNG with what the run says in it."""

from __future__ import annotations

import pytest
from matplotlib.image import imread

from prefixcore.training import Curve, TrainingOptions, TrainingRecord, write_curve
from prefixcore.training.curve import _smooth


def record(scale=1.0, held_out=True):
    result = TrainingRecord(TrainingOptions(steps=20))
    result.train_loss = [(step, scale / step) for step in range(1, 21)]
    if held_out:
        result.held_out_loss = [(0, scale * 2), (20, scale)]
    return result


def coloured(image):
    """How many pixels are neither grey, white nor black."""
    spread = image[..., :3].max(-1) - image[..., :3].min(-1)
    return int((spread > 0.1).sum())


@pytest.mark.parametrize("held_out", [True, False])
def test_writes_a_picture(tmp_path, held_out):
    path = write_curve(tmp_path / "c.png", [Curve("prefix", record(held_out=held_out))], title="t")
    image = imread(path)
    assert image.shape[1] == (1344 if held_out else 784)
    assert coloured(image) > 1000


def test_the_values_that_were_kept_are_marked(tmp_path):
    plain, marked = record(), record()
    marked.options, marked.kept_step = TrainingOptions(steps=20, keep="best"), 20
    one, two = (imread(write_curve(tmp_path / "c.png", [Curve("a", each)])) for each in (plain, marked))
    assert coloured(two) > coloured(one)


def test_every_method_has_a_line_of_its_own(tmp_path):
    one = imread(write_curve(tmp_path / "1.png", [Curve("a", record())]))
    two = imread(write_curve(tmp_path / "2.png", [Curve("a", record()), Curve("b", record(5.0))]))
    assert coloured(two) > 1.3 * coloured(one)


def test_a_run_that_was_stopped_at_once_can_be_drawn(tmp_path):
    stopped = TrainingRecord(TrainingOptions(), train_loss=[(1, 2.0)], interrupted=True)
    assert imread(write_curve(tmp_path / "c.png", [Curve("prefix", stopped)])).size


def test_smoothing_is_unbiased():
    assert _smooth([2.0] * 5) == pytest.approx([2.0] * 5)
    assert _smooth([0.0, 1.0]) == pytest.approx([0.0, 0.1 / 0.19])
