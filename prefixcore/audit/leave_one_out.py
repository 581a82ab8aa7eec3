"""What each virtual token does for the loss: the same virtual tokens without it, everything else where it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .probes import Probes
from .progress import Progress
from .running import FrozenRun
from .scoring import losses, per_text
from .virtual import VirtualTokens

LITTLE = 0.01
"""Nats per completion token below which the page calls a change little."""


def leave_one_out(
    run: FrozenRun, probes: Probes, virtual: VirtualTokens, vocabulary: float, progress: Progress
) -> dict[str, Any]:
    """The loss of the probes' completions with all virtual tokens, and without each of them.

    A virtual token of a prefix is taken out of every layer. One of a soft prompt is not read at all, so that the others
    are computed without it too. Positions stay as they are.

    Raises:
        NotMeasuredError: the model takes no positions.
    """
    device = run.model.device

    def loss(tokens: VirtualTokens) -> Tensor:
        return losses(lambda ids, mask: run(ids, mask, tokens), probes.ids, vocabulary, device)

    whole = loss(virtual)
    whole_by_text = per_text(whole, probes.ids)
    removed = []
    for place in progress(virtual.places, "without each virtual token"):
        without = loss(virtual.without(place))
        by_text = per_text(without, probes.ids)
        removed.append(
            {
                "token": place,
                "loss": float(without.double().mean()),
                "change": float((without.double() - whole.double()).mean()),
                "probes_worse": sum(a > b for a, b in zip(by_text, whole_by_text, strict=True)) / len(probes),
            }
        )
    changes = [entry["change"] for entry in removed]
    most = max(range(len(changes)), key=changes.__getitem__)
    return {
        "loss": float(whole.double().mean()),
        "removed": removed,
        "most_needed": removed[most]["token"],
        "largest_change": changes[most],
        "second_largest_change": sorted(changes)[-2] if len(changes) > 1 else None,
        "sum_of_changes": sum(changes),
        "of_little_effect": sum(abs(change) < LITTLE for change in changes),
        "better_without": sum(change < -LITTLE for change in changes),
        "little": LITTLE,
    }
