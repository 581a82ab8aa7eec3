"""The loss of prompts beside that of answers: by hand, in every kind of batch, and what is taken of long ones."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig, PTuningConfig
from prefixcore.cli import train_options
from prefixcore.training import TokenizedExample, TrainingOptions, fit, train
from prefixcore.training.batch import Batch, call_model
from prefixcore.training.options import PROMPT_LOSS_WEIGHT
from prefixcore.training.prompt_loss import MOST, PromptsToo, loss_with_prompts
from tests import tiny

CPU = torch.device("cpu")
BEGINNING = list(range(10, 22))
EXAMPLES = [
    TokenizedExample([*BEGINNING, 30, 31], [40, 41]),
    TokenizedExample([*BEGINNING, 30, 31], [40, 42]),  # whose prompt's tokens count again
    TokenizedExample([*BEGINNING, 32], [40]),
    TokenizedExample([50], [51, 52]),  # nothing of this prompt can be learnt
    TokenizedExample([60, 61], [62, 63, 64, 65], learnt=[True, False, False, True]),  # another's turn within
]
WEIGHT = 0.3


def by_hand(model: Any, virtual: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Each example by itself: the loss, and that of the answers."""
    answers, prompts = [], []
    for example in EXAMPLES:
        ids = torch.tensor([example.prompt_ids + example.completion_ids])
        mask = torch.ones_like(ids)
        log_probs = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, virtual:].log_softmax(-1)
        for place in range(1, example.length):
            loss = -log_probs[place - 1, ids[0, place]]
            (prompts if example.labels[place] == -100 else answers).append(loss)
    found = torch.stack(answers).mean()
    return found + WEIGHT * torch.stack(prompts).mean(), found


@contextmanager
def trained(what: Any):
    """A model in float64 and what of it is trained."""
    torch.manual_seed(0)
    model = tiny.model().double().train()
    if isinstance(what, peft.PeftConfig):
        wrapped = peft.get_peft_model(model, what).double()
        yield wrapped, [each for each in wrapped.parameters() if each.requires_grad]
        return
    with prefixcore.attach(model, what) as handle:
        handle.module.double()
        yield handle.model, list(handle.parameters())


OURS = [
    PrefixTuningConfig(num_virtual_tokens=3, init="random", seed=0),
    PromptTuningConfig(num_virtual_tokens=3, init="random", seed=0),
    PTuningConfig(num_virtual_tokens=3, init="random", seed=0, encoder_hidden_size=8),
]
OF_PEFT = [
    peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
]


BATCHES = [
    *((config, "padded") for config in (*OURS, *OF_PEFT)),
    *((config, "packed") for config in OURS),
    (OURS[0], "tree"),
]


