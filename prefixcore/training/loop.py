"""The training loop: AdamW on the virtual tokens, and nothing else."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from .best import Best
from .data import TokenizedExample, batches, make_batch, pad_id
from .evaluate import held_out_loss


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes:
        steps: optimizer steps.
        learning_rate: of AdamW, after the warm-up.
        batch_size: examples a step.
        warmup_steps: steps over which the learning rate rises from 0.
        schedule: "constant", or "linear" (falls to 0 at the last step).
        weight_decay: of AdamW.
        max_grad_norm: gradients are scaled down to this norm; None: never.
        seed: decides the order of the examples.
        eval_every: steps between two held-out losses; 0: at the start and the end only.
        keep: the values that are left when training ends: of the "last" step, or of the "best" held-out loss, the start
            included. A training that a signal ends leaves its last step's.
        early_stopping_patience: training ends after as many held-out losses in a row that are not below the least one
            before; None: never.

    Examples:
        >>> from prefixcore.training import TrainingOptions
        >>> options = TrainingOptions(steps=200, learning_rate=5e-3, schedule="linear")
        >>> options.batch_size, options.warmup_steps
        (8, 0)
    """

    steps: int = 100
    learning_rate: float = 2e-3
    batch_size: int = 8
    warmup_steps: int = 0
    schedule: str = "constant"
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    seed: int = 0
    eval_every: int = 0
    keep: str = "last"
    early_stopping_patience: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("warmup_steps", 0), ("eval_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0 or None, got {self.max_grad_norm}")
        if self.schedule not in ("constant", "linear"):
            raise ValueError(f"schedule must be 'constant' or 'linear', got {self.schedule!r}")
        if self.keep not in ("best", "last"):
            raise ValueError(f"keep must be 'best' or 'last', got {self.keep!r}")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ValueError(f"early_stopping_patience must be at least 1 or None, got {self.early_stopping_patience}")

    def lr_factor(self, step: int) -> float:
        """What the learning rate is multiplied by at `step` (0 is the first)."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "linear":
            return max(0.0, (self.steps - step) / max(1, self.steps - self.warmup_steps))
        return 1.0


@dataclass
class TrainingRecord:
    """What happened in a training run.

    Attributes:
        options: how it was trained.
        train_loss: `(step, loss)` of each step, from 1; nats per completion token.
        held_out_loss: `(step, loss)` where it was evaluated; step 0 is before training.
        step_seconds: seconds of each step, evaluation aside.
        interrupted: whether a signal stopped it before the last step.
        stopped_early: whether it ended because the held-out loss no longer fell.
        kept_step: the step whose values were left; 0: the start's.

    Examples:
        >>> from prefixcore.training import TrainingOptions, TrainingRecord
        >>> record = TrainingRecord(TrainingOptions(steps=2), train_loss=[(1, 2.0), (2, 1.5)])
        >>> record.steps_done, record.interrupted
        (2, False)
    """

    options: TrainingOptions
    train_loss: list[tuple[int, float]] = field(default_factory=list)
    held_out_loss: list[tuple[int, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    interrupted: bool = False
    stopped_early: bool = False
    kept_step: int = 0

    @property
    def steps_done(self) -> int:
        return len(self.train_loss)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C (or SIGTERM) into a request to stop: the context value says whether one came.

    A second signal acts as it would have without this, so that a hanging step can still be stopped.
    Outside the main thread, where Python cannot set handlers, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    stopped = threading.Event()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            # None: a handler set by C code, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def request(number: int, frame: object) -> None:
        stopped.set()
        restore()

    for number in previous:
        signal.signal(number, request)
    try:
        yield stopped.is_set
    finally:
        restore()


def train(
    handle: Any,
    tokenizer: Any,
    examples: Sequence[TokenizedExample],
    *,
    held_out: Sequence[TokenizedExample] = (),
    options: TrainingOptions | None = None,
    packed: bool | None = None,
    **progress: Any,
) -> TrainingRecord:
    """Train what `prefixcore.attach` put on a model.

    Args:
        handle: from `prefixcore.attach`, or `prefixcore.load(..., trainable=True)`.
        tokenizer: the model's; only its padding id is used.
        examples: what to learn, from `tokenize`.
        held_out: examples that are never trained on; only their loss is followed.
        options: how to train.
        packed: batches without padding, and logits for the completions alone: the same losses but for rounding, in
            less time. None: where `handle.can_pack`.
        progress: `show_progress`, `on_held_out` and `on_step`, as in `fit`.

    Returns:
        The record; `record.interrupted` is True when Ctrl-C or SIGTERM ended it early. The virtual tokens
        are then those of the last whole step, and can be saved.

    Examples:
        >>> from prefixcore.training import Example, TrainingOptions, tokenize, train
        >>> handle = prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4))
        >>> examples = tokenize(tokenizer, [Example("Peru ->", " Lima"), Example("Norway ->", " Oslo")])
        >>> train(handle, tokenizer, examples, options=TrainingOptions(steps=3)).steps_done
        3
    """
    return fit(
        handle.model,
        handle.parameters(),
        examples,
        held_out=held_out,
        pad_token_id=pad_id(tokenizer, handle.model),
        options=options,
        packed=handle.can_pack if packed is None else packed,
        **progress,
    )


def fit(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    examples: Sequence[TokenizedExample],
    *,
    held_out: Sequence[TokenizedExample] = (),
    pad_token_id: int = 0,
    options: TrainingOptions | None = None,
    packed: bool = False,
    show_progress: bool | None = None,
    on_held_out: Callable[[int, float], None] | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> TrainingRecord:
    """Train `parameters` of any model that returns a loss for `input_ids, attention_mask, labels`.

    Args:
        model: called in training mode as it was given (its mode is put back).
        parameters: those to train.
        examples, held_out: tokenised examples; see `train`.
        pad_token_id: fills short batch rows.
        options: how to train.
        packed: give the model packed batches (see `prefixcore.PackedCollator`) in place of padded ones.
        show_progress: a progress bar on standard error; None: only on a terminal.
        on_held_out: called with `(step, loss)` after each held-out loss.
        on_step: called after each step with `(step, {"loss": ..., "learning_rate": ...})`; its gradients are there.

    Raises:
        ValueError: nothing to train or to learn from, no held-out examples for an option that goes by them, or a loss
            that is not finite (the parameters are then those before that step).

    Examples:
        >>> from prefixcore.training import Example, TrainingOptions, fit, tokenize
        >>> examples = tokenize(tokenizer, [Example("Peru ->", " Lima"), Example("Norway ->", " Oslo")])
        >>> norms = [p for name, p in model.named_parameters() if "norm" in name]  # any parameters
        >>> fit(model, norms, examples, options=TrainingOptions(steps=2)).steps_done
        2
    """
    from tqdm.auto import tqdm

    options = options or TrainingOptions()
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter requires a gradient; load the adapter with trainable=True")
    if not examples:
        raise ValueError("no examples to train on")
    if not held_out and (options.keep == "best" or options.early_stopping_patience is not None):
        raise ValueError("keep='best' and early_stopping_patience need held-out examples")
    # Fused, as in transformers' Trainer: a prefix has two small parameters a layer, and a loop over them costs five
    # times as much.
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=options.weight_decay, fused=True)
    scheduler = LambdaLR(optimizer, options.lr_factor)
    record = TrainingRecord(options)
    source = batches(examples, options.batch_size, options.seed)
    device = trained[0].device
    best = Best(trained)

    def evaluate_held_out(step: int) -> None:
        if held_out:
            loss = held_out_loss(model, held_out, pad_token_id, packed=packed)
            record.held_out_loss.append((step, loss))
            best.see(step, loss, remember=options.keep == "best")
            if on_held_out is not None:
                on_held_out(step, loss)

    was_training = model.training
    disable_bar = None if show_progress is None else not show_progress
    try:
        with (
            stop_on_signal() as stopping,
            tqdm(total=options.steps, desc="training", unit="step", disable=disable_bar) as bar,
        ):
            evaluate_held_out(0)
            model.train()
            while record.steps_done < options.steps and not stopping():
                if best.has_not_fallen(options.early_stopping_patience):
                    record.stopped_early = True
                    break
                began = time.perf_counter()
                rate = float(scheduler.get_last_lr()[0])
                batch = make_batch(next(source), pad_token_id, packed=packed, device=device)
                loss = _step(model, batch, trained, optimizer, scheduler, options)
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
            if options.keep == "best" and best.values and not record.interrupted:
                record.kept_step = best.restore()
    finally:
        model.train(was_training)
    return record


def _step(
    model: nn.Module,
    batch: dict[str, Any],
    trained: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scheduler: LambdaLR,
    options: TrainingOptions,
) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss = model(**batch, use_cache=False).loss
    value = float(loss.detach())
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"the loss became {value}; try a lower learning rate than {options.learning_rate}")
    loss.backward()
    if options.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(trained, options.max_grad_norm)
    optimizer.step()
    scheduler.step()
    return value
