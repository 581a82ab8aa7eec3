"""How large a prefix's keys and values are in each layer, beside those of the probes' own tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .nearest import percentiles
from .probes import Probes
from .progress import Progress
from .running import FrozenRun, WatchedCall
from .virtual import VirtualTokens


def norms_by_layer(run: FrozenRun, probes: Probes, virtual: VirtualTokens, progress: Progress) -> dict[str, Any]:
    """For keys and values of each layer: the norms over all heads, of the virtual tokens and of the probes' tokens.

    The probes are read without virtual tokens, from the position at which they stand behind them.
    """
    seen: dict[str, dict[int, list[Tensor]]] = {"key": {}, "value": {}}

    def watch(call: WatchedCall) -> None:
        for name, tensor in (("key", call.key), ("value", call.value)):
            norms = tensor[0].transpose(0, 1).flatten(1).float().norm(dim=1)
            seen[name].setdefault(call.layer, []).append(norms.cpu())

    for text in progress(probes.ids, "norms"):
        ids = torch.tensor([text.prompt_ids + text.completion_ids], device=run.model.device)
        run(ids, virtual=VirtualTokens(virtual.text_position, (), {}), watch=watch)
    return {
        name: [
            {
                "layer": layer,
                "virtual": percentiles(virtual.pairs[layer][kind].transpose(0, 1).flatten(1).float().norm(dim=1))
                if layer in virtual.pairs
                else None,
                "text": percentiles(torch.cat(norms)),
            }
            for layer, norms in sorted(seen[name].items())
        ]
        for kind, name in enumerate(("key", "value"))
    }
