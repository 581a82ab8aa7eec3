"""The divergence from the teacher, of whose distribution the likeliest tokens are known."""

from __future__ import annotations

import pytest
import torch

from prefixcore.distill.divergence import divergence


def lumped(probabilities, top_ids):
    """A distribution over the top tokens and all others together, in float64."""
    top = probabilities.gather(-1, top_ids)
    return torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)


@pytest.mark.parametrize("k", [1, 5, 29])
def test_it_is_the_divergence_of_the_top_tokens_and_the_rest(k):
    torch.manual_seed(0)
    teacher, student = torch.randn(7, 30).mul(3), torch.randn(7, 30).mul(3).requires_grad_()
    top = teacher.log_softmax(-1).topk(k)
    found = divergence(student, top.indices, top.values)
    p, q = (lumped(logits.double().softmax(-1), top.indices) for logits in (teacher, student))
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert torch.isfinite(student.grad).all()


def test_it_is_zero_of_the_same_and_finite_where_nothing_is_left():
    logits = torch.tensor([[40.0, 0.0, 0.0]], requires_grad=True)
    top = logits.detach().log_softmax(-1).topk(2)
    found = divergence(logits, top.indices, top.values)
    assert abs(found.item()) < 1e-5
    far = divergence(torch.tensor([[-40.0, 0.0, 0.0]], requires_grad=True), top.indices, top.values)
    assert torch.isfinite(far).all()
    assert far.item() > 30
