"""The teacher's hidden states, and the student's error in them."""

from __future__ import annotations

import pytest
import torch

from prefixcore.distill import DistillOptions, Prompt, distill
from prefixcore.distill.front import Front, Reader
from prefixcore.distill.hidden import HiddenStates, chosen_layers
from prefixcore.distill.learning import rows_of
from prefixcore.distill.running import read
from prefixcore.distill.targets import Target, shared
from prefixcore.distill.writing import Asked
from tests.distill.conftest import TEXT

IDS = [5, 6, 7, 8]


def target(behind, alone, answer):
    return Target(Asked(Prompt("x"), behind, alone), answer, torch.zeros(len(answer), 1), torch.zeros(len(answer), 1))


TARGETS = [
    target([20, 21, 22], [20, 21, 22], [30, 31]),
    target([24], [24], [33, 34, 35]),
    target([25, 26], [1, 2, 25, 26], [36]),
]


def test_layers_are_spread_and_the_last_is_there():
    assert chosen_layers(2) == [1, 2]
    assert chosen_layers(30) == [4, 8, 11, 15, 19, 22, 26, 30]


def test_what_both_read_ends_alike():
    """The last token predicts nothing that is asked for."""
    assert shared(TARGETS[0], 5) == slice(0, 4)
    assert shared(TARGETS[2], 5) == slice(2, 4)
    assert shared(TARGETS[2], 3) == slice(0, 2)
    assert shared(target([20, 21], [9, 21], [30]), 3) == slice(1, 2)


@pytest.mark.parametrize("packed", [True, False])
def test_the_teacher_is_not_wrong(model, packed):
    """Behind the whole text the student's states are the teacher's, whether rows are packed or padded."""
    with Front.of(model, IDS).before(model) as reader:
        states = HiddenStates.read(reader, TARGETS[:2], 0)
        own = Reader(model, [], packed=packed)
        _, found = read(own, rows_of(TARGETS[:2]), 0, states.layers)
        assert float(states.error(found, TARGETS[:2], own)) < 1e-6
    assert states.of[id(TARGETS[0])].shape == (4, 2, model.config.hidden_size)
    own = Reader(model, [], packed=False)
    _, found = read(own, rows_of(TARGETS[:2]), 0, states.layers)
    alone = states.error(found, TARGETS[:2], own)
    expected = []
    with torch.no_grad():
        for each in TARGETS[:2]:
            ids = torch.tensor([each.asked.alone + each.answer])
            output = model(input_ids=ids, output_hidden_states=True).hidden_states[1:]
            teacher = states.of[id(each)]
            expected.append((torch.stack(output, -2)[0, :-1] - teacher) / states.scale)
    torch.testing.assert_close(alone, torch.cat(expected).square().mean(), rtol=1e-4, atol=1e-6)


def test_text_before_each_prompt_gives_the_same(model):
    """The slow teacher, which reads the text's tokens with every prompt."""
    with Front.of(model, IDS).before(model) as reader:
        fast = HiddenStates.read(reader, TARGETS, 0)
    slow = HiddenStates.read(Reader(model, IDS, packed=False), TARGETS, 0)
    for each in TARGETS:
        torch.testing.assert_close(slow.of[id(each)], fast.of[id(each)], rtol=1e-3, atol=1e-3)


def test_it_is_learnt_beside_the_probabilities(model, tokenizer, prompts):
    options = {"num_virtual_tokens": 6, "questions": 0, "max_answer_tokens": 4, "steps": 12, "learning_rate": 0.02}
    options["start"] = "first"
    found = distill(model, tokenizer, TEXT, options=DistillOptions(**options, hidden_weight=1.0), prompts=prompts)
    losses = [loss for _, loss in found.record.train_loss]
    assert losses[-1] < losses[0]
    assert found.report.scores["distilled prefix"].divergence < found.report.scores["its start"].divergence
