"""Packed batches: sequences end to end in one batch row without padding, and logits only where there is a label.

Padding costs as much as text does, and logits at tokens without a label, a whole vocabulary for each, are computed to
be ignored. A packed batch has neither. Every packed sequence sees itself and the prefix, or the soft prompt, which
stands before all of them and is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .tasks import TASK_IDS

IGNORED = -100
"""The label that transformers' losses leave out."""

_MEDIA = ("pixel_values", "pixel_values_videos", "input_features", "input_values")
"""What a processor makes of images, videos and sounds."""


class PackedCollator:
    """A data collator that packs: `Trainer(model, args, data_collator=PackedCollator(), ...)`.

    For a model with a prefix or a soft prompt attached (`handle.can_pack`). The loss and its gradient are those of the
    same sequences padded on the right, also with gradient accumulation: Trainer counts the same labels (with a soft
    prompt in another loop: if their first tokens have no labels). `Trainer.evaluate` weighs by batch rows, and a packed
    batch is one, so each batch weighs the same in `eval_loss`.

    Each feature is a mapping with `input_ids` (a list or a tensor [T]), perhaps `labels` (as long; -100 where there is
    nothing to learn) and `attention_mask` (as long; 0 where there is padding, which is taken out). What else it holds
    is ignored. Called with a list of features, it returns, for T tokens in all:

    * `input_ids` and `position_ids`, int64 [1, T]; positions restart at 0 in each sequence;
    * `cu_seq_lens_q` and `cu_seq_lens_k`, int32 [sequences + 1]: where the sequences meet, from 0 to T; `max_length_q`
      and `max_length_k`: the longest, an int;
    * with labels, `logits_to_keep`, int64 [L + 1]: the L token indices whose next token has a label, and the last
      index; and `labels`, int64 [1, L + 1], for these logits: `labels[:, i + 1]` belongs to the logits at i, so that
      transformers' losses, label smoothing and metrics shift and count them as they do in any batch. The first token
      of a sequence is never learnt, as nothing in the sequence comes before it (a padded batch learns it after a soft
      prompt, if it has a label, in a loop that gives no `num_items_in_batch`, as Trainer does);
    * where some feature has `task_ids` (a name or a number, for a `PromptBank`), `task_ids`, a list of each one's.

    Raises:
        ValueError: no features, a sequence without a token, lengths that differ within a feature, labels in some of
            the features only, or images or sounds; the message names the feature.

    Examples:
        >>> batch = prefixcore.PackedCollator()([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
        >>> batch["input_ids"]
        tensor([[5, 6, 7, 8, 9]])
        >>> batch["position_ids"]
        tensor([[0, 1, 2, 0, 1]])
        >>> batch["cu_seq_lens_q"]
        tensor([0, 3, 5], dtype=torch.int32)
    """

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not features:
            raise ValueError("expected at least one feature to pack, got none")
        has_labels = [feature.get("labels") is not None for feature in features]
        if any(has_labels) and not all(has_labels):
            raise ValueError(
                f"feature {has_labels.index(False)} has no labels, but others have: give labels for all or for none"
            )
        sequences = [_sequence(feature, index) for index, feature in enumerate(features)]
        lengths = torch.tensor([len(ids) for ids, _ in sequences])
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        longest = int(lengths.max())
        batch: dict[str, Any] = {
            "input_ids": torch.cat([ids for ids, _ in sequences])[None],
            "position_ids": packed_positions(cu_seqlens)[None],
            "cu_seq_lens_q": cu_seqlens.int(),
            "cu_seq_lens_k": cu_seqlens.int(),
            "max_length_q": longest,
            "max_length_k": longest,
        }
        if any(feature.get(TASK_IDS) is not None for feature in features):
            batch[TASK_IDS] = [feature.get(TASK_IDS) for feature in features]
        if has_labels[0]:
            labels = torch.cat([labels for _, labels in sequences])
            labels[cu_seqlens[:-1]] = IGNORED  # nothing in its sequence predicts a first token
            labelled = (labels != IGNORED).nonzero()[:, 0]
            # The logits at i predict token i + 1. The last logits predict nothing: losses shift, and drop them.
            batch["logits_to_keep"] = torch.cat([labelled - 1, cu_seqlens[-1:] - 1])
            batch["labels"] = torch.nn.functional.pad(labels[labelled], (1, 0), value=IGNORED)[None]
        return batch