@pytest.mark.parametrize(
    ("config", "kind"),
    BATCHES,
    ids=[f"{type(c).__module__.split('.')[0]}-{type(c).__name__}-{kind}" for c, kind in BATCHES],
)
def test_it_is_the_two_means_of_single_tokens(config, kind):
    """Loss and every gradient."""
    with trained(config) as (model, parameters):
        learnt = PromptsToo(0)(EXAMPLES)
        packed, width = kind != "padded", 32 if kind == "tree" else 0
        batch = Batch.of(learnt.examples, 0, packed=packed, device=CPU, sharing_width=width)
        assert ("cu_seq_lens_q" in batch.arguments) == (kind == "packed")
        loss, answers = loss_with_prompts(model, batch, learnt.is_answer, WEIGHT, call_model)
        virtual = 3 if isinstance(config, peft.PromptTuningConfig) else 0
        expected, expected_answers = by_hand(model, virtual)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6, check_dtype=False)
        torch.testing.assert_close(answers, expected_answers, rtol=1e-6, atol=1e-6, check_dtype=False)
        for got, wanted in zip(
            torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


def test_prompts_of_one_token_leave_the_answers_alone():
    learnt = PromptsToo(0)([EXAMPLES[3]])
    assert learnt.examples[0].labels == EXAMPLES[3].labels
    assert learnt.is_answer.tolist() == [True, True]
    with trained(OURS[0]) as (model, _):
        batch = Batch.of(learnt.examples, 0, packed=True, device=CPU)
        loss, answers = loss_with_prompts(model, batch, learnt.is_answer, WEIGHT, call_model)
    assert torch.equal(loss, answers)


def test_of_a_long_prompt_some_tokens_are_drawn_anew_each_time_and_the_seed_says_which():
    example = TokenizedExample(list(range(5, 205)), [300, 301])

    def draws(seed: int) -> list[list[int]]:
        prompts_too = PromptsToo(seed)
        return [prompts_too([example]).examples[0].labels for _ in range(3)]

    first, second, _ = draws(0)
    assert first != second
    assert draws(0) == draws(0) != draws(1)
    assert first[-2:] == [300, 301]
    assert sum(label != -100 for label in first) == MOST + 2
    seen = PromptsToo(2)
    counts = sum((torch.tensor(seen([example]).examples[0].labels) != -100).long() for _ in range(400))
    assert counts[0] == 0
    assert counts[1:200].min() > 90  # 400 * 64 / 199 is 129
    assert counts[1:200].max() < 170


def test_what_is_recorded_is_the_loss_of_the_answers():
    records = []
    for weight in (0.0, WEIGHT):
        with prefixcore.attach(tiny.model(), OURS[0]) as handle:
            options = TrainingOptions(steps=2, batch_size=len(EXAMPLES), learning_rate=0.1, prompt_loss_weight=weight)
            records.append(train(handle, tiny.tokenizer(), EXAMPLES, held_out=EXAMPLES, options=options))
    without, with_prompts = records
    assert with_prompts.train_loss[0][1] == pytest.approx(without.train_loss[0][1], rel=1e-5)
    assert with_prompts.train_loss[1][1] != pytest.approx(without.train_loss[1][1], rel=1e-5)
    assert with_prompts.held_out_loss[0] == without.held_out_loss[0]
    assert with_prompts.to_dict()["options"]["prompt_loss_weight"] == WEIGHT


def test_a_model_without_logits_is_told_what_to_give():
    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = torch.nn.Parameter(torch.zeros(()))

        def forward(self, input_ids, attention_mask, use_cache, labels=None):
            return SimpleNamespace(loss=self.x**2)

    model = Loss()
    with pytest.raises(ValueError, match="Loss returns no logits.*prompt_loss_weight=0"):
        fit(model, model.parameters(), EXAMPLES)
    assert fit(model, model.parameters(), EXAMPLES, options=TrainingOptions(steps=2, prompt_loss_weight=0)).steps_done


def test_a_model_that_requires_labels_gets_them_and_one_that_does_not_makes_no_loss_of_its_own():
    seen = []

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = torch.nn.Embedding(512, 512)

        def both(self, input_ids, labels):
            seen.append(labels is not None)
            return SimpleNamespace(logits=self.logits(input_ids))

    class Required(Model):
        def forward(self, input_ids, attention_mask, use_cache, labels):
            return self.both(input_ids, labels)

    class Optional(Model):
        def forward(self, input_ids, attention_mask, use_cache, labels=None):
            return self.both(input_ids, labels)

    histories = []
    for model in (Required(), Optional()):
        torch.nn.init.zeros_(model.logits.weight)
        options = TrainingOptions(steps=2, learning_rate=0.1)
        histories.append(fit(model, model.parameters(), EXAMPLES, options=options).train_loss)
    assert seen == [True, True, False, False]
    assert histories[0] == histories[1]


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_weight_is_a_number_from_zero(weight):
    with pytest.raises(ValueError, match="prompt_loss_weight must be at least 0 and finite"):
        TrainingOptions(prompt_loss_weight=weight)


def test_the_command_line_has_the_same_default():
    assert train_options.PROMPT_LOSS_WEIGHT == PROMPT_LOSS_WEIGHT == TrainingOptions().prompt_loss_weight
