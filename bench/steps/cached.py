"""Steps that begin at the first layer whose prefix is trained, and the gate that they pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

import prefixcore
from bench import models
from bench.gates import gate
from bench.steps.packed import Data
from prefixcore.training import CachedActivations, cache_activations, train_layers
from prefixcore.training.batch import Batch, Call, call_model

TOLERANCE = 1e-6
"""Relative error, by norm, of loss and gradient against the whole step's: the same bits but for the order of sums."""


@dataclass
class Upper:
    """A model in training whose prefix is trained from some layer up.

    Attributes:
        model: the model.
        handle: of the prefix.
        batch: what it learns.
        cached: calls that begin at that layer, once a call has run from the start.
    """

    model: Any
    handle: Any
    batch: Batch
    cached: CachedActivations

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters of the layers that are trained."""
        return [parameter for parameter in self.handle.parameters() if parameter.requires_grad]

    def step(self, call: Call) -> Callable[[], None]:
        """Forward, backward and AdamW."""
        optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            call(self.model, self.batch).loss.backward()
            optimizer.step()

        return step

    def whole(self) -> Callable[[], None]:
        return self.step(call_model)

    def kept(self) -> Callable[[], None]:
        return self.step(self.cached)


class _Padding:
    """What of a tokenizer a cache reads."""

    eos_token_id = None

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id


def upper(stack: ExitStack, model: Any, data: Data, first: int) -> Upper:
    """A prefix on a twin of `model`, trained in the layers from `first` up; its cache lives as long as `stack`."""
    twin = models.twin(model).train()
    handle = prefixcore.attach(twin, prefixcore.PrefixTuningConfig(data.virtual, init="random", seed=0))
    train_layers(handle, range(first, twin.config.num_hidden_layers))
    batch = Batch.of(data.examples, data.pad_token_id, packed=True, device=torch.device("cpu"))
    cached = cache_activations(handle, _Padding(data.pad_token_id), data.examples, "memory")
    return Upper(twin, handle, batch, stack.enter_context(cached))


def check(found: Upper) -> float:
    """The gate: a step from kept activations gives the loss and the gradient of a whole one. Returns the error."""
    learnt = []
    for call in (call_model, found.cached, found.cached):
        found.handle.module.zero_grad()
        loss = call(found.model, found.batch).loss
        loss.backward()
        gradients = [parameter.grad.flatten() for parameter in found.trained if parameter.grad is not None]
        learnt.append({"loss": loss.detach(), "gradient": torch.cat(gradients)})
    if found.cached.calls != 1:
        raise AssertionError(f"expected one call to begin at the prefix, got {found.cached.calls}")
    return gate("a step from kept activations", learnt[2], learnt[0], TOLERANCE)
