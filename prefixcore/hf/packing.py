"""Packed batches: sequences end to end in one row without padding, and logits only where there is a label.

Padding costs as much as text does, and the logits of a prompt, a whole vocabulary for each token, are computed only
to be ignored. A packed batch has neither. Every packed sequence sees itself and the prefix, or the soft prompt, which
stands before all of them and is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The label that transformers' losses leave out."""


class PackedCollator:
    """A data collator that packs: `Trainer(model, args, data_collator=PackedCollator(), ...)`.

    For a model with a prefix or a soft prompt attached (`handle.can_pack`). The loss and its gradient are those of the
    same sequences padded on the right (with a soft prompt: if their first tokens have no labels), also with gradient
    accumulation: Trainer counts the same labels. To `Trainer.evaluate` a packed batch is one row, so each batch weighs
    the same in `eval_loss`.

    Each feature is a mapping with `input_ids` (a list or a tensor [T]), perhaps `labels` (as long; -100 where there is
    nothing to learn) and `attention_mask` (as long; 0 where there is padding, which is taken out). What else it holds
    is ignored. Called with a list of features, it returns, for T tokens in all:

    * `input_ids` and `position_ids`, int64 [1, T]; positions restart at 0 in each sequence;
    * `cu_seq_lens_q` and `cu_seq_lens_k`, int32 [sequences + 1]: where the sequences meet, from 0 to T; `max_length_q`
      and `max_length_k`: the longest, an int;
    * with labels, `logits_to_keep`, int64 [L + 1]: the L places whose next token has a label, and the last place;
      and `labels`, int64 [1, L + 1], to those logits what labels are to all logits elsewhere: the one at i + 1 is for
      the logits at i. So transformers' losses, label smoothing and metrics shift and count them as they always do.
      The first token of a sequence is never learnt, as nothing in the sequence comes before it (a padded batch learns
      it after a soft prompt, if it has a label).

    Raises:
        ValueError: no features, a sequence without a token, lengths that differ within a feature, or labels in some
            of the features only; the message names the feature.
    """

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not features:
            raise ValueError("expected at least one feature to pack, got none")
        labelled = [feature.get("labels") is not None for feature in features]
        if any(labelled) and not all(labelled):
            raise ValueError(
                f"feature {labelled.index(False)} has no labels, but others have: give labels for all or for none"
            )
        sequences = [_sequence(feature, place) for place, feature in enumerate(features)]
        lengths = torch.tensor([len(ids) for ids, _ in sequences])
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        longest = int(lengths.max())
        batch: dict[str, Any] = {
            "input_ids": torch.cat([ids for ids, _ in sequences])[None],
            "position_ids": packed_positions(ends)[None],
            "cu_seq_lens_q": ends.int(),
            "cu_seq_lens_k": ends.int(),
            "max_length_q": longest,
            "max_length_k": longest,
        }
        if labelled[0]:
            labels = torch.cat([labels for _, labels in sequences])
            labels[ends[:-1]] = IGNORED
            taught = (labels != IGNORED).nonzero()[:, 0]
            # The last place has nothing to predict: it only makes up for the logits that shifting leaves out.
            batch["logits_to_keep"] = torch.cat([taught - 1, ends[-1:] - 1])
            batch["labels"] = torch.nn.functional.pad(labels[taught], (1, 0), value=IGNORED)[None]
        return batch


def _sequence(feature: Mapping[str, Any], place: int) -> tuple[Tensor, Tensor]:
    """The ids and the labels of a feature without its padding, int64 [T] each."""
    ids = _flat(feature, "input_ids", place)
    labels = _flat(feature, "labels", place) if feature.get("labels") is not None else ids
    if len(labels) != len(ids):
        raise ValueError(f"feature {place} has {len(ids)} input_ids, but {len(labels)} labels: expected as many")
    if feature.get("attention_mask") is not None:
        mask = _flat(feature, "attention_mask", place)
        if len(mask) != len(ids):
            raise ValueError(
                f"feature {place} has {len(ids)} input_ids, but an attention_mask of {len(mask)}: expected as many"
            )
        ids, labels = ids[mask != 0], labels[mask != 0]
    if not len(ids):
        raise ValueError(f"feature {place} has no token (padding aside); leave it out of the data")
    return ids, labels


def _flat(feature: Mapping[str, Any], name: str, place: int) -> Tensor:
    if feature.get(name) is None:
        raise ValueError(f"feature {place} has no {name} (it has {', '.join(feature) or 'nothing'})")
    values = torch.as_tensor(feature[name], dtype=torch.long)
    if values.dim() != 1:
        raise ValueError(f"feature {place}: expected {name} as one sequence [T], got {list(values.shape)}")
    return values


def packed_positions(ends: Tensor) -> Tensor:
    """Positions [T] that restart at 0 in each packed sequence; `ends` [sequences + 1] runs from 0 to T."""
    starts = ends[:-1].repeat_interleave(ends.diff())
    return torch.arange(len(starts), device=ends.device) - starts


def leave_mask_to_lengths(kwargs: dict[str, Any], shared: int = 0) -> None:
    """Keeps transformers from building a mask [T, T] for a call that has `cu_seq_lens_q`, in place.

    A mask of four dimensions goes to the attention function as it is, whatever the model family and the transformers
    version; the one put in here is empty, [1, 1, shared, 0]. Attention drops it where it gets `cu_seq_lens_q` too, and
    cannot run with it otherwise. Nothing is remembered between calls.

    Args:
        kwargs: the arguments of the call.
        shared: how many tokens before the packed ones are seen by all of them: attention cannot be told of the lengths
            and not of these (`shared_tokens`).

    Raises:
        ValueError: a mask that says more than `cu_seq_lens_q`, or `cu_seq_lens_k` of another shape.
    """
    ends = kwargs["cu_seq_lens_q"]
    mask, other = kwargs.get("attention_mask"), kwargs.get("cu_seq_lens_k")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all())):
        raise ValueError(
            "attention_mask: expected none in a packed batch (cu_seq_lens_q), whose sequences have no padding and see "
            "themselves alone; take the padding out (PackedCollator does)"
        )
    if other is not None and other.shape != ends.shape:
        raise ValueError(f"cu_seq_lens_k: expected {list(ends.shape)} as cu_seq_lens_q, got {list(other.shape)}")
    kwargs["attention_mask"] = torch.ones(1, 1, shared, 0, dtype=torch.bool, device=ends.device)
    if kwargs.get("position_ids") is None:  # which transformers would count through the whole row
        kwargs["position_ids"] = packed_positions(ends)[None]


def shared_tokens(mask: Tensor | None) -> int:
    """How many tokens before the packed ones are seen by all of them; `mask` as attention gets it in a packed batch."""
    return mask.shape[2] if mask is not None and mask.dim() == 4 and mask.shape[3] == 0 else 0
