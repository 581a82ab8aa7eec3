"""Several prefixes one behind the other."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import LlamaForSequenceClassification

import prefixcore
from prefixcore.adapters import AdapterError, read_adapter, read_record
from prefixcore.distill import DistillError, compose
from prefixcore.hf.baking.bake_prefix import ids_to_prefix
from prefixcore.hf.baking.baking import bake
from tests import tiny

ONE, OTHER = [5, 6, 7], [8, 9]


@pytest.fixture
def folders(model, tmp_path):
    for name, ids in (("one", ONE), ("other", OTHER)):
        config = prefixcore.PrefixTuningConfig(init=ids_to_prefix(model, ids))
        with prefixcore.attach(model, config) as handle:
            handle.save(tmp_path / name, task=name)
    return [tmp_path / "one", tmp_path / "other"]


def test_the_second_stands_behind_the_first(model, folders, tmp_path):
    out = compose(model, folders, tmp_path / "both", task="both", license="CC-BY-4.0", intended_use="tests")
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
    manifest = read_adapter(out).manifest
    assert (manifest.task, manifest.license, manifest.intended_use) == ("both", "CC-BY-4.0", "tests")
    assert manifest.training["composed_1"] == read_adapter(folders[0]).digest


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


def test_prompts_are_asked_as_those_of_the_last(model, tmp_path):
    """Else a conversation's prefixes would be asked without the chat template."""
    asked = {"plain": {"end": "\n"}, "chat": {"chat": True}, "other chat": {"chat": True, "end": None}}
    for name, record in asked.items():
        with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=2)) as handle:
            handle.save(tmp_path / name, record=record)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = compose(model, [tmp_path / "chat", tmp_path / "other chat"], tmp_path / "both")
    assert read_record(out)["chat"] is True
    with pytest.warns(UserWarning, match="asked in different ways.*as of the last"):
        out = compose(model, [tmp_path / "chat", tmp_path / "plain"], tmp_path / "mixed")
    assert (read_record(out)["chat"], read_record(out)["end"]) == (False, "\n")


def test_where_it_comes_from_is_said(model, folders, tmp_path):
    """What was loaded in spite of another model, too."""
    other = tiny.model(seed=1)
    with prefixcore.attach(other, prefixcore.PrefixTuningConfig(num_virtual_tokens=2)) as handle:
        handle.save(tmp_path / "another model's")
    with pytest.warns(UserWarning, match="loaded all the same"):
        handle = prefixcore.load(model, tmp_path / "another model's", strict=False)
    with handle:
        handle.save(tmp_path / "forced")
    manifest = read_adapter(compose(model, [*folders, tmp_path / "forced"], tmp_path / "all")).manifest
    assert manifest.base_model["forced"] == read_adapter(tmp_path / "forced").manifest.base_model["forced"] != []
    own = [read_adapter(folder).digest for folder in [*folders, tmp_path / "another model's", tmp_path / "forced"]]
    assert [parent["digest"] for parent in manifest.derived_from] == own


def test_what_would_be_lost_is_refused(model, folders, tmp_path):
    with pytest.raises(AdapterError, match="is what is read"):
        compose(model, folders, folders[1])
    with pytest.raises(TypeError, match="expected a list of folders, got one"):
        compose(model, folders[0], tmp_path / "both")
    with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=123)) as handle:
        handle.save(tmp_path / "long")
    with pytest.raises(DistillError, match="128 virtual tokens, which leave no room .* model's 128 positions"):
        compose(model, [*folders, tmp_path / "long"], tmp_path / "both")
    compose(model, [folders[1], tmp_path / "long"], tmp_path / "longest")
    classifier = LlamaForSequenceClassification(model.config).eval()
    config = prefixcore.PrefixTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS", modules_to_save=["score"])
    for name in ("head", "other head"):
        with prefixcore.attach(classifier, config) as handle:
            handle.save(tmp_path / name)
    with pytest.raises(DistillError, match=r"brings modules along .*\(score\)"):
        compose(classifier, [tmp_path / "head", tmp_path / "other head"], tmp_path / "both")
    assert not (tmp_path / "both").exists()
