"""Whether a model can begin at the first layer with a trained prefix: a batch from the start, and again from there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...hf.lower_layers import LowerLayers
from ..batch import Batch, call_model

ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Relative error, by norm, within which two computations of one thing are equal; others: `COARSE`."""
COARSE = 3e-2
BATCHED = 1e-3
"""The same for a text by itself and in a batch, whose products have other shapes; at least `ROUNDING`."""


class CacheError(ValueError):
    """Activations cannot be kept for this model; the message says why.

    Examples:
        >>> from prefixcore.training import CacheError, Example, cache_activations, tokenize
        >>> examples = tokenize(tokenizer, [Example("Peru ->", " Lima")])
        >>> with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4)) as handle:
        ...     try:
        ...         with cache_activations(handle, tokenizer, examples, "memory"):
        ...             pass
        ...     except CacheError as error:
        ...         print(str(error).partition(";")[0])
        activations cannot be kept: the prefix of layer 0 is trained, so no layer lies below
    """


@dataclass(frozen=True)
class Found:
    """What the check has seen: E, and the dtype and the device of what layers pass on."""

    width: int
    dtype: torch.dtype
    device: torch.device


def check_exact(
    model: nn.Module, lower: LowerLayers, parameters: Sequence[nn.Parameter], batch: Batch, first: Batch
) -> Found:
    """Compares what is learnt from a batch with what is learnt from the kept activations of it.

    Args:
        model: with a prefix attached; its mode, its gradients and the random numbers to come stay as they are.
        lower: its layers below the prefix.
        parameters: those that are trained.
        batch: some examples.
        first: the first of them by itself.

    Raises:
        CacheError: loss or gradients differ (layers hand on more than one tensor: keys and values that later layers
            share, statistics of routers); the lower layers compute something else each time (dropout), or something
            that depends on the rest of the batch.
    """
    with _as_before(model, parameters):
        model.eval()
        with lower.recorded() as seen:
            expected = _learnt(model, batch, parameters)
        hidden = _only(seen, batch)
        rounding = ROUNDING.get(hidden.dtype, COARSE)
        try:
            with lower.given(hidden.clone()):
                got = _learnt(model, batch, parameters)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CacheError(
                f"{_name(model)} cannot begin at layer {lower.first}: what comes later needs more of the layers below "
                f"than what they pass on ({type(error).__name__}: {_line(error)}); train without a cache of activations"
            ) from error
        worst = max(_difference(one, other) for one, other in zip(got, expected, strict=True))
        if worst > rounding:
            raise CacheError(
                f"{_name(model)} learns something else where it begins at layer {lower.first} with what the layers "
                f"below pass on (relative difference {worst:.1e}, at most {rounding:.0e} is rounding): later layers "
                "need more of them than that; train without a cache of activations"
            )
        with torch.no_grad():
            with lower.recorded() as seen:
                call_model(model, first)
            alone = _only(seen, first).flatten(0, 1)[first.places[0]]
            together = hidden.flatten(0, 1)[batch.places[0]]
            if (worst := _difference(alone, together)) > max(BATCHED, rounding):
                raise CacheError(
                    f"what the layers of {_name(model)} below layer {lower.first} make of a text depends on what else "
                    f"is in the batch (relative difference {worst:.1e}); train without a cache of activations"
                )
            model.train()
            with lower.recorded() as seen:
                call_model(model, batch)
        if (worst := _difference(_only(seen, batch), hidden)) > rounding:
            raise CacheError(
                f"the layers of {_name(model)} below layer {lower.first} have dropout, so each step is to see "
                f"something else of a text (relative difference {worst:.1e}): set its dropout to 0 in the "
                "model's config.json (names that end in pdrop or dropout), or train without a cache of activations"
            )
    return Found(hidden.shape[-1], hidden.dtype, hidden.device)


def _learnt(model: Any, batch: Batch, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The loss, and the gradients of the parameters that it has."""
    with torch.enable_grad():
        loss = call_model(model, batch).loss
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return [loss.detach(), *gradients]


def _only(seen: list[Tensor], batch: Batch) -> Tensor:
    if len(seen) != 1 or seen[0].shape[:2] != batch.shape:
        got = [list(each.shape) for each in seen]
        raise CacheError(
            f"expected one tensor [{batch.shape[0]}, {batch.shape[1]}, E] between the layers of a call, got {got}; "
            "train without a cache of activations"
        )
    return seen[0]


def _difference(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double(), expected.double()
    error = float((got - expected).norm() / expected.norm().clamp(min=1e-30))
    if error != error:
        return float("inf")
    return error if float((got - expected).abs().max()) > 1e-12 else 0.0


@contextmanager
def _as_before(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """A block after which the model's mode and the random numbers to come are what they would be without it."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
