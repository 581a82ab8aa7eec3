"""One training, by one process or by several: its losses, the gradients of the first step, and what came of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import prefixcore
from prefixcore.training import AverageCallback

IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])

CONFIGS: dict[str, Any] = {
    "prefix": prefixcore.PrefixTuningConfig(4, seed=0),
    "mlp": prefixcore.PrefixTuningConfig(4, seed=0, reparameterization="mlp"),
    "prompt": prefixcore.PromptTuningConfig(4, seed=0),
}


def whole(x: Tensor) -> Tensor:
    """All of a tensor, of which this process may hold a part."""
    gather = getattr(x, "full_tensor", None)
    found: Tensor = x.detach().clone() if gather is None else gather().detach().clone()
    return found


def train(handle: Any, run: Any, ids: Tensor, steps: int = 3) -> dict[str, Any]:
    """Trains by `run`, which may be a wrapper of the handle's model, on all rows at once."""
    handle.model.train()
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.01, eps=1e-3)  # no sign is made of a rounding error
    losses, gradients = [], []
    for _ in range(steps):
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        if not gradients:
            gradients = [whole(parameter.grad) for parameter in handle.parameters()]
        torch.nn.utils.clip_grad_norm_(handle.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "gradients": gradients, "values": [whole(p) for p in handle.parameters()]}


def why_no_average(model: Any) -> str | None:
    """Why `AverageCallback` refuses a model as Trainer hands it over when training begins; None: it does not."""
    arguments, state = SimpleNamespace(load_best_model_at_end=False), SimpleNamespace(global_step=0)
    try:
        AverageCallback().on_train_begin(arguments, state, None, model=model)
    except ValueError as error:
        return str(error)
    return None


def assert_same_training(ranks: list[dict[str, Any]], alone: dict[str, Any], name: str) -> None:
    """Each process has the gradients and the values of one process on the whole batch, and all have the same bits."""
    for key in ("gradients", "values"):
        what = f"{name}, {key}: {{}}"
        for mine, others, expected in zip(ranks[0][key], ranks[1][key], alone[key], strict=True):
            assert torch.equal(mine, others), what.format("they differ between the processes")
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6, msg=what.format)
    losses = torch.tensor([rank["losses"] for rank in ranks], dtype=torch.float64).mean(0)
    torch.testing.assert_close(losses, torch.tensor(alone["losses"], dtype=torch.float64), rtol=0, atol=1e-6)
