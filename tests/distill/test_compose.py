"""Several prefixes one behind the other."""

from __future__ import annotations

import pytest
import torch

import prefixcore
from prefixcore.distill import DistillError, compose
from prefixcore.hf.baking.bake_prefix import ids_to_prefix
from prefixcore.hf.baking.baking import bake

ONE, OTHER = [5, 6, 7], [8, 9]


@pytest.fixture
def folders(model, tmp_path):
    for name, ids in (("one", ONE), ("other", OTHER)):
        config = prefixcore.PrefixTuningConfig(init=ids_to_prefix(model, ids))
        with prefixcore.attach(model, config) as handle:
            handle.save(tmp_path / name, task=name)
    return [tmp_path / "one", tmp_path / "other"]


def test_the_second_stands_behind_the_first(model, folders, tmp_path):
    out = compose(model, folders, tmp_path / "both", task="both")
    with prefixcore.load(model, out) as handle:
        pairs = handle.bake()
    (first, _), *_ = ids_to_prefix(model, ONE)
    (whole, _), *_ = ids_to_prefix(model, ONE + OTHER)
    assert pairs[0][0].shape[1] == 5
    assert torch.equal(pairs[0][0][:, :3], first)
    # In the first layer a key follows from a token and its position alone.
    torch.testing.assert_close(pairs[0][0], whole, atol=1e-4, rtol=1e-4)
    (_, value), *_ = ids_to_prefix(model, OTHER)
    assert torch.equal(pairs[0][1][:, 3:], value)
    manifest = prefixcore.adapters.read_adapter(out).manifest
    assert manifest.training["composed_1"] == prefixcore.adapters.read_adapter(folders[0]).digest


def test_prefixes_that_leave_the_text_at_position_0_are_turned(model, folders, tmp_path):
    """Of the other convention, the same prefixes: their keys stand before position 0."""
    for name, folder in (("one at 0", folders[0]), ("other at 0", folders[1])):
        bake(model, folder, tmp_path / name, position_offset=False)
    both = compose(model, folders, tmp_path / "both")
    at_zero = compose(model, [tmp_path / "one at 0", tmp_path / "other at 0"], tmp_path / "both, once more")
    with prefixcore.load(model, both) as handle:
        expected = handle.bake()
    with prefixcore.load(model, at_zero) as handle:
        assert handle.module.config.position_offset
        for (key, value), (same_key, same_value) in zip(handle.bake(), expected, strict=True):
            torch.testing.assert_close(key, same_key, atol=1e-5, rtol=1e-5)
            assert torch.equal(value, same_value)


def test_what_cannot_be_composed(model, folders, tmp_path):
    with pytest.raises(DistillError, match="at least two adapters"):
        compose(model, folders[:1], tmp_path / "both")
    with prefixcore.attach(model, prefixcore.PromptTuningConfig(num_virtual_tokens=2)) as handle:
        handle.save(tmp_path / "prompt", task="x")
    with pytest.raises(DistillError, match="no prefix but a prompt"):
        compose(model, [folders[0], tmp_path / "prompt"], tmp_path / "both")
    with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=2, layers=[1])) as handle:
        handle.save(tmp_path / "upper", task="x")
    with pytest.raises(DistillError, match="layers are not those of"):
        compose(model, [folders[0], tmp_path / "upper"], tmp_path / "both")
    assert not (tmp_path / "both").exists()
