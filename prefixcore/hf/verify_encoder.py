"""The check that encoders and encoder-decoders have to pass before anything is attached, unless their family is known.

The tokens of a text change those after them, and are changed by them, so no prefix has the effect of a text. It is
compared with the obvious implementation instead: outputs and the gradient of the prefix, on a batch with padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..nn import Prefix, PrefixTuningConfig, PromptTuningConfig, SoftPrompt
from .attention.concatenated import CONCATENATED, prefixes_in_order
from .attention.discover import find_backbone, moves_positions
from .attention.patch import frozen_run
from .attention.recording import AttentionCall
from .bank.attached import Attached
from .bank.bank import Bank
from .model.devices import device_of
from .model.own_words import own_words
from .model.sample_inputs import reads_tokens, sample_inputs
from .model.signature import argument_names
from .model.wrapped import WrappedMethod
from .positions.decoder_positions import embed_positions, moved, position_module
from .positions.model_inputs import plain_ids
from .positions.position_table import first_position
from .verify import tolerance

_VIRTUAL, _LENGTH, _PADDING = 3, 6, 2


def verify_encoder(model: PreTrainedModel, encoder: PreTrainedModel, calls: list[AttentionCall]) -> None:
    """Raises NotImplementedError unless a prefix on these layers computes what concatenated keys and values do."""
    config = PrefixTuningConfig(_VIRTUAL, init="random", seed=0)
    module = Prefix([call.shape for call in calls], config).to(device_of(model))
    inputs = _inputs(encoder)
    # What an encoder-decoder returns is of the decoder's tokens, none of which is padding.
    seen = None if encoder.config.is_encoder_decoder else inputs.get("attention_mask")

    def run() -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            output = encoder(**inputs)[0]
            output = output[seen.bool()] if seen is not None else output
            # Not a norm of the output, whose gradient a last layer norm takes away.
            direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output.device)
            gradients = torch.autograd.grad((output.float() * direction).sum(), list(module.parameters()))
        return output.detach(), list(gradients)

    with own_words(model, "a prefix"):
        with frozen_run(model):
            without = encoder(**inputs)[0]
            without = without[seen.bool()] if seen is not None else without
        plain = dict(inputs)
        if moves_positions(model, encoder, calls):  # said, as there is no cache to move them
            inputs["position_ids"] = torch.arange(_LENGTH, device=device_of(model))[None].expand(2, -1) + (
                first_position(model) + _VIRTUAL
            )
        wrapped = _move_decoder(encoder)
        try:
            with frozen_run(model, CONCATENATED), torch.enable_grad(), prefixes_in_order(module()):
                expected = run()
        finally:
            if wrapped is not None:
                wrapped.undo()
        inputs = plain
        bank = Bank(model)
        try:
            bank.set_decoder(find_backbone(model, calls), calls)
            bank.add(Attached(module, range(len(calls))))
            with frozen_run(model):
                got = run()
        finally:
            bank.patch.undo()
    _compare(model, "changes the output", expected[0] - without, expected[0] - got[0])
    for wanted, gradient in zip(expected[1], got[1], strict=True):
        _compare(model, "has the gradient", wanted, wanted - gradient)


def verify_encoder_prompt(model: PreTrainedModel, hidden_size: int) -> None:
    """Raises NotImplementedError unless a soft prompt before the encoder acts as the text whose embeddings it has."""
    encoder: PreTrainedModel = model.get_encoder()
    body: Any = model.base_model
    ids = plain_ids(model, _VIRTUAL + _LENGTH)
    with own_words(model, "a soft prompt"):
        with frozen_run(model):
            initial = encoder.get_input_embeddings()(ids[0, :_VIRTUAL]).float()
            more = body(**sample_inputs(body, ids, 1, ids[:, :_PADDING]))[0]
            inputs = sample_inputs(body, ids[:, _VIRTUAL:], 1, ids[:, :_PADDING])
            without = body(**inputs)[0]
        module = SoftPrompt(hidden_size, PromptTuningConfig(init=initial), initial).to(device_of(model))
        bank = Bank(model)
        try:
            bank.set_decoder(model.get_decoder(), [])
            bank.add(Attached(module))
            with frozen_run(model), torch.enable_grad():
                got = body(**inputs)[0]
                (gradient,) = torch.autograd.grad(got.float().square().mean(), list(module.parameters()))
        finally:
            bank.patch.undo()
    missing, effect = (more - got).float().norm(), (more - without).float().norm()
    if not missing <= tolerance(model) * effect or not bool(gradient.isfinite().all()):
        raise NotImplementedError(
            f"a soft prompt on {type(model).__name__} does not act as the text it was made of (off by "
            f"{float(missing):.3g}, where the text changes the output by {float(effect):.3g}), so this family is not "
            "supported"
        )


def _move_decoder(model: PreTrainedModel) -> WrappedMethod | None:
    """Lets the decoder of an encoder-decoder count positions from P on, where it counts them; None: nothing to do."""
    module = position_module(model.get_decoder()) if model.config.is_encoder_decoder else None
    if module is None:
        return None
    names = argument_names(module)

    def around(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with moved([_VIRTUAL]):
            return embed_positions(names, forward, args, kwargs)

    return WrappedMethod(module, "forward", around)


def _inputs(encoder: PreTrainedModel) -> dict[str, Tensor]:
    """Two rows, the second padded on the right where rows can be."""
    if encoder.config.is_encoder_decoder:
        ids = plain_ids(encoder, _LENGTH).repeat(2, 1)
        inputs = sample_inputs(encoder, ids, 2, ids[:, :_PADDING])
        if "attention_mask" in inputs:
            inputs["attention_mask"][1, _LENGTH - _PADDING :] = 0
        return inputs
    if not reads_tokens(encoder):
        return sample_inputs(encoder, torch.empty(0), 2)
    inputs = sample_inputs(encoder, plain_ids(encoder, _LENGTH).repeat(2, 1))
    inputs["attention_mask"][1, _LENGTH - _PADDING :] = 0
    return inputs


def _compare(model: PreTrainedModel, what: str, effect: Tensor, missing: Tensor) -> None:
    if not missing.float().norm() <= tolerance(model) * effect.float().norm():
        raise NotImplementedError(
            f"a prefix on {type(model).__name__} is not what it would be if it was concatenated with keys and values "
            f"(off by {float(missing.float().norm()):.3g}, where it {what} {float(effect.float().norm()):.3g}), so "
            "this family is not supported"
        )
