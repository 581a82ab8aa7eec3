"""Compiled steps of four layers of SmolLM2-135M's shape: beside the compiled bare model, with CUDA graphs
(`reduce-overhead`), and how often ten lengths compile anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import prefixcore
from bench import models
from bench.gates import gate, relative_error
from bench.scale import pick
from bench.steps.check import COARSEST, LEEWAY

from . import clock
from .conftest import Measure
from .device import COMPILER, HALF, NAME, REAL
from .steps import SMALL, SMALL_VIRTUAL, batch_of, free, frozen

SHAPE = replace(SMALL, layers=4 if REAL else 1)
ROWS, LENGTH = (8, 64) if REAL else (1, 5)
LENGTHS = {"cuda": range(64, 144, 8), "interpreter": range(5, 7)}.get(NAME, range(5, 6))
MODES = {"default": None, "reduce-overhead": "reduce-overhead"}
FLOOR = 1e-5
"""Relative error, by norm, that is no fault where the eager step in float32 is right to less."""
Loss = Callable[[Mapping[str, Tensor]], Tensor]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    free()


def ours(model: Any) -> tuple[Loss, Any]:
    twin = models.twin(model)
    handle = prefixcore.attach(twin, prefixcore.PrefixTuningConfig(SMALL_VIRTUAL, init="random", seed=0))
    return (lambda batch: twin(use_cache=False, **batch).loss), handle


def bare(model: Any) -> tuple[Loss, Tensor]:
    """With something added to the embeddings, that a gradient goes down to."""
    twin = models.twin(model)
    added = torch.zeros(SHAPE.hidden, device=model.device, dtype=HALF, requires_grad=True)

    def loss(batch: Mapping[str, Tensor]) -> Tensor:
        rest = {name: x for name, x in batch.items() if name != "input_ids"}
        return twin(inputs_embeds=twin.get_input_embeddings()(batch["input_ids"]) + added, use_cache=False, **rest).loss

    return loss, added


def compiled(loss: Loss, mode: str | None = None) -> Loss:
    return torch.compile(loss, backend=COMPILER, mode=mode) if REAL else torch.compile(loss, backend=COMPILER)


def step(loss: Loss, batch: Mapping[str, Tensor], trained: Iterable[Tensor]) -> Callable[[], None]:
    trained = list(trained)

    def run() -> None:
        for parameter in trained:
            parameter.grad = None
        torch.compiler.cudagraph_mark_step_begin()
        loss(batch).backward()

    return run


def answers(loss: Loss, handle: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Loss and every gradient of the prefix."""
    for parameter in handle.parameters():
        parameter.grad = None
    torch.compiler.cudagraph_mark_step_begin()
    found = loss(batch)
    found.backward()
    gradients = torch.cat([parameter.grad.float().flatten() for parameter in handle.parameters()])
    for parameter in handle.parameters():
        parameter.grad = None
    return {"loss": found.detach().float().clone(), "gradient": gradients}


def check(loss: Loss, eager: Loss, handle: Any, batch: Mapping[str, Tensor]) -> float:
    """The gate: compiled gives what eager gives, as near to float32 as eager itself is."""
    exact_loss, exact_handle = ours(copy.deepcopy(frozen(SHAPE, 4096)).float())
    exact = answers(exact_loss, exact_handle, batch)
    off = max(relative_error(x, exact[name]) for name, x in answers(eager, handle, batch).items())
    return gate("the compiled step", answers(loss, handle, batch), exact, min(COARSEST, max(FLOOR, LEEWAY * off)))


@pytest.mark.parametrize("mode", pick(smoke=["default"], quick=list(MODES), full=list(MODES)))
def test_compiled_step(measure: Measure, mode: str) -> None:
    model, batch = frozen(SHAPE, 4096), batch_of(SHAPE, ROWS, LENGTH)
    eager, handle = ours(model)
    theirs, added = bare(model)
    mine, other = compiled(eager, MODES[mode]), compiled(theirs, MODES[mode])
    torch._dynamo.utils.counters.clear()
    error = check(mine, eager, handle, batch)
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    ways = {
        "bare compiled": (other, [added]),
        "bare eager": (theirs, [added]),
        "ours eager": (eager, handle.parameters()),
    }
    measure(
        "gpu compiled",
        {"model": f"{SHAPE.layers} layers of {SMALL.name}", "B": ROWS, "T": LENGTH, "P": SMALL_VIRTUAL, "mode": mode},
        step(mine, batch, handle.parameters()),
        {name: step(loss, batch, trained) for name, (loss, trained) in ways.items()},
        seconds=clock.wall_seconds,
        relative_error=error,
        graphs_skipped=skipped,
    )


def graphs(steps: Iterable[Callable[[], None]]) -> int:
    """How many graphs these are compiled into, one after the other."""
    torch._dynamo.utils.counters.clear()
    for one in steps:
        one()
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_ten_lengths(measure: Measure) -> None:
    """The lengths one after the other, compiled; the gate is the longest's."""
    model = frozen(SHAPE, 4096)
    eager, handle = ours(model)
    theirs, added = bare(model)
    mine, other = compiled(eager), compiled(theirs)
    batches = [batch_of(SHAPE, ROWS, length) for length in LENGTHS]
    steps = {
        "candidate": [step(mine, batch, handle.parameters()) for batch in batches],
        "bare compiled": [step(other, batch, [added]) for batch in batches],
    }
    counted = {who: graphs(lengths) for who, lengths in steps.items()}

    def all_of(who: str) -> Callable[[], None]:
        def run() -> None:
            for one in steps[who]:
                one()

        return run

    measure(
        "gpu lengths",
        {"model": f"{SHAPE.layers} layers of {SMALL.name}", "B": ROWS, "T": f"{LENGTHS[0]} to {LENGTHS[-1]}"},
        all_of("candidate"),
        {"bare compiled": all_of("bare compiled")},
        seconds=clock.wall_seconds,
        relative_error=check(mine, eager, handle, batches[-1]),
        graphs=counted,
    )
