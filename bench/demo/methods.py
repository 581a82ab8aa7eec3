"""The three ways of training that the demo compares, each from the same model, data and seed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from bench.models import twin
from prefixcore.training import Evaluation, TrainingOptions, TrainingRecord, evaluate, fit, tokenize
from prefixcore.training.data import pad_id

from .prompts import INSTRUCTION, INSTRUCTION_WITH_EXAMPLES
from .task import END, Task

# Steps and learning rates come from an earlier trial of this task with a split of its own; nothing is chosen by the
# countries that are held out here.
SOFT_PROMPT = TrainingOptions(steps=100, learning_rate=5e-3, batch_size=8, eval_every=25)
PREFIX = TrainingOptions(steps=75, learning_rate=2e-3, batch_size=8, eval_every=25)

BARE_NAME = "bare model"
PEFT_NAME = "PEFT prefix tuning, its defaults"
SOFT_PROMPT_NAME = "prefixcore soft prompt"
PREFIX_NAME = "prefixcore prefix"


class Interrupted(Exception):
    """Training was stopped by hand."""


@dataclass(frozen=True)
class Outcome:
    """What one way of solving the task came to on the held-out countries."""

    name: str
    evaluation: Evaluation
    trainable: int = 0
    record: TrainingRecord | None = None


def train_peft(model: Any, tokenizer: Any, task: Task, seed: int) -> Outcome:
    """PEFT's prefix as a newcomer gets it: its start, its last step, answers alone; P as of our prefix."""
    options = replace(PREFIX, average=False, prompt_loss_weight=0.0)
    wrapped = peft_model(model, tokenizer, seed)
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    return _train(PEFT_NAME, wrapped, wrapped.parameters(), trainable, tokenizer, task, options, seed)


def peft_model(model: Any, tokenizer: Any, seed: int) -> Any:
    """A PEFT model over the same weights, its prefix at PEFT's default start (unit normal)."""
    from peft import PrefixTuningConfig, get_peft_model

    length = len(tokenizer(INSTRUCTION_WITH_EXAMPLES)["input_ids"])
    torch.manual_seed(seed)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
    return get_peft_model(twin(model), config)  # type: ignore[arg-type]


def soft_prompt_config(seed: int) -> Any:
    """Our soft prompt: it starts from the instruction's embeddings."""
    import prefixcore

    return prefixcore.PromptTuningConfig(init="text", init_text=INSTRUCTION, seed=seed)


def prefix_config(seed: int) -> Any:
    """Our prefix: it starts from the frozen model's keys and values of an instruction and two examples."""
    import prefixcore

    return prefixcore.PrefixTuningConfig(init="text", init_text=INSTRUCTION_WITH_EXAMPLES, seed=seed)


def train_soft_prompt(model: Any, tokenizer: Any, task: Task, seed: int, save_to: Path | None) -> Outcome:
    """Train our soft prompt; the model is as before when this returns."""
    config = soft_prompt_config(seed)
    return _train_ours(SOFT_PROMPT_NAME, model, tokenizer, task, config, SOFT_PROMPT, seed, save_to)


def train_prefix(model: Any, tokenizer: Any, task: Task, seed: int, save_to: Path | None) -> Outcome:
    """Train our prefix; the model is as before when this returns."""
    config = prefix_config(seed)
    return _train_ours(PREFIX_NAME, model, tokenizer, task, config, PREFIX, seed, save_to)


def _train_ours(
    name: str,
    model: Any,
    tokenizer: Any,
    task: Task,
    config: Any,
    options: TrainingOptions,
    seed: int,
    save_to: Path | None,
) -> Outcome:
    import prefixcore

    with prefixcore.attach(model, config, tokenizer=tokenizer) as handle:
        outcome = _train(
            name, model, handle.parameters(), handle.num_trainable, tokenizer, task, options, seed, packed=True
        )
        if save_to is not None:
            handle.save(save_to)
    return outcome


def _train(
    name: str,
    model: nn.Module,
    parameters: Any,
    trainable: int,
    tokenizer: Any,
    task: Task,
    options: TrainingOptions,
    seed: int,
    packed: bool = False,
) -> Outcome:
    held_out = tokenize(tokenizer, task.held_out, end=END)
    record = fit(
        model,
        parameters,
        tokenize(tokenizer, task.training, end=END),
        held_out=held_out,
        pad_token_id=pad_id(tokenizer),
        options=replace(options, seed=seed),
        on_held_out=say_loss,
        packed=packed,
    )
    if record.interrupted:
        raise Interrupted
    return Outcome(name, evaluate(model, tokenizer, task.held_out, held_out, end=END), trainable, record)


def say_loss(step: int, loss: float) -> None:
    """A line of progress, above the progress bar where there is one."""
    tqdm.write(f"    step {step:3d}: held-out loss {loss:.3f}")
    sys.stdout.flush()


def run_all(
    model: Any,
    tokenizer: Any,
    task: Task,
    seed: int,
    save_to: Path | None,
    announce: Callable[[str], None],
) -> Sequence[Outcome]:
    """PEFT, our soft prompt and our prefix, one after the other."""
    announce(f"seed {seed}: {PEFT_NAME}, {PREFIX.steps} steps")
    peft = train_peft(model, tokenizer, task, seed)
    announce(f"seed {seed}: {SOFT_PROMPT_NAME}, {SOFT_PROMPT.steps} steps")
    prompt = train_soft_prompt(model, tokenizer, task, seed, save_to and save_to / "soft-prompt")
    announce(f"seed {seed}: {PREFIX_NAME}, {PREFIX.steps} steps")
    prefix = train_prefix(model, tokenizer, task, seed, save_to and save_to / "prefix")
    return peft, prompt, prefix
