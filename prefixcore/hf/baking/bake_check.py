"""Whether a baked prefix is equal to what it was baked from: logits and greedy tokens, on a few inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters import AdapterError
from ..families import text_config
from ..positions.model_inputs import SEQUENCE, head_of, plain_ids

NEW_TOKENS = 8
"""How many greedy tokens are compared after each input."""

_LENGTHS = (1, 6, 23)
"""Of the inputs that are compared where nobody gives any."""

_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""By dtype, the difference that rounding alone may make, as a share of the largest logit. In bfloat16 two ways of the
same attention differ by three hundredths after thirty layers (SmolLM2), in float32 by two millionths."""

_MISSING = 0.2
"""The share of what the virtual tokens do to the logits that may be missing; for halves, whose rounding is large."""

_TIMES = 4
"""How many times the rounding that is seen in the original itself may be seen between the two."""

Run = Callable[[Tensor], Tensor]
"""Logits [T, V] of ids [T], or [1, labels] of a head for sequences."""


@dataclass(frozen=True)
class Comparison:
    """How far a baked prefix is from what it was baked from.

    Attributes:
        num_inputs: how many inputs were compared.
        num_tokens: how many greedy tokens were; none of a model that classifies.
        largest_difference: of two logits.
        largest_logit: of the original.
        tolerance: what rounding may make of it in this dtype, on this model.
        num_ties: greedy tokens that differ, where two logits are closer than that.
    """

    num_inputs: int
    num_tokens: int
    largest_difference: float
    largest_logit: float
    tolerance: float
    num_ties: int

    def __str__(self) -> str:
        tokens = (
            f", {self.num_tokens - self.num_ties} of {self.num_tokens} greedy tokens equal" if self.num_tokens else ""
        )
        ties = f" ({self.num_ties} near ties)" if self.num_ties else ""
        return (
            f"{self.num_inputs} inputs: largest difference of two logits {self.largest_difference:.2g} "
            f"(the largest logit is {self.largest_logit:.3g}){tokens}{ties}"
        )


def default_inputs(model: PreTrainedModel, virtual: int) -> list[Tensor]:
    """Ids [T] of a few inputs, as long as there is room after `virtual` tokens."""
    longest = getattr(text_config(model), "max_position_embeddings", None)
    room = max(1, longest - virtual - NEW_TOKENS) if isinstance(longest, int) else max(_LENGTHS)
    lengths = sorted({min(length, room) for length in _LENGTHS})
    return [plain_ids(model, length)[0] for length in lengths]


def greedy(model: PreTrainedModel, run: Run, ids: Tensor) -> tuple[Tensor, float]:
    """`ids` with the likeliest tokens after them, and the rounding seen meanwhile.

    Each token's logits are computed twice, in sequences of different lengths, which is the same but for rounding.
    """
    if head_of(model) == SEQUENCE or not model.can_generate():
        return ids, 0.0
    steps, begin = [], len(ids)
    for _ in range(NEW_TOKENS):
        steps.append(run(ids)[-1])
        ids = torch.cat((ids, steps[-1].argmax()[None].to(ids)))
    whole = run(ids[:-1])[begin - 1 :]
    return ids[:-1], float((whole - torch.stack(steps)).abs().max())


class Check:
    """The original's logits on some inputs, to be held against the baked prefix's.

    Args:
        model: the model.
        original: the model as it is before baking.
        inputs: ids [T] of each.
    """

    def __init__(self, model: PreTrainedModel, original: Run, inputs: Sequence[Tensor]) -> None:
        self.dtype, self.begins = model.dtype, [len(ids) for ids in inputs]
        self.generates = head_of(model) != SEQUENCE and model.can_generate()
        found = [greedy(model, original, ids) for ids in inputs]
        self.inputs = [ids for ids, _ in found]
        self.rounding = max(rounding for _, rounding in found)
        self.logits = [original(ids).double() for ids in self.inputs]
        self.effects: list[Tensor] = []

    def measure_effect(self, bare: Run) -> None:
        """Notes what the virtual tokens do to the logits of `bare`, the model without them."""
        self.effects = [logits - bare(ids).double() for ids, logits in zip(self.inputs, self.logits, strict=True)]

    def compare(self, baked: Run) -> Comparison:
        """Raises AdapterError unless `baked` is equal to the original but for rounding."""
        largest_logit = max(float(logits.abs().max()) for logits in self.logits)
        floor = _ROUNDING.get(self.dtype, _ROUNDING[torch.bfloat16]) * largest_logit
        tolerance = max(floor, _TIMES * self.rounding)
        largest, tokens, ties = 0.0, 0, 0
        rows = zip(self.inputs, self.begins, self.logits, self.effects, strict=True)
        for ids, begin, expected, effect in rows:
            got = baked(ids).double()
            if got.shape != expected.shape:
                raise AdapterError(f"the baked prefix gives logits {list(got.shape)}, expected {list(expected.shape)}")
            difference = float((got - expected).abs().max())
            largest = max(largest, difference)
            if not difference <= tolerance or _misses(effect, expected - got, tolerance):
                hint = ""
                if self.dtype in (torch.float16, torch.bfloat16):
                    hint = (
                        "; or it rounds more, as with experts: bake with the model in float32, to serve it in any dtype"
                    )
                raise AdapterError(
                    "the baked prefix is not equal to what it was baked from, and is not written: on an input of "
                    f"{begin} tokens two logits differ by {difference:.3g}, where rounding in "
                    f"{str(self.dtype).removeprefix('torch.')} makes at most {tolerance:.3g}. This model does more "
                    f"with tokens in front than a prefix can stand for: serve the soft prompt or the text itself{hint}"
                )
            if self.generates:
                count, differ = self._tokens(expected[begin - 1 :], got[begin - 1 :])
                tokens, ties = tokens + count, ties + differ
        return Comparison(len(self.inputs), tokens, largest, largest_logit, tolerance, ties)

    def _tokens(self, expected: Tensor, got: Tensor) -> tuple[int, int]:
        """How many greedy tokens there are, and how many differ; as logits differ by rounding, those are near ties."""
        return len(expected), int((expected.argmax(-1) != got.argmax(-1)).sum())


def _misses(effect: Tensor, missing: Tensor, tolerance: float) -> bool:
    """Whether too much of the effect is missing, where there is more of it than rounding could make."""
    return float(effect.abs().max()) > _TIMES * tolerance and float(missing.norm()) > _MISSING * float(effect.norm())
