"""The divergence of the student's distribution from the teacher's, of which the likeliest tokens are known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .targets import Target

_LEAST = 1e-6
"""The least probability of all other tokens together: below, the logarithm would be rounding."""


def divergence(logits: Tensor, top_ids: Tensor, top_log_probs: Tensor) -> Tensor:
    """KL(teacher || student) in nats, one for each token, the tokens beyond the top k counting as one.

    Args:
        logits: the student's [L, V].
        top_ids: of the teacher's likeliest tokens [L, k].
        top_log_probs: their log-probabilities [L, k].
    """
    logits = logits.float()
    student = logits.gather(-1, top_ids) - logits.logsumexp(-1, keepdim=True)
    teacher_rest = _log_rest(top_log_probs)
    student_rest = _log_rest(student)
    known = (top_log_probs.exp() * (top_log_probs - student)).sum(-1)
    return known + teacher_rest.exp() * (teacher_rest - student_rest)


def _log_rest(log_probs: Tensor) -> Tensor:
    """The logarithm of what the others have together."""
    return torch.log1p(-log_probs.exp().sum(-1).clamp(max=1 - _LEAST))


def tops(targets: Sequence[Target], device: torch.device) -> tuple[Tensor, Tensor]:
    """The teacher's ids and log-probabilities [L, k] of all answers, one after the other."""
    ids = torch.cat([target.top_ids for target in targets]).to(device)
    return ids, torch.cat([target.top_log_probs for target in targets]).to(device)
