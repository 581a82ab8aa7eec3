"""Both ops in a transformer of one's own, trained in the ways that people train: the gradients of float64."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import prefixcore

from .problems import relative_error

V, E, H, HKV, P = 50, 32, 4, 2, 5
D = E // H


def rotate(x: Tensor, first: int) -> Tensor:
    """Rotary positions of `x` [B, H, T, D], the first of which is `first`."""
    turns = 10_000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = torch.arange(first, first + x.shape[2]).double()[:, None] * turns
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(nn.Module):
    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(E), nn.Linear(E, (H + 2 * HKV) * D), nn.Linear(E, E)
        self.window = window

    def forward(self, x: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (-1, D)).transpose(1, 2)
        query, key, value = heads.split([H, HKV, HKV], 1)
        query, key = (rotate(each, P) for each in (query, key))
        out = prefixcore.prefix_attention(
            query, key, value, prefix_key, prefix_value, sliding_window=self.window, softcap=20.0
        )
        return x + self.out(out.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Frozen but for a prefix in each layer and a soft prompt before the text."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, E)
        self.blocks = nn.ModuleList(Block(window) for window in (None, 6, None))
        self.requires_grad_(False)
        self.prefixes = nn.ParameterList(torch.randn(2, HKV, P, D) for _ in self.blocks)
        self.prompt = nn.Parameter(torch.randn(P, E))

    def loss(self, ids: Tensor, run: Callable[..., Tensor] = lambda block, *inputs: block(*inputs)) -> Tensor:
        first = torch.arange(V, V + P).expand(len(ids), P)
        x = prefixcore.soft_embedding(torch.cat([first, ids], 1), self.table.weight, self.prompt)
        for block, prefix in zip(self.blocks, self.prefixes, strict=True):
            x = run(block, x, *prefix.unbind())
        logits = x[:, P:-1] @ self.table.weight.T
        return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def gradients(self) -> list[Tensor]:
        found = [each.grad for each in self.parameters() if each.requires_grad]
        assert len(found) == 4
        return [each for each in found if each is not None]


def plain(model: Transformer, ids: Tensor) -> None:
    model.loss(ids).backward()


def checkpointed(model: Transformer, ids: Tensor) -> None:
    model.loss(ids, lambda *call: checkpoint(*call, use_reentrant=False)).backward()


def checkpointed_reentrantly(model: Transformer, ids: Tensor) -> None:
    model.loss(ids, lambda *call: checkpoint(*call, use_reentrant=True)).backward()


def accumulated(model: Transformer, ids: Tensor) -> None:
    for row in ids:
        (model.loss(row[None]) / len(ids)).backward()


def twice_from_one_graph(model: Transformer, ids: Tensor) -> None:
    loss = model.loss(ids) / 2
    loss.backward(retain_graph=True)
    loss.backward()


def saved_on_the_cpu(model: Transformer, ids: Tensor) -> None:
    with torch.autograd.graph.save_on_cpu():
        loss = model.loss(ids)
    loss.backward()


def watched_for_nan(model: Transformer, ids: Tensor) -> None:
    with torch.autograd.detect_anomaly(check_nan=True):
        model.loss(ids).backward()


def compiled(model: Transformer, ids: Tensor) -> None:
    torch.compile(model.loss, fullgraph=True, backend="aot_eager")(ids).backward()


def mapped(model: Transformer, ids: Tensor) -> None:
    torch.func.vmap(lambda row: model.loss(row[None]))(ids).mean().backward()


WAYS = [
    plain, checkpointed, checkpointed_reentrantly, accumulated, twice_from_one_graph, saved_on_the_cpu,
    watched_for_nan, compiled, mapped,
]  # fmt: skip


Trained = tuple[Transformer, Tensor, list[Tensor]]


@pytest.fixture(scope="module")
def trained() -> Trained:
    """A model, a batch, and the gradients of float64."""
    torch.manual_seed(0)
    model, ids = Transformer(), torch.randint(V, (3, 13))
    wide = copy.deepcopy(model).double()
    wide.loss(ids).backward()
    return model, ids, wide.gradients()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("train", WAYS, ids=lambda train: train.__name__)
def test_gradients(trained: Trained, train: Callable[[Transformer, Tensor], None]) -> None:
    model, ids, want = trained
    model = copy.deepcopy(model)
    train(model, ids)
    assert max(map(relative_error, model.gradients(), want)) < 1e-5
    assert all(each.grad is None for each in model.parameters() if not each.requires_grad)


def test_a_model_that_was_saved_whole(trained: Trained) -> None:
    model, ids, want = trained
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    again.loss(ids).backward()
    assert max(map(relative_error, again.gradients(), want)) < 1e-5


@pytest.mark.parametrize("kind", ["autocast", "frozen weights in bfloat16"])
def test_half_precision_has_gradients_in_float32(trained: Trained, kind: str) -> None:
    model, ids, want = trained
    model = copy.deepcopy(model)
    if kind == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss(ids)
    else:
        for each in model.parameters():
            each.data = each if each.requires_grad else each.bfloat16()
        loss = model.loss(ids)
    loss.backward()
    found = model.gradients()
    assert {each.dtype for each in found} == {torch.float32}
    assert max(map(relative_error, found, want)) < 5e-2
