"""Which values stay when training ends."""

from __future__ import annotations

import pytest
import torch

from prefixcore.distill import DistillOptions, distill, learning
from prefixcore.distill.learning import is_less
from tests.distill.conftest import TEXT

OPTIONS = DistillOptions(
    num_virtual_tokens=6, questions=0, max_answer_tokens=4, steps=20, learning_rate=0.02, start="spread"
)


def test_less_is_more_than_the_error_of_the_mean():
    before = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert is_less(before - 0.1, before)
    assert not is_less(before, before)
    assert not is_less(before + torch.tensor([-3.0, 1.0, 1.0, 0.9]), before)  # one prompt alone is nearer
    assert is_less(torch.tensor([1.0]), torch.tensor([2.0]))


@pytest.mark.parametrize("told_apart", [True, False])
def test_the_start_stays_where_validation_prompts_cannot_tell_what_was_learnt_from_it(
    told_apart, model, tokenizer, prompts, monkeypatch
):
    monkeypatch.setattr(learning, "is_less", lambda after, before: told_apart)
    distilled = distill(model, tokenizer, TEXT, options=OPTIONS, prompts=prompts)
    assert len(distilled.record.train_loss) > 0
    assert (distilled.record.kept_step > 0) is told_apart
    scores = distilled.report.scores
    assert (scores["distilled prefix"].divergence == scores["its start"].divergence) is not told_apart
