"""Seconds a step: the bare frozen model, PEFT and prefixcore, measured in turn in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import models
from bench.reference.bare_model import bare_step
from prefixcore.training import TokenizedExample, TrainingOptions, collate, tokenize
from prefixcore.training.batch import Batch, call_model
from prefixcore.training.data import pad_id
from prefixcore.training.prompt_loss import PromptsToo, loss_with_prompts

from . import methods
from .methods import BARE_NAME, PEFT_NAME, PREFIX_NAME, SOFT_PROMPT_NAME
from .task import END, Task

Step = Callable[[], None]


@dataclass(frozen=True)
class Timing:
    """Median seconds a step by the method's name, and what it was measured at."""

    seconds: dict[str, float]
    batch_size: int
    length: int
    rounds: int
    threads: int


def interleave(steps: Mapping[str, Step], *, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Run every step once a round, each round starting one further along, and return the seconds of each.

    Taking turns means that whatever else the machine does falls on all of them alike.
    """
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            began = time.perf_counter()
            steps[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def measure(model: Any, tokenizer: Any, task: Task, *, rounds: int = 12, batch_size: int = 8) -> Timing:
    """Time whole training steps on one batch of the task: forward, backward and AdamW.

    The bare model's step is a forward and the gradient of its input embeddings, without any virtual token. Ours are
    given the packed batch and the loss, that of prompts too, that they are trained with. All four models share one set
    of frozen weights.
    """
    import prefixcore

    examples = tokenize(tokenizer, task.training[:batch_size], end=END)
    batch = collate(examples, pad_id(tokenizer))
    with ExitStack() as stack:
        steps: dict[str, Step] = {BARE_NAME: bare_step(models.twin(model).requires_grad_(False).train(), batch)}
        peft = methods.peft_model(model, tokenizer, seed=0)
        peft.train()
        steps[PEFT_NAME] = training_step(
            [p for p in peft.parameters() if p.requires_grad], lambda: peft(use_cache=False, **batch).loss
        )
        for name, config in (
            (PREFIX_NAME, methods.prefix_config(0)),
            (SOFT_PROMPT_NAME, methods.soft_prompt_config(0)),
        ):
            twin: Any = models.twin(model)
            handle = stack.enter_context(prefixcore.attach(twin, config, tokenizer=tokenizer))
            steps[name] = training_step(list(handle.parameters()), our_loss(twin.train(), examples))
        seconds = interleave(steps, rounds=rounds)
    return Timing(
        {name: statistics.median(values) for name, values in seconds.items()},
        batch_size=batch_size,
        length=batch["input_ids"].shape[1],
        rounds=rounds,
        threads=torch.get_num_threads(),
    )


def our_loss(model: Any, examples: Sequence[TokenizedExample]) -> Callable[[], Tensor]:
    """The loss of examples as `fit` makes it by default."""
    learnt = PromptsToo(seed=0)(examples)
    batch = Batch.of(learnt.examples, 0, packed=True, device=torch.device("cpu"))
    weight = TrainingOptions().prompt_loss_weight
    return lambda: loss_with_prompts(model, batch, learnt.is_answer, weight, call_model)[0]


def training_step(parameters: Sequence[torch.nn.Parameter], loss: Callable[[], Tensor]) -> Step:
    """A whole training step: forward, backward and AdamW on `parameters`."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step
