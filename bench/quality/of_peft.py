"""PEFT's methods, at their defaults and as a person who knows them would start them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bench.models import twin

from .method import Attached, Method
from .tasks import Task
from .texts import shown


def of_peft(
    name: str,
    title: str,
    rates: tuple[float, ...],
    make: Callable[..., Any],
    kind: str = "PEFT",
    *,
    average: bool = False,
    prompt_loss_weight: float = 0.0,
) -> Method:
    """A method of PEFT's: `make(model, tokenizer, task)` wraps a model of the same weights.

    Its own examples train it with transformers' Trainer, on labels of the answers, which keeps the last step's values;
    `average`: it gets the average of its steps, and by `prompt_loss_weight` the loss of prompts, as ours does.
    """

    @contextmanager
    def attach(model: Any, tokenizer: Any, task: Task, seed: int) -> Iterator[Attached]:
        torch.manual_seed(seed)
        wrapped = make(twin(model), tokenizer, task)
        parameters = [each for each in wrapped.parameters() if each.requires_grad]
        config = next(iter(wrapped.peft_config.values()))
        yield Attached(wrapped, parameters, False, getattr(config, "num_virtual_tokens", None) or 0)

    return Method(name, title, kind, attach, rates, {"average": average, "prompt_loss_weight": prompt_loss_weight})


def default(config: str, **options: Any) -> Callable[..., Any]:
    def make(model: Any, tokenizer: Any, task: Task) -> Any:
        import peft

        return peft.get_peft_model(model, getattr(peft, config)(task_type="CAUSAL_LM", **options))

    return make


def peft_prefix_from_text(model: Any, tokenizer: Any, task: Task) -> Any:
    """PEFT's prefix, started by its own helper from the keys and values of the instruction and two examples."""
    import peft
    from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text

    text = shown(task)
    tokens = len(tokenizer(text)["input_ids"])
    wrapped = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens))
    initialize_kv_prefix_from_text(wrapped, tokenizer, text=text, use_chat_template=False)
    return wrapped


def peft_prompt_from_text(model: Any, tokenizer: Any, task: Task) -> Any:
    """PEFT's prompt tuning, started from the embeddings of the instruction and two examples."""
    import peft
    from peft import PromptTuningInit
    from peft.tuners.prompt_tuning import PromptEmbedding

    text = shown(task)
    ids = tokenizer(text)["input_ids"]
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=len(ids), prompt_tuning_init=PromptTuningInit.RANDOM
    )
    wrapped = peft.get_peft_model(model, config)
    encoder = wrapped.prompt_encoder["default"]
    assert isinstance(encoder, PromptEmbedding)
    with torch.no_grad():  # what its TEXT start does with a tokenizer that it can load by a name
        encoder.embedding.weight.copy_(model.get_input_embeddings()(torch.tensor(ids)))
    return wrapped
