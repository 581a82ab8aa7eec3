"""What training steps are measured on: data packed and padded, their gates, the parts of a profile, missing weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import models
from bench.demo import base_model
from bench.steps import check, contenders, packed, profile
from bench.steps.contenders import Step
from prefixcore import PackedCollator
from tests import tiny
from tests.bench.smoke import run

TINY = models.TINY[0]


def test_ragged_lengths_lie_between_their_bounds_on_a_logarithmic_scale() -> None:
    data = packed.ragged(97, 4000, 1024, 64)
    lengths = torch.tensor([float(example.length) for example in data.examples])
    assert 16 <= lengths.min() < 18
    assert 1000 < lengths.max() <= 1024
    assert lengths.median() == pytest.approx(128, rel=0.08)  # half of a logarithmic scale from 16 to 1024
    assert all(len(example.completion_ids) == max(1, example.length // 5) for example in data.examples)
    assert packed.ragged(97, 5, 1024, 64) == packed.ragged(97, 5, 1024, 64)


def test_both_batches_hold_the_same_tokens_and_labels() -> None:
    data = packed.ragged(97, 5, 40, 4)
    padded, together = data.padded(), data.packed()
    assert together["input_ids"][0].tolist() == padded["input_ids"][padded["attention_mask"].bool()].tolist()
    labels = [label for label in padded["labels"].flatten().tolist() if label != -100]
    assert [label for label in together["labels"].flatten().tolist() if label != -100] == labels
    assert data.case("m", "d", "prefix")["labels"] == len(labels)
    assert data.case("m", "d", "prefix")["tokens"] == int(padded["attention_mask"].sum())


def test_the_demo_s_batch() -> None:
    data = packed.countries(tiny.tokenizer())
    assert len(data.examples) == 8
    text = [tiny.tokenizer().decode(example.prompt_ids + example.completion_ids) for example in data.examples]
    assert all(" -> " in line and line.endswith("\n") for line in text)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_a_wrong_packed_batch_is_noticed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = models.make(TINY, 64), packed.ragged(TINY.vocabulary, 3, 40, 4)
    assert packed.check(model, data, kind) < 1e-5

    def one_sequence(self: packed.Data) -> dict:
        ids = [token for e in self.examples for token in e.prompt_ids + e.completion_ids]
        labels = [label for e in self.examples for label in [-100] * len(e.prompt_ids) + e.completion_ids]
        return PackedCollator()([{"input_ids": ids, "labels": labels}])

    monkeypatch.setattr(packed.Data, "packed", one_sequence)
    with pytest.raises(pytest.fail.Exception, match=f"a packed batch with our {kind} is wrong"):
        packed.check(model, data, kind)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_step_is_noticed(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(TINY, 2, 9, 4, dtype=dtype)
    assert 0 < check.check(step.model(), step.batch(), step.P) < 2e-2
    right = check.gradient
    monkeypatch.setattr(check, "gradient", lambda handle: 1.1 * right(handle))
    with pytest.raises(pytest.fail.Exception, match="the model with our prefix is wrong"):
        check.check(step.model(), step.batch(), step.P)


def test_operators_belong_to_parts_of_a_step() -> None:
    assert profile.part_of("prefixcore::prefix_attention_backward") == "attention"
    assert profile.part_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert profile.part_of("aten::addmm") == "matrix products"
    assert profile.part_of("aten::cat") == profile.part_of("aten::copy_") == "copies and masks"
    assert profile.part_of("aten::_log_softmax_backward_data") == "logits' loss"
    assert profile.part_of("aten::mul") == profile.REST
    step = Step(TINY, 1, 9, 4)
    found = profile.parts(contenders.our_prefix(step.model(), step.batch(), step.P), 2)
    assert list(found) == list(profile.PARTS)
    assert all(milliseconds > 0 for milliseconds in found.values())


def test_missing_weights_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert models.missing(TINY) is None
    monkeypatch.setattr(base_model, "is_here", lambda: False)
    assert "make weights" in (models.missing(models.SMOLLM2_REAL) or "")


def test_a_row_that_was_left_out_is_in_the_results_with_its_reason(tmp_path: Path) -> None:
    """Without the weights, whatever this machine has in its cache."""
    (tmp_path / "no_weights.py").write_text("from bench.demo import base_model\nbase_model.is_here = lambda: False\n")
    rows = "test_the_demo and prefix or not test_the_demo and prompt"
    done, raw = run(tmp_path, "-rs", "-p", "no_weights", "-k", rows, "bench/steps/test_packed_step.py")
    assert "SKIPPED [1]" in done.stdout, done.stdout + done.stderr
    assert len(raw["benchmarks"]) == 1
    (row,) = raw["left_out"]
    assert row["extra_info"]["table"] == "packed step"
    assert "make weights" in row["extra_info"]["skipped"]
