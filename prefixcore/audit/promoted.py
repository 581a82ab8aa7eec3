"""Which tokens the virtual tokens make likelier, and which less likely."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOOR = 1e-4
"""The mean probability that a token must have, with the virtual tokens or without them, to be listed."""

SHOWN = 15


class TokenShift:
    """Sums of log-probabilities and probabilities by token, over first answer tokens and over all completion tokens."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts = {"first": 0, "all": 0}

    def see(self, without: Tensor, log_probs: Tensor, is_first: Tensor) -> None:
        """Takes log-probabilities [N, V] at N places into account; `is_first` [N] marks the first answer tokens."""
        for where, chosen in (("first", is_first), ("all", torch.ones_like(is_first))):
            before, after = without[chosen], log_probs[chosen]
            self.counts[where] += len(before)
            self._add(f"{where}_difference", after - before)
            self._add(f"{where}_before", before.exp())
            self._add(f"{where}_after", after.exp())

    def _add(self, name: str, values: Tensor) -> None:
        total = values.double().sum(0).cpu()
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def to_dict(self, tokenizer: Any) -> dict[str, Any]:
        """The tokens that rise and fall most, by mean log-probability and (`gained`, `lost`) by mean probability."""
        return {"floor": FLOOR, **{where: self._ranked(where, tokenizer) for where in ("first", "all")}}

    def _ranked(self, where: str, tokenizer: Any) -> dict[str, Any]:
        count = self.counts[where]
        size = min(len(tokenizer), len(self.sums[f"{where}_difference"]))
        difference, before, after = (
            self.sums[f"{where}_{name}"][:size] / count for name in ("difference", "before", "after")
        )
        listed = torch.maximum(before, after) >= FLOOR
        up = difference.masked_fill(~listed, -torch.inf)
        down = difference.masked_fill(~listed, torch.inf)

        def rows(order: Tensor, wanted: Any) -> list[dict[str, Any]]:
            return [
                {
                    "id": int(i),
                    "text": tokenizer.decode([int(i)]),
                    "difference": round(float(difference[i]), 4),
                    "before": float(before[i]),
                    "after": float(after[i]),
                }
                for i in order[:SHOWN]
                if bool(listed[i]) and wanted(int(i))
            ]

        gain = (after - before).masked_fill(~listed, 0)
        return {
            "places": count,
            "listed": int(listed.sum()),
            "promoted": rows(up.argsort(descending=True, stable=True), lambda i: difference[i] > 0),
            "suppressed": rows(down.argsort(stable=True), lambda i: difference[i] < 0),
            "gained": rows(gain.argsort(descending=True, stable=True), lambda i: gain[i] > 0),
            "lost": rows(gain.argsort(stable=True), lambda i: gain[i] < 0),
        }
