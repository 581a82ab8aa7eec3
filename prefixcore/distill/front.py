"""What stands before prompts: the keys and values of a text, computed once, or its tokens before each prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..hf import attach
from ..hf.baking.bake_prefix import check_can_be_exact, ids_to_prefix
from ..hf.reaching import find_attention_layers
from ..nn import PrefixTuningConfig


@dataclass(frozen=True)
class Front:
    """A text before prompts.

    Attributes:
        ids: of its tokens.
        pairs: its keys and values, one (key [Hkv, N, D], value [Hkv, N, Dv]) a layer; None: no prefix is equal to a
            text on this model (a sliding window, layers that are no attention), so that the tokens stand before each
            prompt.
    """

    ids: list[int]
    pairs: list[tuple[Tensor, Tensor]] | None

    @classmethod
    def of(cls, model: PreTrainedModel, ids: Sequence[int]) -> Front:
        """The front of these ids, on a model with nothing attached."""
        ids = list(ids)
        if not ids:
            return cls([], None)
        calls, _ = find_attention_layers(model)
        try:
            check_can_be_exact(model, calls)
        except NotImplementedError:
            return cls(ids, None)
        return cls(ids, ids_to_prefix(model, ids, calls))

    @contextmanager
    def before(self, model: PreTrainedModel) -> Iterator[Reader]:
        """A block in which the model reads prompts behind the text."""
        if self.pairs is None:
            yield Reader(model, self.ids, packed=False)
            return
        with attach(model, PrefixTuningConfig(init=self.pairs)) as handle:
            handle.module.requires_grad_(False)
            yield Reader(model, [], packed=handle.can_pack)


@dataclass(frozen=True)
class Reader:
    """A model that reads prompts behind what stands before them.

    Attributes:
        model: with a prefix attached, or with nothing.
        before: ids to put before each prompt.
        packed: whether it takes packed batches.
    """

    model: Any
    before: list[int]
    packed: bool
