"""Learning the teacher's probabilities: the loss of a batch, and the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..training import TrainingOptions, TrainingRecord, optimize
from .divergence import divergence, tops
from .front import Reader
from .options import DistillOptions
from .running import answer_logits, in_batches
from .targets import Target

EVALUATIONS, PATIENCE = 20, 4
"""How often the validation loss is measured on the way, and after how many that are not below the least one it ends."""


def learn(
    handle: Any,
    targets: Sequence[Target],
    validation: Sequence[Target],
    options: DistillOptions,
    padding: int,
    *,
    show_progress: bool | None = None,
    on_held_out: Callable[[int, float], None] | None = None,
) -> TrainingRecord:
    """Trains what is attached to give the teacher's probabilities; the values at the least validation loss stay.

    The loss is KL(teacher || student) in nats, the mean over the tokens of the targets' answers. The start stays where
    the validation prompts cannot tell those values from it: a fitted start is often as near as training comes.
    """
    model = handle.model
    reader = Reader(model, [], packed=handle.can_pack)
    batches = orders(len(targets), options.batch_size, options.seed)

    def next_loss() -> Tensor:
        return divergences(reader, [targets[i] for i in next(batches)], padding).mean()

    evaluations: list[Tensor] = []  # the divergence of each validation prompt

    def validation_loss() -> float:
        model.eval()
        try:
            evaluations.append(divergence_of_each(reader, validation, padding))
            return float(evaluations[-1].sum()) / sum(len(target.answer) for target in validation)
        finally:
            model.train()

    parameters = list(handle.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    was_training = model.training
    model.train()
    try:
        record = optimize(
            parameters,
            next_loss,
            held_out_loss=validation_loss,
            options=TrainingOptions(
                steps=options.steps,
                learning_rate=options.learning_rate,
                batch_size=options.batch_size,
                warmup_steps=options.steps // 10,
                schedule="linear",
                seed=options.seed,
                eval_every=max(1, options.steps // EVALUATIONS),
                average=False,  # the rate falls to nothing instead, which comes to the same
                keep="best",
                early_stopping_patience=PATIENCE,
            ),
            show_progress=show_progress,
            on_held_out=on_held_out,
        )
        steps = [step for step, _ in record.held_out_loss]
        if not record.interrupted and not is_less(evaluations[steps.index(record.kept_step)], evaluations[0]):
            record.kept_step = 0
            with torch.no_grad():
                for parameter, value in zip(parameters, start, strict=True):
                    parameter.copy_(value)
        return record
    finally:
        model.train(was_training)


def is_less(after: Tensor, before: Tensor) -> bool:
    """Whether the mean of paired values has fallen by more than its standard error."""
    fall = before - after
    error = fall.std() / len(fall) ** 0.5 if len(fall) > 1 else torch.zeros(())
    return bool(fall.mean() > error)


def divergences(reader: Reader, targets: Sequence[Target], padding: int) -> Tensor:
    """KL(teacher || student) at each token of the teacher's answers."""
    logits = answer_logits(reader, [(target.asked.alone, target.answer) for target in targets], padding)
    return divergence(logits, *tops(targets, logits.device))


@torch.no_grad()
def divergence_of_each(reader: Reader, targets: Sequence[Target], padding: int) -> Tensor:
    """The sum of `divergences` over the tokens of each target, float64."""
    sums = torch.zeros(len(targets), dtype=torch.float64)
    vocabulary = reader.model.config.get_text_config().vocab_size
    for indices in in_batches([len(target.answer) for target in targets], vocabulary, most=16):
        values = divergences(reader, [targets[i] for i in indices], padding).double().cpu()
        for i, part in zip(indices, values.split([len(targets[i].answer) for i in indices]), strict=True):
            sums[i] = part.sum()
    return sums


def orders(count: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Indices of one batch after another, without end: a new order each epoch, the short last batch kept."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, batch_size):
            yield order[start : start + batch_size]
