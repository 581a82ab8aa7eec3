"""How much attention falls on the virtual tokens, by layer and head, exactly.

prefixcore's kernels never form attention weights. The weight of a virtual token is `exp(score - lse)`, where `lse`, the
log of the softmax's denominator over the virtual tokens and the text, is what the kernel returns; so only the scores of
the P virtual tokens are formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import prefix_attention
from ..ops.reference import HIDDEN
from .probes import Probes
from .progress import Progress
from .running import FrozenRun, WatchedCall
from .virtual import VirtualTokens


def virtual_weights(call: WatchedCall, in_text: int = 0) -> Tensor:
    """The attention weights [B, H, T, P], float32, of the text's queries on the virtual tokens.

    Args:
        call: a layer's attention, in a run without padding.
        in_text: how many of the call's first keys are a soft prompt's virtual tokens, whose own queries are left out.
    """
    prefix_key, prefix_value = call.prefix if call.prefix is not None else (None, None)
    options = call.options
    _, lse = prefix_attention(
        call.query, call.key, call.value, prefix_key, prefix_value, attn_mask=call.mask, return_lse=True, **options
    )
    query, lse = call.query[:, :, in_text:].float(), lse[:, :, in_text:].float()
    if in_text:
        keys = call.key[:, :, :in_text].float()  # [B, Hkv, P, D]
    elif prefix_key is not None:
        keys = prefix_key[None].float()
    else:
        return query.new_zeros(*query.shape[:3], 0)
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)
    scores = options["scale"] * (query @ keys.transpose(-1, -2))  # [B, H, T, P]
    if options["softcap"]:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    if in_text:
        scores = _hide(scores, call, in_text)
    return torch.exp(scores - lse[..., None])


def _hide(scores: Tensor, call: WatchedCall, in_text: int) -> Tensor:
    """Scores of a soft prompt's keys without those that a window or a mask hides."""
    window, mask = call.options["sliding_window"], call.mask
    if window:
        queries, keys = call.query.shape[2], call.key.shape[2]
        i = torch.arange(in_text, queries, device=scores.device)[:, None] + (keys - queries)
        scores = scores.masked_fill(torch.arange(in_text, device=scores.device) <= i - window, -torch.inf)
    if mask is not None and mask.dim() == 4:
        mask = mask[:, :, in_text:, :in_text]
        hidden = ~mask if mask.dtype == torch.bool else mask <= HIDDEN
        bias = 0 if mask.dtype == torch.bool else mask.masked_fill(hidden, 0)
        scores = (scores + bias).masked_fill(hidden, -torch.inf)
    return scores


@dataclass(frozen=True)
class AttentionMass:
    """Means over the text tokens of the probes, each counting the same.

    Attributes:
        by_head: [layers, H], the share of attention on the virtual tokens together.
        by_token: [layers, P], on each of them, over the heads.
        first_answer: [layers, H], at the place that predicts the first answer token alone.
        uniform: the share if every visible token got the same.
    """

    by_head: Tensor
    by_token: Tensor
    first_answer: Tensor
    uniform: float

    def to_dict(self) -> dict[str, Any]:
        """What the report says, rounded to what means something."""
        layer_means = self.by_head.mean(1)
        top = int(self.by_head.argmax())
        layer, head = divmod(top, self.by_head.shape[1])
        return {
            "mean": float(self.by_head.mean()),
            "mean_at_first_answer": float(self.first_answer.mean()),
            "uniform": self.uniform,
            "by_head": _rounded(self.by_head),
            "by_token": _rounded(self.by_token),
            "first_answer_by_head": _rounded(self.first_answer),
            "largest": {"layer": layer, "head": head, "mass": float(self.by_head.max())},
            "layer_with_most": int(layer_means.argmax()),
            "layer_with_least": int(layer_means.argmin()),
        }


def attention_mass(run: FrozenRun, probes: Probes, virtual: VirtualTokens, progress: Progress) -> AttentionMass:
    """The attention on the virtual tokens while the model reads the probes with their right completions.

    Raises:
        NotMeasuredError: attention that cannot be watched.
    """
    in_text = 0 if virtual.is_prefix else virtual.count
    device = run.model.device
    by_head: dict[int, Tensor] = {}
    by_token: dict[int, Tensor] = {}
    first: dict[int, Tensor] = {}
    uniform, tokens = 0.0, 0
    for text in progress(probes.ids, "attention"):
        ids = torch.tensor([text.prompt_ids + text.completion_ids], device=device)
        answer = len(text.prompt_ids) - 1

        def watch(call: WatchedCall, answer: int = answer) -> None:
            weights = virtual_weights(call, in_text)[0].double().cpu()  # [H, T, P]
            if not weights.shape[2]:
                weights = weights.new_zeros(*weights.shape[:2], virtual.count)
            add(by_head, call.layer, weights.sum(2).sum(1))
            add(by_token, call.layer, weights.sum(1).mean(0))
            add(first, call.layer, weights[:, answer].sum(1))

        run(ids, virtual=virtual, watch=watch)
        tokens += text.length
        uniform += sum(virtual.count / (virtual.count + seen) for seen in range(1, text.length + 1))
    return AttentionMass(
        torch.stack([by_head[layer] for layer in sorted(by_head)]) / tokens,
        torch.stack([by_token[layer] for layer in sorted(by_token)]) / tokens,
        torch.stack([first[layer] for layer in sorted(first)]) / len(probes),
        uniform / tokens,
    )


def add(sums: dict[int, Tensor], layer: int, value: Tensor) -> None:
    """Adds to a layer's sum."""
    sums[layer] = sums[layer] + value if layer in sums else value


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(float(x), 6) for x in row] for row in values]
