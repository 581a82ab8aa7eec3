"""What attaching adds to a forward besides the op: nothing that grows with the layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import prefixcore
from prefixcore import PackedCollator, PrefixTuningConfig, PromptTuningConfig

from .models import FAMILIES, make, padded, tokens, window_of

CONFIGS = [PrefixTuningConfig(3, init="random"), PromptTuningConfig(3, init="random")]


class Reads(TorchDispatchMode):
    """Counts values read from tensors, each of which makes a GPU wait."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt2"])
@pytest.mark.parametrize("config", CONFIGS, ids=["prefix", "prompt"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_values_are_read_once_a_forward_not_once_a_layer(family: str, config: Any, packed: bool) -> None:
    if packed:
        batch = PackedCollator()([{"input_ids": row} for row in tokens(3, 5).tolist()])
        del batch["max_length_q"]  # so that it has to be found out
    else:
        batch = {name: padded("left")[name] for name in ("input_ids", "attention_mask")}
    found = []
    for layers in (2, 4):
        changes: dict[str, Any] = {"num_hidden_layers": layers, **window_of(family, 16)}
        if family == "gpt_oss":
            changes["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
        model = make(family, **changes)
        prefixcore.attach(model, config)
        with torch.no_grad(), Reads() as reads:
            model(**batch, use_cache=False)
        found.append(reads.count)
    assert found[0] == found[1]


@pytest.mark.parametrize("config", CONFIGS, ids=["prefix", "prompt"])
def test_the_modules_of_the_model_are_not_searched_in_each_forward(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of thirty layers has four hundred of them."""
    model, batch = make("llama").train(), padded("right")
    prefixcore.attach(model, config)
    model(**batch)  # the first call of a soft prompt may switch attention
    ours = set(model.prefixcore.modules())
    searched = []
    modules = torch.nn.Module.named_modules

    def spy(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        searched.append(self)
        return modules(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "named_modules", spy)
    model(**batch).loss.backward()
    assert not set(searched) - ours
