"""The optimisation: AdamW on some parameters, whatever a batch is and whatever its loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from .averaging import Average
from .best import Best
from .options import TrainingOptions, TrainingRecord
from .stopping import stop_on_signal


def optimize(
    parameters: Iterable[nn.Parameter],
    next_loss: Callable[[], Tensor | tuple[Tensor, Tensor]],
    *,
    held_out_loss: Callable[[], float] | None = None,
    options: TrainingOptions | None = None,
    show_progress: bool | None = None,
    on_held_out: Callable[[int, float], None] | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> TrainingRecord:
    """Minimise a loss over `parameters`.

    AdamW with the schedule of the options, the average over its steps, held-out losses and what goes by them, a
    progress bar, and a stop after the step that runs when Ctrl-C or SIGTERM comes. What a batch is, `next_loss` knows.

    Args:
        parameters: those to train; what needs no gradient is left out.
        next_loss: the loss of the next step, a scalar with a graph; called once a step. Or that and another scalar,
            which is recorded in its place.
        held_out_loss: the loss of what is never trained on; None: there is none.
        options: how to train; `batch_size` and `seed` are for whoever makes the batches.
        show_progress: a progress bar on standard error; None: only on a terminal.
        on_held_out: called with `(step, loss)` after each held-out loss; the parameters are those that it is of.
        on_step: called after each step with `(step, {"loss": ..., "learning_rate": ...})`; its values (not their
            average) and gradients are there.

    Raises:
        ValueError: nothing to train, no held-out loss for an option that goes by it, or a loss that is not finite (the
            parameters are then those before that step).

    Examples:
        >>> from prefixcore.training import TrainingOptions, optimize
        >>> weight = torch.nn.Parameter(torch.tensor(3.0))
        >>> record = optimize([weight], lambda: weight**2, options=TrainingOptions(steps=20, learning_rate=0.2))
        >>> record.steps_done, abs(weight.item()) < 1
        (20, True)
    """
    from tqdm.auto import tqdm

    options = options or TrainingOptions()
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter requires a gradient; load the adapter with trainable=True")
    if held_out_loss is None and (options.keep == "best" or options.early_stopping_patience is not None):
        raise ValueError("keep='best' and early_stopping_patience need held-out examples")
    # Fused, as in transformers' Trainer: a prefix has two small parameters a layer, and a loop over them costs five
    # times as much.
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True)
    scheduler = LambdaLR(optimizer, options.lr_factor)
    record = TrainingRecord(options)
    best = Best(trained)
    average = Average(trained) if options.average else None

    def evaluate_held_out(step: int) -> None:
        if held_out_loss is None:
            return
        with average.in_place() if average is not None else nullcontext():
            loss = held_out_loss()
            record.held_out_loss.append((step, loss))
            best.see(step, loss, remember=options.keep == "best")
            if on_held_out is not None:
                on_held_out(step, loss)

    disable_bar = None if show_progress is None else not show_progress
    with (
        stop_on_signal() as stopping,
        tqdm(total=options.steps, desc="training", unit="step", disable=disable_bar) as bar,
    ):
        evaluate_held_out(0)
        while record.steps_done < options.steps and not stopping():
            if best.has_not_fallen(options.early_stopping_patience):
                record.stopped_early = True
                break
            began = time.perf_counter()
            rate = float(scheduler.get_last_lr()[0])
            loss = _step(next_loss, trained, optimizer, scheduler, options)
            if average is not None:
                average.update()
            record.step_seconds.append(time.perf_counter() - began)
            record.train_loss.append((record.steps_done + 1, loss))
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            step = record.steps_done
            if on_step is not None:
                on_step(step, {"loss": loss, "learning_rate": rate})
            if options.eval_every and step % options.eval_every == 0 and step < options.steps:
                evaluate_held_out(step)
        record.interrupted = record.steps_done < options.steps and not record.stopped_early
        if not record.interrupted and not record.stopped_early:
            evaluate_held_out(record.steps_done)
        record.kept_step = record.steps_done
        if average is not None:
            average.put()
        if options.keep == "best" and best.values and not record.interrupted:
            record.kept_step = best.restore()
        record.asked_to_stop = stopping()
    return record


def _step(
    next_loss: Callable[[], Tensor | tuple[Tensor, Tensor]],
    trained: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scheduler: LambdaLR,
    options: TrainingOptions,
) -> float:
    optimizer.zero_grad(set_to_none=True)
    found = next_loss()
    loss, recorded = found if isinstance(found, tuple) else (found, found)
    value = float(loss.detach())
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"the loss became {value}; try a lower learning rate than {options.learning_rate}")
    loss.backward()
    if options.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(trained, options.max_grad_norm)
    optimizer.step()
    scheduler.step()
    return float(recorded.detach())
