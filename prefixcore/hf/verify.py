"""The check that a model has to pass before anything is attached to it, unless its family is known.

A prefix made of the keys and values of a text, or a prompt made of its embeddings, must have the effect of the text: in
a forward, and in a short `generate` of a batch with padding. Then both are moved away from the text, as training does,
and a forward and a backward must pass. So what a model cannot do is found here, and not at the first real call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from ..nn import Prefix, PrefixTuningConfig, PromptTuningConfig, SoftPrompt
from .attention.discover_cached import record_again
from .attention.patch import frozen_run
from .attention.recording import AttentionCall
from .bank.attached import Attached
from .bank.bank import Bank
from .families import AS_DECODER, known_families, text_config
from .model.devices import device_of
from .model.own_words import own_words
from .positions.model_inputs import SEQUENCE, found_to_read_ids, head_of, plain_ids, reads_ids, stand_in

TEXT, CONTINUATION, NEW = 3, 4, 2
"""How many tokens become virtual ones, how many follow them, and how many are generated."""

FULL = torch.float32, torch.float64
"""Types whose rounding is below what the checks allow for."""

PADDING = 2
"""How many of the continuation are padding in one row of the batch that is generated from."""

_TOLERANCE, _TOLERANCE_HALF = 0.01, 0.05
"""The share of the text's effect that may be missing. Rounding in bfloat16 takes a hundredth, in TF32 a thousandth."""

_ROUNDING = 1e-3
"""The share of a later token's change that earlier logits of a causal model in float32 may have.

It computes them of the same numbers, but not always in the same order: which expert reads how many tokens differs, say.
"""


def verify_prefix(model: PreTrainedModel, backbone: PreTrainedModel, calls: list[AttentionCall]) -> None:
    """Raises NotImplementedError unless a prefix on these layers acts as the text it was made of."""
    ids = plain_ids(model, TEXT + CONTINUATION)
    found = record_again(model, ids[:, :TEXT], calls)
    initial = [(call.key[0], call.value[0]) for call in found]
    module = Prefix([call.shape for call in calls], PrefixTuningConfig(init=initial), initial).to(device_of(model))

    def run(tokens: Tensor) -> Tensor:
        with frozen_run(model):
            return backbone(input_ids=tokens, use_cache=False)[0]

    with own_words(model, "a prefix"):
        expected, without = run(ids)[:, TEXT:], run(ids[:, TEXT:])
        generated = generate_after_text(model, ids)
        bank = Bank(model)
        try:
            bank.set_decoder(backbone, calls)
            bank.add(Attached(module, range(len(calls))))
            _compare(model, "prefix", expected, run(ids[:, TEXT:]), without)
            _check_generate(model, "prefix", ids, generated)
            _check_training(model, "prefix", module, ids[:, TEXT:])
        finally:
            bank.patch.undo()


def verify_soft_prompt(model: PreTrainedModel, hidden_size: int) -> None:
    """Raises NotImplementedError unless a soft prompt acts as the text whose embeddings it has.

    A model that fails when it is given embeddings alone is tried with ids, in which virtual tokens have a stand-in.
    """
    if reads_ids(model):
        return _verify_soft_prompt(model, hidden_size)
    try:
        return _verify_soft_prompt(model, hidden_size)
    except NotImplementedError as error:
        found_to_read_ids(model, True)
        try:
            return _verify_soft_prompt(model, hidden_size)
        except NotImplementedError as second:
            found_to_read_ids(model, False)
            raise (second if isinstance(error.__cause__, RuntimeError) else error) from None


