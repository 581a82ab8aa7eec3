"""The straightforward way: transformers' own eager attention over a cache filled by hand, or over embeddings."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from prefixcore.audit.virtual import VirtualTokens
from prefixcore.hf.attention.discover_cached import cache_name


def run(model: Any, ids: Sequence[int], virtual: VirtualTokens, kept: Sequence[int]) -> Any:
    """One text behind the virtual tokens `kept`, at their own positions; logits and weights of the text alone."""
    model = copy.deepcopy(model)  # its weights are recorded by hooks that stay
    model.set_attn_implementation("eager")
    text = torch.tensor([list(ids)])
    places = torch.arange(text.shape[1])[None] + virtual.count
    with torch.no_grad():
        if virtual.prompt is None:
            cache = DynamicCache(config=model.config)
            for layer in range(model.config.num_hidden_layers):
                key, value = virtual.pairs[layer]
                cache.update(key[None, :, list(kept)], value[None, :, list(kept)], layer)
            output = model(text, **{cache_name(model): cache}, position_ids=places, output_attentions=True)
            return output.logits[0], [weights[0] for weights in output.attentions]
        embeds = torch.cat([virtual.prompt[None, list(kept)], model.get_input_embeddings()(text)], 1)
        places = torch.cat([torch.tensor([list(kept)]), places], 1)
        output = model(inputs_embeds=embeds, position_ids=places, output_attentions=True)
        return output.logits[0, len(kept) :], [weights[0][:, len(kept) :] for weights in output.attentions]


def loss(model: Any, text: Any, virtual: VirtualTokens, kept: Sequence[int]) -> Tensor:
    """The loss of each completion token."""
    logits, _ = run(model, [*text.prompt_ids, *text.completion_ids], virtual, kept)
    first = len(text.prompt_ids) - 1
    scored = logits[first : first + len(text.completion_ids)]
    return torch.nn.functional.cross_entropy(scored, torch.tensor(text.completion_ids), reduction="none")
