"""Whether all stages read the same batches: hidden states of one under the labels of another look like training."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_FACTOR = 6364136223846793005
"""Odd, so that products with it, modulo 2**64, lose nothing."""


def next_digest(digest: Tensor | None, batch: dict[str, Any]) -> Tensor:
    """A digest, int64 on the batch's device, of the batches so far and one more: of its ids, masks and positions."""
    with torch.no_grad():
        for name in sorted(batch):
            tensor = batch[name]
            if not isinstance(tensor, Tensor) or tensor.is_floating_point():
                continue
            numbers = tensor.detach().reshape(-1).to(torch.int64)
            places = torch.arange(1, len(numbers) + 1, device=numbers.device) * _FACTOR
            one = (numbers * (places ^ (places >> 29))).sum() + len(numbers)
            digest = one if digest is None else digest.to(one.device) * _FACTOR + one
    return torch.zeros((), dtype=torch.int64) if digest is None else digest


def check_same_batches(digest: Tensor | None, device: torch.device, group: Any) -> None:
    """Raises RuntimeError in every process of `group` unless all have the same digest."""
    own = torch.zeros((), dtype=torch.int64) if digest is None else digest
    own = own.to(device) >> 1  # of which the negative is a number, too
    ends = torch.stack([own, -own])
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
    if bool(ends[0] != -ends[1]):
        raise RuntimeError(
            "the stages have read different batches, so what they have made is no gradient of any: give every process "
            "the whole batch, the same one in the same order (a DataLoader without a DistributedSampler, shuffled with "
            "one seed), and call optimizer.zero_grad() before going on"
        )