def _sequence(feature: Mapping[str, Any], index: int) -> tuple[Tensor, Tensor]:
    """The ids and the labels of a feature without its padding, int64 [T] each."""
    media = [name for name in _MEDIA if feature.get(name) is not None]
    if media:
        raise ValueError(
            f"feature {index} has {', '.join(media)}, and a packed batch holds text alone: take a collator that pads, "
            "such as the model's processor"
        )
    ids = _numbers(feature, "input_ids", index)
    labels = _numbers(feature, "labels", index) if feature.get("labels") is not None else ids
    if len(labels) != len(ids):
        raise ValueError(f"feature {index} has {len(ids)} input_ids, but {len(labels)} labels: expected as many")
    if feature.get("attention_mask") is not None:
        mask = _numbers(feature, "attention_mask", index)
        if len(mask) != len(ids):
            raise ValueError(
                f"feature {index} has {len(ids)} input_ids, but an attention_mask of {len(mask)}: expected as many"
            )
        ids, labels = ids[mask != 0], labels[mask != 0]
    if not len(ids):
        raise ValueError(f"feature {index} has no token (padding aside); leave it out of the data")
    return ids, labels


def _numbers(feature: Mapping[str, Any], name: str, index: int) -> Tensor:
    """One field of a feature, int64 [T]."""
    if feature.get(name) is None:
        raise ValueError(f"feature {index} has no {name} (it has {', '.join(feature) or 'nothing'})")
    given = feature[name]
    try:
        values = torch.as_tensor(given)
        whole = values.long() if len(given) else torch.zeros(0, dtype=torch.long)  # of no dtype
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"feature {index}: expected {name} as whole numbers, got {given!r:.80} ({error})") from error
    if values.is_complex() or not bool((values == whole).all()):
        raise ValueError(f"feature {index}: expected {name} as whole numbers, got {given!r:.80}")
    values = whole
    if values.dim() != 1:
        raise ValueError(f"feature {index}: expected {name} as one sequence [T], got {list(values.shape)}")
    return values


def packed_positions(cu_seqlens: Tensor) -> Tensor:
    """Positions [T] that restart at 0 in each packed sequence; `cu_seqlens` [sequences + 1] runs from 0 to T."""
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
    return torch.arange(len(starts), device=cu_seqlens.device) - starts


def lengths_of(positions: Tensor) -> dict[str, Any]:
    """What a packed batch says besides `positions` [1, T], which restart where each sequence begins."""
    starts = torch.nn.functional.pad(positions[0].diff() != 1, (1, 1), value=True).nonzero()[:, 0].int()
    longest = int(starts.diff().max())
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def set_empty_mask(kwargs: dict[str, Any], num_shared: int = 0) -> None:
    """Keeps transformers from building a mask [T, T] for a call that has `cu_seq_lens_q`, in place.

    A mask of four dimensions goes to the attention function as it is, whatever the model family and the transformers
    version. The one put in here is empty, bool [1, 1, num_shared, 0]. Attention drops it where it gets
    `cu_seq_lens_q` too, and raises where a model has lost that. Nothing is remembered between calls.

    Args:
        kwargs: the arguments of the call.
        num_shared: how many tokens before the packed ones are seen by all of them. The mask carries the number, so
            that it reaches attention together with the lengths (`num_shared_tokens`).

    Raises:
        ValueError: a mask that says more than `cu_seq_lens_q`, or `cu_seq_lens_k` of another shape.
    """
    cu_seqlens = kwargs["cu_seq_lens_q"]
    mask, other = kwargs.get("attention_mask"), kwargs.get("cu_seq_lens_k")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all())):
        raise ValueError(
            "attention_mask: expected none in a packed batch (cu_seq_lens_q), whose sequences have no padding and see "
            "themselves alone; take the padding out (PackedCollator does)"
        )
    if other is not None and other.shape != cu_seqlens.shape:
        raise ValueError(f"cu_seq_lens_k: expected {list(cu_seqlens.shape)} as cu_seq_lens_q, got {list(other.shape)}")
    kwargs["attention_mask"] = torch.ones(1, 1, num_shared, 0, dtype=torch.bool, device=cu_seqlens.device)
    if kwargs.get("position_ids") is None:  # transformers would count on through all sequences
        kwargs["position_ids"] = packed_positions(cu_seqlens)[None]


def refuse_cut_batch(kwargs: dict[str, Any]) -> None:
    """Raises ValueError for a packed batch of which only what stands in its first row is left, its first boundary."""
    boundaries, ids = kwargs.get("cu_seq_lens_q"), kwargs.get("input_ids")
    if isinstance(boundaries, Tensor) and boundaries.shape == (1,) and isinstance(ids, Tensor) and ids.numel():
        raise ValueError(
            "cu_seq_lens_q: expected where the packed sequences meet, [sequences + 1], got [1]: accelerate hands out a "
            "batch row by row where the dataset is an IterableDataset (streamed), and has cut this one; let each "
            "process read for itself, TrainingArguments(accelerator_config={'dispatch_batches': False})"
        )


def is_empty_mask(mask: Any) -> bool:
    """Whether it is what `set_empty_mask` puts in."""
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[3] == 0


def num_shared_tokens(mask: Tensor | None) -> int:
    """How many tokens before the packed ones are seen by all of them; `mask` as attention gets it in a packed batch."""
    return mask.shape[2] if mask is not None and is_empty_mask(mask) else 0
