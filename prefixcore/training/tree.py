"""Examples as a tree: what several of them begin with stands in a batch once, and is computed once.

A causal model makes of a token what the tokens before it say, so the same beginning is the same in each example. The
batch is one row of the tree's tokens. Positions count from the root, and a token sees those on its way there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .data import IGNORED, TokenizedExample

WORTH = 0.9
"""The most of the packed batch's work that the tree's may be: making it takes time, too."""


def paths_of(examples: Sequence[TokenizedExample]) -> tuple[list[list[int]], list[int]]:
    """For each example the nodes on its way from the root; and the token of each node."""
    place: dict[tuple[int, int], int] = {}
    tokens: list[int] = []
    paths = []
    for example in examples:
        node, path = -1, []
        for token in (*example.prompt_ids, *example.completion_ids):
            if (node, token) not in place:
                place[node, token] = len(tokens)
                tokens.append(token)
            node = place[node, token]
            path.append(node)
        paths.append(path)
    return paths, tokens


def is_worth(paths: Sequence[Sequence[int]], nodes: int, hidden_size: int) -> bool:
    """Whether a tree is less work than its examples packed.

    In units of 4 E operations a layer: products with weights are about 24 E^2 a token, attention 4 E a pair of tokens.
    The tree's mask is dense, so all pairs count; of a packed example half do.
    """
    lengths = [len(path) for path in paths]
    packed = sum(lengths) * 6 * hidden_size + sum(length**2 for length in lengths) / 2
    return nodes * 6 * hidden_size + nodes**2 <= WORTH * packed


def tree(
    examples: Sequence[TokenizedExample], hidden_size: int, device: torch.device
) -> tuple[dict[str, Any], list[Tensor]] | None:
    """Examples as arguments of a model, and for each where its tokens stand; None: packed, they are less work.

    The loss is the packed batch's: every labelled token of every example counts, also where several stand in one place.

    Args:
        examples: of a batch.
        hidden_size: E of the model.
        device: where the tensors go.

    Returns:
        `input_ids` and `position_ids` [1, T]; `attention_mask` [1, 1, T, T], True where a token is seen;
        `logits_to_keep` [L + 1] and `labels` [1, L + 1], as of `prefixcore.PackedCollator`.
    """
    paths, tokens = paths_of(examples)
    if not is_worth(paths, len(tokens), hidden_size):
        return None
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    positions = torch.zeros(len(tokens), dtype=torch.long)
    kept: list[int] = []
    labels: list[int] = [IGNORED]
    places = []
    for example, path in zip(examples, paths, strict=True):
        place = torch.tensor(path)
        mask[place[:, None], place] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
        positions[place] = torch.arange(len(path))
        for before, label in zip(path, example.labels[1:], strict=False):  # nothing comes before the first token
            if label != IGNORED:
                kept.append(before)
                labels.append(label)
        places.append(place.to(device))
    arguments = {
        "input_ids": torch.tensor([tokens]),
        "position_ids": positions[None],
        "attention_mask": mask[None, None],
        "logits_to_keep": torch.tensor([*kept, len(tokens) - 1]),
        "labels": torch.tensor([labels]),
    }
    return {name: value.to(device) for name, value in arguments.items()}, places
