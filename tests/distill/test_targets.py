"""The text said again, in the answers' place."""

from __future__ import annotations

import pytest
import torch

from prefixcore.distill import DistillOptions
from prefixcore.distill.front import Front
from prefixcore.distill.store import Store
from prefixcore.distill.targets import Teacher
from prefixcore.distill.writing import BEGINNING, PIECE, writer
from tests.distill.conftest import TEXT


def test_pieces_hold_the_whole_text_and_overlap(tokenizer):
    written = writer(tokenizer, TEXT * 3, chat=False)
    pieces = [[*asked.behind, *asked.given] for asked in written.recite()]
    assert all(len(piece) <= PIECE for piece in pieces)
    assert pieces[0] + [token for piece in pieces[1:] for token in piece[PIECE // 2 :]] == written.front
    assert all(len(asked.alone) == BEGINNING for asked in written.recite())
    assert writer(tokenizer, "abc", chat=False).recite() == []


@pytest.mark.parametrize("folder", [True, False])
def test_the_teacher_says_how_likely_the_text_is_behind_itself(model, tokenizer, tmp_path, folder):
    written = writer(tokenizer, TEXT, chat=False)
    options = DistillOptions(num_virtual_tokens=4, top_k=97)
    teacher = Teacher(
        model, tokenizer, Front.of(model, written.front), "", 0, options, Store(tmp_path if folder else None)
    )
    for _ in range(2):  # the second time from the folder
        target, *_ = teacher.targets(written.recite(), greedy=True)
        assert [*target.asked.behind, *target.answer] == written.front[: BEGINNING + len(target.answer)]
        ids = torch.tensor([[*written.front, *target.asked.behind, *target.answer]])
        expected = model(ids).logits[0, -len(target.answer) - 1 : -1].log_softmax(-1).gather(-1, target.top_ids)
        torch.testing.assert_close(target.top_log_probs, expected, atol=1e-4, rtol=1e-4)
