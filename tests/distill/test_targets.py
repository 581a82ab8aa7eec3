"""The text said again, in the answers' place."""

from __future__ import annotations

import pytest
import torch

from prefixcore.distill import DistillOptions, Prompt
from prefixcore.distill.front import Front
from prefixcore.distill.store import Store
from prefixcore.distill.targets import Target, Teacher, whole
from prefixcore.distill.writing import BEGINNING, PIECE, Asked, writer
from tests.distill.conftest import OWN_SYSTEM, TEXT


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


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_is_read_on_from_its_first_word_with_its_answer(model, tokenizer, chat):
    tokenizer.chat_template = OWN_SYSTEM
    written = writer(tokenizer, TEXT, chat=chat)
    teacher = Teacher(
        model,
        tokenizer,
        Front.of(model, written.front),
        "",
        0,
        DistillOptions(num_virtual_tokens=4, top_k=97, max_answer_tokens=5),
        Store(None),
    )
    (target,) = teacher.targets([written.ask(Prompt("de ->"))], greedy=True)
    (read,) = teacher.targets([whole(target)], greedy=True)
    assert len(read.asked.behind) == 1
    assert [*read.asked.behind, *read.answer] == [*target.asked.behind, *target.answer]
    assert [*read.asked.alone, *read.answer] == [*target.asked.alone, *target.answer]
    answered = read.top_log_probs[-len(target.answer) :]
    torch.testing.assert_close(answered, target.top_log_probs, atol=1e-4, rtol=1e-4)


def test_nothing_but_the_words_that_a_request_shares_is_read_on(tokenizer):
    behind, alone = [7, 1, 2, 3], [9, 2, 3]
    nothing = torch.zeros(1, 1)
    target = Target(Asked(Prompt("x"), behind, alone), [5], nothing.long(), nothing)
    assert whole(target) == Asked(Prompt("x"), [7, 1], [9], (2, 3, 5))