def _verify_soft_prompt(model: PreTrainedModel, hidden_size: int) -> None:
    ids = plain_ids(model, TEXT + CONTINUATION)
    if reads_ids(model):  # the text to compare with is that of the ids which the model sees
        ids[:, :TEXT] = stand_in(model)

    def run(tokens: Tensor) -> Tensor:
        with frozen_run(model):
            return first(model(input_ids=tokens, use_cache=False))

    with own_words(model, "a soft prompt"):
        with frozen_run(model):
            initial = model.get_input_embeddings()(ids[0, :TEXT])
        if not isinstance(initial, Tensor):
            raise NotImplementedError(
                f"the input embeddings of {type(model).__name__} are no tensor, but a {type(initial).__name__}, into "
                "which a soft prompt cannot be put"
            )
        initial = initial.float()
        module = SoftPrompt(hidden_size, PromptTuningConfig(init=initial), initial).to(device_of(model))
        expected, without = run(ids), run(ids[:, TEXT:])
        if head_of(model) != SEQUENCE:
            if expected.shape[:2] != ids.shape:
                raise NotImplementedError(
                    f"{type(model).__name__} does not return one output a token ({list(expected.shape)}), which a soft "
                    f"prompt needs so far; known families: {known_families()}"
                )
            expected = expected[:, TEXT:]
        generated = generate_after_text(model, ids)
        bank = Bank(model)
        try:
            bank.add(Attached(module))
            _compare(model, "soft prompt", expected, run(ids[:, TEXT:]), without)
            _check_generate(model, "soft prompt", ids, generated)
            _check_training(model, "soft prompt", module, ids[:, TEXT:])
        finally:
            bank.patch.undo()


def check_causal(model: PreTrainedModel, what: str = "a soft prompt") -> None:
    """Raises NotImplementedError for a model that generates and was made as an encoder: its tokens see later ones.

    A cache holds what earlier tokens were before the later ones came, so that such a model generates other tokens with
    a cache than without. Models that read a prompt in both directions by design (PaliGemma) have no `is_decoder`.
    """
    config = text_config(model)
    if not model.can_generate() or getattr(config, "is_decoder", None) is not False:
        return
    ids = plain_ids(model, CONTINUATION)
    other = ids.clone()
    other[:, -1] = stand_in(model)
    with own_words(model, what), frozen_run(model):
        change = first(model(input_ids=ids, use_cache=False)) - first(model(input_ids=other, use_cache=False))
    rounding = _ROUNDING if model.dtype in FULL else _TOLERANCE_HALF
    if change[:, :-1].float().norm() > rounding * change[:, -1].float().norm():
        raise NotImplementedError(
            f"{type(model).__name__} is meant to generate, but its text is not causal: a later token changes an "
            f"earlier logit, and what it generates with a cache is not what it generates without. {AS_DECODER}"
        )


def first(output: Any) -> Tensor:
    """The logits of a head, or the last hidden states of a model without one."""
    logits = getattr(output, "logits", None)
    return output[0] if logits is None else logits


@dataclass(frozen=True)
class _Generated:
    """What the bare model generates after the text.

    Attributes:
        logits: [new, 2, V] of two rows, each generated by itself.
        tokens: [2, new], which need not be the likeliest: the end of a text is none, and what was read may count less.
        without: [2, V], the first logits where the text is left out.
        pads: whether it generates the second row in a batch, padded on the left, as by itself.
        reads_alike: whether the first of them are those of a forward over the same row.
    """

    logits: Tensor
    tokens: Tensor
    without: Tensor
    pads: bool
    reads_alike: bool


def generate_after_text(model: PreTrainedModel, ids: Tensor) -> _Generated | None:
    """What the bare model generates; None: it cannot, so nothing is promised of generate."""
    if not model.can_generate():
        return None
    rows, mask = _batch(ids, True)
    try:
        batch, of_both = generate_tokens(model, rows, mask)
        alone, of_one = generate_tokens(model, rows[1:, PADDING:], mask[1:, PADDING:])
        without = generate(model, *_batch(ids, False), new=1)[0]
        with frozen_run(model):
            read = first(model(input_ids=rows[1:, PADDING:], use_cache=False))[0, -1]
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception:
        return None
    logits = torch.stack((batch[:, 0], alone[:, 0]), 1)
    effect = (alone[0, 0] - without[1]).float().norm()
    pads = bool((batch[0, 1] - alone[0, 0]).float().norm() <= tolerance(model) * effect)
    reads_alike = bool((read - alone[0, 0]).float().norm() <= tolerance(model) * effect)
    return _Generated(logits, torch.cat((of_both[:1], of_one)), without, pads, reads_alike)


