"""The training loop: examples in batches, and AdamW on the virtual tokens, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..hf.shared_texts import sharing_width as width_of
from .activations import cache_activations
from .batch import Batch, Call, call_model, loss_of
from .causal import TO_LEARN, check_causal
from .data import TokenizedExample, batches, pad_id
from .evaluate import held_out_loss
from .optimization import optimize
from .options import TrainingOptions, TrainingRecord
from .prompt_loss import PromptsToo, loss_with_prompts


def train(
    handle: Any,
    tokenizer: Any,
    examples: Sequence[TokenizedExample],
    *,
    held_out: Sequence[TokenizedExample] = (),
    options: TrainingOptions | None = None,
    packed: bool | None = None,
    activations_dir: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    **progress: Any,
) -> TrainingRecord:
    """Train what `prefixcore.attach` put on a model.

    Args:
        handle: from `prefixcore.attach`, or `prefixcore.load(..., trainable=True)`.
        tokenizer: the model's; only its padding id is used.
        examples: what to learn, from `tokenize`.
        held_out: examples that are never trained on; only their loss is followed.
        options: how to train.
        packed: batches without padding, and logits of what is learnt alone: the same losses but for rounding, in
            less time. None: where `handle.can_pack`.
        activations_dir: where `options.cache_activations="disk"` keeps them for other trainings too; None: in a
            temporary folder.
        say: told how much `options.cache_activations` takes, before it is taken.
        progress: `show_progress`, `on_held_out` and `on_step`, as in `fit`.

    Returns:
        The record; `record.interrupted` is True when Ctrl-C or SIGTERM ended it early. The virtual tokens
        are then those after the last whole step (their average, with `options.average`), and can be saved.

    Raises:
        ValueError, NotImplementedError: as of `fit`.
        CacheError: `options.cache_activations`, and no layer lies below the trained prefix, or the model cannot be
            cut in two.

    Examples:
        >>> from prefixcore.training import Example, TrainingOptions, tokenize, train
        >>> handle = prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4))
        >>> examples = tokenize(tokenizer, [Example("Peru ->", " Lima"), Example("Norway ->", " Oslo")])
        >>> train(handle, tokenizer, examples, options=TrainingOptions(steps=3)).steps_done
        3
    """
    options = options or TrainingOptions()
    check_causal(handle.model, TO_LEARN)
    packed = handle.can_pack if packed is None else packed
    with ExitStack() as stack:
        call: Call = call_model
        if options.cache_activations is not None:
            call = stack.enter_context(
                cache_activations(
                    handle,
                    tokenizer,
                    [*examples, *held_out],
                    options.cache_activations,
                    dtype=getattr(torch, options.activation_dtype) if options.activation_dtype else None,
                    folder=activations_dir,
                    packed=packed,
                    say=say,
                )
            )
        return fit(
            handle.model,
            handle.parameters(),
            examples,
            held_out=held_out,
            pad_token_id=pad_id(tokenizer, handle.model),
            options=options,
            packed=packed,
            sharing_width=width_of(handle) if packed else 0,
            call=call,
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
    sharing_width: int = 0,
    call: Call = call_model,
    show_progress: bool | None = None,
    on_held_out: Callable[[int, float], None] | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> TrainingRecord:
    """Train `parameters` of any model that returns a loss for `input_ids, attention_mask, labels`, and logits.

    Args:
        model: called in training mode as it was given (its mode is put back).
        parameters: those to train.
        examples, held_out: tokenised examples; see `train`.
        pad_token_id: fills short batch rows.
        options: how to train.
        packed: give the model packed batches (see `prefixcore.PackedCollator`) in place of padded ones.
        sharing_width: the model's hidden size, where packed batches of texts that begin alike may become a tree
            (`tree.py`): only with a prefix, and where every layer lets a token see all before it. 0: they may not.
        call: calls the model with a batch.
        show_progress: a progress bar on standard error; None: only on a terminal.
        on_held_out, on_step: as in `optimize`.

    Raises:
        ValueError: nothing to train or to learn from, no held-out examples for an option that goes by them, no logits
            for `options.prompt_loss_weight`, or a loss that is not finite (the parameters are then those before that
            step).
        NotImplementedError: an encoder, an encoder-decoder, or a model without a language model's head.

    Examples:
        >>> from prefixcore.training import Example, TrainingOptions, fit, tokenize
        >>> examples = tokenize(tokenizer, [Example("Peru ->", " Lima"), Example("Norway ->", " Oslo")])
        >>> norms = [p for name, p in model.named_parameters() if "norm" in name]  # any parameters
        >>> fit(model, norms, examples, options=TrainingOptions(steps=2)).steps_done
        2
    """
    options = options or TrainingOptions()
    check_causal(model, TO_LEARN)
    if not examples:
        raise ValueError("no examples to train on")
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    device = trained[0].device if trained else torch.device("cpu")
    source = batches(examples, options.batch_size, options.seed)
    prompts_too = PromptsToo(options.seed)

    def batch_of(some: Sequence[TokenizedExample]) -> Batch:
        return Batch.of(some, pad_token_id, packed=packed, device=device, sharing_width=sharing_width)

    def next_loss() -> Tensor | tuple[Tensor, Tensor]:
        if not options.prompt_loss_weight:
            return loss_of(model, batch_of(next(source)), call)
        learnt = prompts_too(next(source))
        return loss_with_prompts(model, batch_of(learnt.examples), learnt.is_answer, options.prompt_loss_weight, call)

    def loss_of_held_out() -> float:
        return held_out_loss(model, held_out, pad_token_id, packed=packed, sharing_width=sharing_width, call=call)

    was_training = model.training
    model.train()
    try:
        return optimize(
            trained,
            next_loss,
            held_out_loss=loss_of_held_out if held_out else None,
            options=options,
            show_progress=show_progress,
            on_held_out=on_held_out,
            on_step=on_step,
        )
    finally:
        model.train(was_training)
