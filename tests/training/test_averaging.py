"""The average over the steps of a training."""

from __future__ import annotations

import pytest
import torch

from prefixcore.training import TrainingOptions, optimize
from prefixcore.training.averaging import ETA, Average


def test_the_average_weighs_steps_as_the_paper_says():
    weight = torch.nn.Parameter(torch.zeros(3))
    average = Average([weight])
    steps = torch.randn(20, 3)
    expected = torch.zeros(3, dtype=torch.float64)
    for t, values in enumerate(steps, start=1):
        with torch.no_grad():
            weight.copy_(values)
        average.update()
        share = (ETA + 1) / (t + ETA)
        expected = (1 - share) * expected + share * values.double()
        torch.testing.assert_close(average.values[0].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(weight.data, steps[-1])
    with average.in_place():
        torch.testing.assert_close(weight.data, expected.float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(weight.data, steps[-1])
    average.put()
    torch.testing.assert_close(weight.data, expected.float(), rtol=1e-5, atol=1e-6)


def test_small_steps_of_a_bfloat16_parameter_add_up():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    average = Average([weight])
    for step in range(400):
        with torch.no_grad():
            weight.fill_(1.0 if step % 2 else 1.0078125)  # neighbours in bfloat16
        average.update()
    assert average.values[0].dtype == torch.float32
    assert average.values[0].item() == pytest.approx(1.0039, abs=1e-4)


def noisy_quadratic(seed):
    """The parameter, and a loss that pulls it to one with noise."""
    weight = torch.nn.Parameter(torch.tensor([3.0]))
    noise = torch.Generator().manual_seed(seed)
    return weight, lambda: ((weight - 1 - torch.randn(1, generator=noise)) ** 2).sum()


def trained(seed, **options):
    weight, loss = noisy_quadratic(seed)
    optimize([weight], loss, options=TrainingOptions(steps=200, learning_rate=0.2, **options), show_progress=False)
    return weight.item()


def test_what_is_left_is_nearer_to_what_is_looked_for_than_a_last_step_is():
    averaged = torch.tensor([trained(seed) for seed in range(20)])
    last = torch.tensor([trained(seed, average=False) for seed in range(20)])
    assert (averaged - 1).square().mean() < 0.5 * (last - 1).square().mean()


def test_held_out_losses_are_of_the_average_and_steps_go_on_from_their_own_values():
    weight, loss = noisy_quadratic(0)
    own, seen, reported = [], [], []
    record = optimize(
        [weight],
        loss,
        held_out_loss=lambda: seen.append(weight.item()) or weight.item(),
        options=TrainingOptions(steps=8, learning_rate=0.2, eval_every=4),
        on_step=lambda step, _: own.append(weight.item()),
        on_held_out=lambda step, value: reported.append(weight.item()),
        show_progress=False,
    )
    plain_weight, plain_loss = noisy_quadratic(0)
    plain = []
    optimize(
        [plain_weight],
        plain_loss,
        options=TrainingOptions(steps=8, learning_rate=0.2, average=False),
        on_step=lambda step, _: plain.append(plain_weight.item()),
        show_progress=False,
    )
    assert own == plain
    average = 0.0
    for t, value in enumerate(own[:4], start=1):
        average += (ETA + 1) / (t + ETA) * (value - average)
    assert seen == reported == [value for _, value in record.held_out_loss]
    assert seen[0] == 3.0
    assert seen[1] == pytest.approx(average, rel=1e-5)
    assert weight.item() == seen[-1]


def test_the_best_values_are_those_of_the_best_average():
    weight = torch.nn.Parameter(torch.tensor([3.0]))
    losses = iter([5.0, 1.0, 4.0])
    seen = []

    def held_out():
        seen.append(weight.item())
        return next(losses)

    optimize(
        [weight],
        lambda: (weight**2).sum(),
        held_out_loss=held_out,
        options=TrainingOptions(steps=4, learning_rate=0.1, eval_every=2, keep="best"),
        show_progress=False,
    )
    assert weight.item() == seen[1]
