"""The loop, on a model small enough to follow by hand and on a real one with PEFT."""

from __future__ import annotations

import math
import os
import signal
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import nn

from prefixcore.training import (
    Example,
    TokenizedExample,
    TrainingOptions,
    fit,
    held_out_loss,
    optimize,
    tokenize,
    weights_digest,
)
from prefixcore.training.stopping import stop_on_signal
from tests import tiny


class OneNumber(nn.Module):
    """The loss is (x - 3)^2, whatever the batch: x must move towards 3."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor(start))
        self.frozen = nn.Parameter(torch.tensor(1.0), requires_grad=False)
        self.batches: list[list[int]] = []
        self.modes: list[bool] = []

    def forward(self, input_ids, attention_mask, labels, use_cache):
        self.batches.append(input_ids[:, 0].tolist())
        self.modes.append(self.training)
        return SimpleNamespace(loss=(self.x - 3) ** 2 * self.frozen)


ANSWERS = partial(TrainingOptions, prompt_loss_weight=0.0)
"""Such a model gives no logits, of which the loss of prompts would be made."""

ROWS = [TokenizedExample([i], [9]) for i in range(5)]


def test_trains_what_requires_a_gradient_and_nothing_else():
    model = OneNumber()
    record = fit(model, model.parameters(), ROWS, options=ANSWERS(steps=200, learning_rate=0.1))
    assert model.x.item() == pytest.approx(3, abs=0.05)
    assert model.frozen.item() == 1.0
    assert record.steps_done == 200
    assert len(record.step_seconds) == 200
    assert record.train_loss[0] == (1, 9.0)
    assert record.train_loss[-1][1] < 0.01
    assert not record.interrupted


def test_the_seed_decides_the_order():
    orders = []
    for seed in (0, 0, 1):
        model = OneNumber()
        fit(model, model.parameters(), ROWS, options=ANSWERS(steps=5, batch_size=2, seed=seed))
        orders.append(model.batches)
    assert orders[0] == orders[1] != orders[2]


def test_held_out_losses_come_at_start_in_between_and_at_the_end():
    model = OneNumber()
    heard = []
    record = fit(
        model,
        model.parameters(),
        ROWS,
        held_out=ROWS[:2],
        options=ANSWERS(steps=7, eval_every=3),
        on_held_out=lambda step, loss: heard.append((step, loss)),
    )
    assert [step for step, _ in record.held_out_loss] == [0, 3, 6, 7]
    assert heard == record.held_out_loss
    assert model.modes == [False] + [True] * 3 + [False] + [True] * 3 + [False] + [True] + [False]
    assert model.training


class Turning(OneNumber):
    """The held-out loss falls until x is 1 and rises then, while the training loss falls to the end."""

    def forward(self, input_ids, attention_mask, labels, use_cache):
        output = super().forward(input_ids, attention_mask, labels, use_cache)
        return output if self.training else SimpleNamespace(loss=(self.x - 1) ** 2)


EVERY_FIVE = {"steps": 40, "learning_rate": 0.1, "eval_every": 5}


def run(model, **options):
    return fit(model, model.parameters(), ROWS, held_out=ROWS[:1], options=ANSWERS(**EVERY_FIVE, **options))


def test_the_best_or_the_last_values_are_kept():
    last, best = Turning(), Turning()
    last_record, best_record = run(last), run(best, keep="best")
    assert (last_record.kept_step, best_record.kept_step) == (40, 10)
    assert last_record.held_out_loss == best_record.held_out_loss
    assert last.x.item() > 2
    losses = dict(best_record.held_out_loss)
    assert losses[10] == min(losses.values()) == pytest.approx((best.x.item() - 1) ** 2, rel=1e-3)


def test_the_start_can_be_the_best():
    model = Turning(start=1.0)
    assert run(model, keep="best").kept_step == 0
    assert model.x.item() == 1.0


def test_training_stops_when_the_held_out_loss_no_longer_falls():
    model = Turning()
    record = run(model, early_stopping_patience=2)
    assert record.stopped_early
    assert not record.interrupted
    assert (record.steps_done, record.kept_step) == (20, 20)  # least at 10, above it at 15 and 20
    assert [step for step, _ in record.held_out_loss] == [0, 5, 10, 15, 20]
    record = run(Turning(), early_stopping_patience=2, keep="best")
    assert (record.steps_done, record.kept_step) == (20, 10)
    assert not run(OneNumber(), early_stopping_patience=2).stopped_early


@pytest.mark.parametrize("options", [{"keep": "best"}, {"early_stopping_patience": 1}])
def test_what_goes_by_held_out_examples_needs_some(options):
    model = OneNumber()
    with pytest.raises(ValueError, match="need held-out examples"):
        fit(model, model.parameters(), ROWS, options=ANSWERS(**options))


def test_each_step_is_told_with_its_gradients():
    model, heard = OneNumber(), []
    fit(
        model,
        model.parameters(),
        ROWS,
        options=ANSWERS(steps=3, warmup_steps=1, learning_rate=0.5),
        on_step=lambda step, values: heard.append((step, values["learning_rate"], model.x.grad is not None)),
    )
    assert heard == [(1, 0.25, True), (2, 0.5, True), (3, 0.5, True)]


def test_the_mode_is_put_back_when_it_was_evaluation():
    model = OneNumber().eval()
    fit(model, model.parameters(), ROWS, options=ANSWERS(steps=1))
    assert not model.training


def test_warm_up_and_linear_decay():
    options = TrainingOptions(steps=10, warmup_steps=4, schedule="linear")
    factors = [options.lr_factor(step) for step in range(11)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert factors[5:] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    assert {TrainingOptions(steps=10).lr_factor(step) for step in range(10)} == {1.0}


def test_gradients_are_scaled_down_to_the_norm():
    # AdamW's own scaling hides the size of a lone gradient, so read the gradient that it was given.
    model = OneNumber()
    options = ANSWERS(steps=1, max_grad_norm=0.5)
    fit(model, model.parameters(), ROWS, options=options)
    assert model.x.grad.item() == pytest.approx(-0.5, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_before_the_step():
    model = OneNumber(start=math.inf)
    with pytest.raises(ValueError, match="the loss became inf; try a lower learning rate than 0.002"):
        fit(model, model.parameters(), ROWS, options=ANSWERS())
    assert model.x.item() == math.inf
    assert model.training


def test_nothing_to_train_or_to_learn_from_is_an_error():
    model = OneNumber()
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        fit(model, [model.frozen], ROWS)
    with pytest.raises(ValueError, match="no examples"):
        fit(model, model.parameters(), [])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("warmup_steps", -1),
        ("eval_every", -1),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("weight_decay", math.nan),
        ("steps", 1.5),
        ("batch_size", True),
        ("seed", -1),
        ("seed", 2**63),
        ("weight_decay", -1.0),
        ("max_grad_norm", 0.0),
        ("schedule", "cosine"),
        ("keep", "first"),
        ("early_stopping_patience", 0),
    ],
)
def test_options_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        TrainingOptions(**{field: value})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_training_after_a_whole_step(number):
    model = OneNumber()
    before = signal.getsignal(number)
    forward = model.forward

    def interrupting(**batch):
        if len(model.batches) == 3:
            os.kill(os.getpid(), number)
        return forward(**batch)

    model.forward = interrupting
    record = fit(model, model.parameters(), ROWS, held_out=(), options=ANSWERS(steps=50))
    assert record.interrupted
    assert record.steps_done == 4
    assert signal.getsignal(number) is before


def test_a_signal_while_the_last_held_out_loss_is_measured_is_told_and_the_training_is_whole():
    value = nn.Parameter(torch.zeros(()))
    measured = []

    def measure():
        measured.append(value.item())
        if len(measured) == 2:
            signal.raise_signal(signal.SIGINT)
        return -value.item()

    options = ANSWERS(steps=3, keep="best")
    record = optimize([value], lambda: (value - 3) ** 2, held_out_loss=measure, options=options)
    assert record.asked_to_stop
    assert not record.interrupted
    assert record.kept_step == record.steps_done == 3
    assert not optimize([value], lambda: (value - 3) ** 2, options=TrainingOptions(steps=3)).asked_to_stop


@pytest.fixture
def plain_ctrl_c():
    """Python's own handler, also where the tests run in the background of a shell, which ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_is_not_held_back(plain_ctrl_c):
    with stop_on_signal() as stopping:
        signal.raise_signal(signal.SIGINT)
        assert stopping()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_thread_can_train():
    model, records = OneNumber(), []
    options = ANSWERS(steps=2)
    thread = threading.Thread(target=lambda: records.append(fit(model, model.parameters(), ROWS, options=options)))
    thread.start()
    thread.join()
    assert records[0].steps_done == 2


def test_a_peft_model_learns_and_its_base_weights_stay():
    tokenizer, base = tiny.tokenizer(), tiny.model()
    before = weights_digest(base)
    torch.manual_seed(0)
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    rows = tokenize(tokenizer, [Example(prompt, "z") for prompt in "abcdef"], end="\n")
    record = fit(
        model,
        model.parameters(),
        rows[:4],
        held_out=rows[4:],
        options=TrainingOptions(steps=60, learning_rate=0.05),
    )
    assert record.held_out_loss[-1][1] < record.held_out_loss[0][1] - 0.1
    assert record.held_out_loss[-1][1] == held_out_loss(model, rows[4:], 0)
    assert weights_digest(base) == before
