"""Prefixes and soft prompts of ours: as `prefixcore train` makes them, and with one thing otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

import prefixcore
from prefixcore.training import best_start, starting_text, tokenize, train_layers
from prefixcore.training.options import PROMPT_LOSS_WEIGHT
from prefixcore.training.starting import DRAWS, NUM_VIRTUAL_TOKENS, in_turns

from .method import Attached, Method
from .outside import FeatureMapBesidePrefix, Gate, outside
from .rates import scaled_rates
from .tasks import END, Task
from .texts import preface, shown

LEVER_TOKENS = 32
"""At how many tokens of examples levers are compared with each other: half of what a start has."""

FROM_A_TEXT = "ours, from a text"
"""The kind of those that a person has started from the same text as PEFT's; else they are "ours"."""

AS_IT_IS: Mapping[str, Any] = {
    "most": NUM_VIRTUAL_TOKENS,
    "average": True,
    "prompt_loss_weight": PROMPT_LOSS_WEIGHT,
}
"""What `prefixcore train` does with no option set."""

ANSWERS_ALONE: Mapping[str, Any] = {**AS_IT_IS, "prompt_loss_weight": 0.0}
"""The same, with nothing learnt of what prompts say."""

PREFIX, PROMPT, P_TUNING = prefixcore.PrefixTuningConfig, prefixcore.PromptTuningConfig, prefixcore.PTuningConfig
KV, EMBEDDING, BASIS = (2e-3, 5e-3), (5e-3, 2e-2), (5e-3, 2e-2)
"""Learning rates that are tried for keys and values, for embeddings, and for coefficients of a random basis."""

MATRIX = (5e-5, 2e-4, 1e-3)
"""Learning rates that are tried for matrices on queries: 64 products add up in each number that they give."""


def ours(
    name: str,
    title: str,
    config: type,
    rates: tuple[float, ...],
    *,
    start: str = "examples",
    tokens: int | None = None,
    most: int = LEVER_TOKENS,
    average: bool = False,
    prompt_loss_weight: float = 0.0,
    kind: str = "ours",
    training: Mapping[str, Any] | None = None,
    around: Callable[[Any], AbstractContextManager[Sequence[torch.nn.Parameter]]] | None = None,
    **options: Any,
) -> Method:
    """A prefix or soft prompt of ours.

    Args:
        name, title: of the method.
        config: the class of the configuration.
        rates: tried learning rates.
        start: "examples" (the default of `prefixcore train`: the best of a few draws), "one draw" (of examples),
            "instruction" (a person's text with two examples), "sentence" (any text with two examples),
            "labels", "vocab", "random" or "zero".
        tokens: P; None: what the start has, or 20.
        most: how many tokens whole examples may fill.
        average: whether what is trained is the average of its steps, as it is by default; levers are compared without.
        prompt_loss_weight: of the training; levers are compared without here too.
        kind: of the method.
        training: further options of the training.
        around: of the handle: a block in which something is changed, and what is trained along.
        options: of the configuration; a function is asked for its value with the model's number of layers.
    """

    @contextmanager
    def attach(model: Any, tokenizer: Any, task: Task, seed: int) -> Iterator[Attached]:
        given: dict[str, Any] = {"seed": seed, "num_virtual_tokens": tokens, **resolved(options, model)}
        if start == "examples":
            given["init_text"] = text_of_examples(model, tokenizer, task, seed, tokens, most)
        elif start == "one draw":
            given["init_text"] = starting_text(task.training, tokenizer, tokens, end=END, seed=seed, most=most)
        elif start == "instruction":
            given["init_text"] = shown(task)
        elif start == "sentence":
            given["init_text"] = preface(task)
        elif start == "labels":
            given["init_text"] = " ".join(task.labels) + END
        else:
            given["init"], given["num_virtual_tokens"] = start, tokens or 20
        with (
            prefixcore.attach(model, config(**given), tokenizer=tokenizer) as handle,
            around(handle) if around is not None else nullcontext([]) as further,
        ):
            parameters = [each for each in (*handle.parameters(), *further) if each.numel() and each.requires_grad]
            yield Attached(handle.model, parameters, handle.can_pack, handle.num_virtual_tokens)

    options_of_training = {"average": average, "prompt_loss_weight": prompt_loss_weight, **(training or {})}
    return Method(name, title, kind, attach, rates, options_of_training)


def text_of_examples(model: Any, tokenizer: Any, task: Task, seed: int, tokens: int | None, most: int) -> str:
    """What `prefixcore train` starts from where no start is given."""
    texts = [
        starting_text(task.training, tokenizer, tokens, end=END, seed=seed + draw, most=most) for draw in range(DRAWS)
    ]
    outside = [each for each in in_turns(task.training, 0) if not any(each.prompt in text for text in texts)]
    configs = [PREFIX(init_text=text) for text in texts]
    return str(best_start(model, tokenizer, configs, tokenize(tokenizer, outside, end=END)).init_text)


def resolved(options: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Options in which functions are their values for this model."""
    layers = model.config.num_hidden_layers
    return {name: value(layers) if callable(value) else value for name, value in options.items()}


LINEAR = {"warmup_steps": 10, "schedule": "linear"}
FAST_GATE = 25
"""How many times the learning rate of keys and values that of a gate is, which has one number a head to move."""


@contextmanager
def times(handle: Any, factor: float) -> Iterator[Sequence[torch.nn.Parameter]]:
    """A block in which the prefix has started from keys and values that are so many times as large."""
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.mul_(factor)
    yield []


@contextmanager
def as_large(handle: Any) -> Iterator[Sequence[torch.nn.Parameter]]:
    """A block in which the prefix has started from random numbers, in each layer as large as those of its text."""
    generator = torch.Generator().manual_seed(handle.config.seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(0, float(parameter.square().mean().sqrt()), generator=generator)
    yield []


def gated(name: str, title: str, rate: float, **options: Any) -> Method:
    """A prefix behind a gate that begins at zero; the text stands where it would without."""
    around = partial(outside, make=partial(Gate, rate=rate))
    return ours(name, title, PREFIX, KV, around=around, position_offset=False, **options)


def beside(name: str, title: str, rate: float) -> Method:
    """The prefix, and a map of the queries' features beside the softmax."""
    return ours(name, title, PREFIX, KV, around=partial(outside, make=partial(FeatureMapBesidePrefix, rate=rate)))


def from_layer(name: str, part: str, quarters: int) -> Method:
    """The prefix trained from so many quarters of the layers up; in the layers below it keeps its start."""

    @contextmanager
    def upper_layers(handle: Any) -> Iterator[Sequence[torch.nn.Parameter]]:
        layers = handle.model.config.num_hidden_layers
        train_layers(handle, range(layers * quarters // 4, layers))
        yield []

    title = f"trained from {part} of the layers up, the others keep their start"
    return ours(name, title, PREFIX, KV, around=upper_layers)


def rates_apart(name: str, title: str, **factors: float) -> Method:
    """The prefix with so many times the learning rate for its keys or its values."""
    return ours(name, title, PREFIX, KV, around=partial(scaled_rates, **factors))
