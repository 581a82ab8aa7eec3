"""The teacher's hidden states, which the student's are to be like: far more numbers a token than probabilities are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .front import Reader
from .running import in_batches, read
from .targets import Target, shared

MOST_LAYERS = 8
"""Whose output is compared, spread evenly, the last among them: neighbours say much the same."""


@dataclass(frozen=True)
class HiddenStates:
    """What the teacher's layers give at the tokens that teacher and student both read.

    Attributes:
        layers: whose outputs, as indices of a model's `hidden_states`.
        of: by the target's identity, [n, layers, E].
        scale: [layers, E], the standard deviation of each number over all tokens.
    """

    layers: list[int]
    of: dict[int, Tensor]
    scale: Tensor

    @classmethod
    def read(cls, reader: Reader, targets: Sequence[Target], padding: int) -> HiddenStates:
        """Those of the model that reads the targets' prompts and answers behind the text."""
        config = reader.model.config.get_text_config()
        layers = chosen_layers(config.num_hidden_layers)
        found: dict[int, Tensor] = {}
        for indices in in_batches([len(target.answer) for target in targets], config.vocab_size, most=16):
            part = [targets[i] for i in indices]
            rows = [(target.asked.behind, target.answer) for target in part]
            with torch.no_grad():
                _, states = read(reader, rows, padding, layers)
            lengths = [len(prompt) + len(answer) for prompt, answer in rows]
            places = [shared(target, length) for target, length in zip(part, lengths, strict=True)]
            for target, states_of_row in zip(part, picked(states, lengths, places, reader), strict=True):
                found[id(target)] = states_of_row.float().cpu()
        every = torch.cat(list(found.values()))
        scale = every.std(0, correction=0)
        return cls(layers, found, scale.clamp(min=1e-3 * float(scale.mean()) + 1e-12))

    def error(self, states: Tensor, targets: Sequence[Target], reader: Reader) -> Tensor:
        """The student's squared error in standard deviations, the mean over tokens, layers and numbers.

        Args:
            states: of the student, as `read` returns them.
            targets: of the batch.
            reader: the student.
        """
        lengths = [len(target.asked.alone) + len(target.answer) for target in targets]
        places = [shared(target, length) for target, length in zip(targets, lengths, strict=True)]
        own = torch.cat(picked(states, lengths, places, reader)).float()
        teacher = torch.cat([self.of[id(target)] for target in targets]).to(own.device)
        return ((own - teacher) / self.scale.to(own.device)).square().mean()


def chosen_layers(count: int) -> list[int]:
    """Indices of `hidden_states`, of which 0 is the embeddings, spread over a model's layers."""
    number = min(MOST_LAYERS, count)
    return [round((i + 1) * count / number) for i in range(number)]


def picked(states: Tensor, lengths: Sequence[int], places: Sequence[slice], reader: Reader) -> list[Tensor]:
    """The states [n, layers, E] at these places of each row, of rows one after the other."""
    before = len(reader.before)
    rows = states.split([before + length for length in lengths])
    return [row[before + place.start : before + place.stop] for row, place in zip(rows, places, strict=True)]
