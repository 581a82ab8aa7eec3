"""Running a cell: attach, train, and answer what was held out."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import prefixcore
from prefixcore.training import Example, TrainingOptions, collate, fit, tokenize
from prefixcore.training.data import IGNORED, pad_id

from .method import Attached, Method
from .records import Cell, Record
from .tasks import END, Task

NO_LOSS = 99.0
"""Stands for the loss of a training that failed: JSON has no infinity."""

ENDLESS = 1_000_000
"""Steps of a training that ends by its seconds."""

AT_ONCE = 24
"""Examples that are answered in one forward."""


@dataclass(frozen=True)
class Budget:
    """How long a training is: the same for every method.

    Attributes:
        steps: of the training.
        batch_size: examples a step.
        seconds: CPU seconds of one thread for all that comes before the answers, the making of a start included, in
            place of `steps`; None: it is one of steps.
    """

    steps: int = 60
    batch_size: int = 8
    seconds: float | None = None


def run(cell: Cell, method: Method, task: Task, model: Any, tokenizer: Any, budget: Budget | None = None) -> Record:
    """The record of a cell; the model is as before."""
    budget = budget or Budget()
    if method.attach is None:
        return without_training(cell, method, task, model, tokenizer)
    began = time.process_time()
    with method.attach(model, tokenizer, task, cell.seed) as attached:
        try:
            steps, seconds = train(attached, method, cell, task, tokenizer, budget, began)
        except ValueError as error:  # a loss that is not finite, at a learning rate that the method cannot take
            return failed(cell, attached, task, str(error), setting(model))
        validation, validation_loss, _ = answers(attached.model, tokenizer, task.validation)
        _, loss, right = answers(attached.model, tokenizer, task.test)
        return Record(
            cell.task,
            cell.method,
            cell.seed,
            cell.rate,
            steps=steps,
            batch_size=budget.batch_size,
            numbers=attached.numbers,
            num_virtual_tokens=attached.num_virtual_tokens,
            validation=round(validation, 4),
            validation_loss=round(validation_loss, 4),
            right=right,
            loss=round(loss, 4),
            cpu_seconds_a_step=round(seconds, 4),
            text="",
            setting=setting(model)
            if budget.seconds is None
            else {**setting(model), "seconds": f"{budget.seconds:.1f}"},
        )


def failed(cell: Cell, attached: Attached, task: Task, why: str, setting: dict[str, str]) -> Record:
    """The record of a training that came to nothing: no answer is right."""
    return Record(
        cell.task,
        cell.method,
        cell.seed,
        cell.rate,
        steps=0,
        batch_size=0,
        numbers=attached.numbers,
        num_virtual_tokens=attached.num_virtual_tokens,
        validation=0.0,
        validation_loss=NO_LOSS,
        right="0" * len(task.test),
        loss=NO_LOSS,
        cpu_seconds_a_step=None,
        text=why,
        setting=setting,
    )


def train(
    attached: Attached, method: Method, cell: Cell, task: Task, tokenizer: Any, budget: Budget, began: float = 0.0
) -> tuple[int, float]:
    """Train, and return how many steps that were, and the CPU seconds of one.

    Args:
        attached: what to train.
        method, cell: whose options and learning rate are taken.
        task: what is learned.
        tokenizer: reads it.
        budget: when the training ends.
        began: where the clock of `time.process_time` stood when the budget of seconds began.
    """
    steps = budget.steps if budget.seconds is None else ENDLESS
    options = TrainingOptions(steps, cell.rate, budget.batch_size, seed=cell.seed, **method.options)
    is_up = False

    def look_at_the_clock(step: int, _: Any) -> None:
        nonlocal is_up
        if budget.seconds is not None and time.process_time() - began >= budget.seconds:
            is_up = True
            signal.raise_signal(signal.SIGINT)  # which ends a training and leaves the average of its steps

    first_step = time.process_time()
    record = fit(
        attached.model,
        attached.parameters,
        tokenize(tokenizer, task.training, end=END),
        pad_token_id=pad_id(tokenizer),
        options=options,
        packed=attached.packed,
        show_progress=False,
        on_step=look_at_the_clock,
    )
    if record.interrupted and not is_up:
        raise KeyboardInterrupt
    return record.steps_done, (time.process_time() - first_step) / record.steps_done


def seconds_of(method: Method, task: Task, model: Any, tokenizer: Any, budget: Budget | None = None) -> float:
    """The CPU seconds that a method takes for a budget of steps, with the making of its start: the yardstick."""
    assert method.attach is not None
    began = time.process_time()
    with method.attach(model, tokenizer, task, 0) as attached:
        train(attached, method, Cell(task.name, method.name, 0, method.rates[0]), task, tokenizer, budget or Budget())
    return time.process_time() - began


def without_training(cell: Cell, method: Method, task: Task, model: Any, tokenizer: Any) -> Record:
    """The best of a method's texts by the validation side, and how it does on the test side.

    A text is given as a prefix that is not trained, which answers as the model does with the text before the question.
    """
    assert method.texts is not None
    found = []
    for text in method.texts(task, cell.seed):
        validation, loss, _ = with_text(model, tokenizer, task.validation, text)
        found.append((validation, -loss, text))
    validation, negative, text = max(found)
    _, loss, right = with_text(model, tokenizer, task.test, text)
    return Record(
        cell.task,
        cell.method,
        cell.seed,
        0.0,
        steps=0,
        batch_size=0,
        numbers=0,
        num_virtual_tokens=len(tokenizer(text)["input_ids"]) if text else 0,
        validation=round(validation, 4),
        validation_loss=round(-negative, 4),
        right=right,
        loss=round(loss, 4),
        cpu_seconds_a_step=None,
        text=text if task.may_be_quoted else "",
        setting=setting(model),
    )


def with_text(model: Any, tokenizer: Any, examples: Sequence[Example], text: str) -> tuple[float, float, str]:
    """What `answers` says of the model with `text` before each question."""
    if not text:
        return answers(model, tokenizer, examples)
    with prefixcore.attach(model, prefixcore.PrefixTuningConfig(init_text=text), tokenizer=tokenizer):
        return answers(model, tokenizer, examples)


@torch.no_grad()
def answers(model: Any, tokenizer: Any, examples: Sequence[Example], end: str = END) -> tuple[float, float, str]:
    """Share of right answers, loss, and "1" or "0" for each example.

    An answer is right if each of its tokens is the model's first choice after those before: what greedy generation
    gives, without generating.
    """
    right, total, tokens = "", 0.0, 0
    was_training = model.training
    model.eval()
    found = tokenize(tokenizer, examples, end=end)
    for start in range(0, len(found), AT_ONCE):
        batch = collate(found[start : start + AT_ONCE], pad_id(tokenizer))
        labels = batch.pop("labels")[:, 1:]
        length = batch["input_ids"].shape[1]
        # PEFT's prompt tuning gives logits for its virtual tokens, too.
        logits = model(**batch, use_cache=False).logits[:, -length:-1]
        counts = labels != IGNORED
        misses = (logits.argmax(-1) != labels) & counts
        right += "".join("01"[not any(row)] for row in misses.tolist())
        total += float(nn.functional.cross_entropy(logits[counts].float(), labels[counts], reduction="sum"))
        tokens += int(counts.sum())
    model.train(was_training)
    return right.count("1") / len(right), total / tokens, right


def setting(model: Any) -> dict[str, str]:
    """What a result depends on beside the cell."""
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "model": "SmolLM2-135M-Instruct" if model.config.hidden_size == 576 else type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        **versions,
    }