def _check_generate(model: PreTrainedModel, what: str, ids: Tensor, expected: _Generated | None) -> None:
    """Raises NotImplementedError unless a short generate is that of the model which reads the text."""
    if expected is None:
        return
    got, tokens = generate_tokens(model, *_batch(ids, False))
    for row, where in ((0, "generate"), (1, "generate with padding on the left"))[: 2 if expected.pads else 1]:
        wanted = expected.logits[:, row]
        # After another first token, of a near tie, the second may be any.
        far = (wanted[0] - got[0, row]).float().norm() > tolerance(model) * (wanted[0] - expected.without[row]).norm()
        if far and not expected.reads_alike:
            raise NotImplementedError(
                f"{type(model).__name__} itself generates otherwise than it reads (its generate counts positions in "
                f"another way than its forward), so no {what} is right for both; take a soft prompt"
            )
        count = NEW if int(expected.tokens[row, 0]) == int(tokens[row, 0]) else 1
        _compare(model, f"{what} in {where}", wanted[:count], got[:count, row], expected.without[row].expand(count, -1))


def _batch(ids: Tensor, with_text: bool) -> tuple[Tensor, Tensor]:
    """Two rows of `ids` [1, T], the second shorter and padded on the left, with the text or without; and their mask."""
    text, rest = ids[0, : TEXT if with_text else 0], ids[0, TEXT:]
    rows = torch.stack((torch.cat((text, rest)), torch.cat((ids.new_zeros(PADDING), text, rest[PADDING:]))))
    mask = torch.ones_like(rows)
    mask[1, :PADDING] = 0
    return rows, mask


def generate(model: PreTrainedModel, ids: Tensor, mask: Tensor, new: int = NEW) -> Tensor:
    """The logits [new, B, V] of a greedy generate."""
    return generate_tokens(model, ids, mask, new)[0]


def generate_tokens(model: PreTrainedModel, ids: Tensor, mask: Tensor, new: int = NEW) -> tuple[Tensor, Tensor]:
    """The logits [new, B, V] of a greedy generate, and its tokens [B, new], which are no end of a sequence."""
    config = GenerationConfig(
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    run: Any = model.generate
    with frozen_run(model):
        output = run(ids, attention_mask=mask, generation_config=config)
    return torch.stack(output.logits), output.sequences[:, -new:]


def _check_training(model: PreTrainedModel, what: str, module: nn.Module, ids: Tensor) -> None:
    """Raises NotImplementedError unless values that belong to no text pass a forward and get a gradient."""
    generator = torch.Generator().manual_seed(0)
    parameters = list(module.parameters())
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.1 * (float(parameter.std(correction=0)) or 1.0) * noise.to(parameter.device))
    with frozen_run(model), torch.enable_grad():
        first(model(input_ids=ids, use_cache=False)).float().square().mean().backward()
    gradients = [parameter.grad for parameter in parameters]
    if not all(each is not None and bool(each.isfinite().all()) and bool(each.any()) for each in gradients):
        raise NotImplementedError(
            f"a {what} on {type(model).__name__} gets no gradient, so it cannot be trained; known families: "
            f"{known_families()}"
        )


def tolerance(model: PreTrainedModel) -> float:
    """The share of an effect that may be missing, in the model's dtype."""
    return _TOLERANCE if model.dtype in FULL else _TOLERANCE_HALF


def _compare(model: PreTrainedModel, what: str, expected: Tensor, got: Any, without: Tensor) -> None:
    """Raises NotImplementedError if `got` is not `expected`, measured by how far `without` the text is from it."""
    effect = (expected - without).float().norm()
    missing = (expected - got).float().norm()
    if not missing <= tolerance(model) * effect:
        raise NotImplementedError(
            f"a {what} on {type(model).__name__} does not act as the text it was made of (off by {float(missing):.3g}, "
            f"where the text changes the output by {float(effect):.3g}), so this family is not supported; known "
            f"families: {known_families()}"
        )
