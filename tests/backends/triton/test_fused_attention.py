"""PyTorch's fused attention as this PyTorch declares it: what it is called with, and what comes back, without a GPU."""

from __future__ import annotations

import pytest
import torch

from prefixcore.backends.problem import AttentionProblem, attention_problem
from prefixcore.backends.triton import fused_attention


def problem(layout: str, T: int = 40, S: int = 40, is_causal: bool = True) -> AttentionProblem:
    """On the meta device: shapes and strides alone. ``layout``: which of heads and tokens are together in memory."""

    def heads(count: int, length: int) -> torch.Tensor:
        if layout == "heads first":
            return torch.empty(2, count, length, 64, device="meta", dtype=torch.bfloat16)
        if layout == "fused projection":  # slices of [B, T, 3, H, D]
            return torch.empty(2, length, 3, count, 64, device="meta", dtype=torch.bfloat16)[:, :, 0].transpose(1, 2)
        return torch.empty(2, length, count, 64, device="meta", dtype=torch.bfloat16).transpose(1, 2)

    prefix = torch.empty(4, 5, 64, device="meta")
    tensors = heads(8, T), heads(4, S), heads(4, S), prefix, prefix
    return attention_problem(*tensors, is_causal=is_causal, scale=0.1)


@pytest.mark.parametrize("layout", ["heads last", "heads first", "fused projection"])
@pytest.mark.parametrize("kernel", [fused_attention.CUDNN, fused_attention.FLASH], ids=lambda kernel: kernel.name)
def test_what_comes_back(kernel: fused_attention.FusedAttention, layout: str) -> None:
    """The ops exist with these arguments; what they give is laid out as the op promises, whatever the inputs are."""
    p = problem(layout)
    out, lse = kernel.forward(p)
    assert out.shape == p.query.shape
    assert (lse.shape, lse.dtype, lse.is_contiguous()) == (p.query.shape[:3], torch.float32, True)
    grads = kernel.backward(p, torch.empty_like(out), out, lse)
    for x, like in zip((out, *grads), (p.query, p.query, p.key, p.value), strict=True):
        assert (x.shape, x.dtype) == (like.shape, like.dtype)
    assert out.transpose(1, 2).is_contiguous()
    for grad in grads:
        assert (grad if layout == "heads first" else grad.transpose(1, 2)).is_contiguous()


@pytest.mark.parametrize("layout", ["heads last", "heads first", "fused projection"])
def test_cudnn_gets_outputs_in_the_layout_of_its_own(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Its plans are cached by the layouts of query, key and value: an output of another layout would be misread."""
    p = problem(layout)
    given: list[torch.Tensor] = []

    class Spy:
        @staticmethod
        def default(*arguments: torch.Tensor, **_: float) -> tuple[torch.Tensor, ...]:
            given.extend((arguments[0], arguments[4], arguments[5]))
            return p.query, p.key, p.value

    out, lse = fused_attention.CUDNN.forward(p)
    monkeypatch.setattr(fused_attention._aten, "_scaled_dot_product_cudnn_attention_backward", Spy)
    fused_attention.CUDNN.backward(p, torch.empty(2, 8, 40, 64, device="meta", dtype=torch.bfloat16), out, lse)
    assert given[0].stride() == given[1].stride() == torch.empty_like(p.query).stride()
    assert given[2].shape == (2, 8, 40, 1)


@pytest.mark.parametrize(("T", "S", "is_causal", "asked"), [(40, 40, True, True), (1, 40, True, False),
                                                            (40, 70, False, False)])  # fmt: skip
def test_causal_is_asked_for_only_where_it_means_the_same(T: int, S: int, is_causal: bool, asked: bool) -> None:
    p = problem("heads last", T, S, is_causal)
    assert fused_attention.cannot(p) is None
    assert fused_attention._causal(p) is asked


def test_pytorchs_choice_can_be_asked_for() -> None:
    """On the CPU the question has another answer, and the same form."""
    query, key = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)
    choice = torch._fused_sdp_choice(query, key, key, None, 0.0, True, scale=0.1, enable_gqa=True)
    assert isinstance(choice, int)
    parameters = torch.backends.cuda.SDPAParams(query, key, key, None, 0.0, True, True)
    assert torch.backends.cuda.can_use_flash_attention(parameters) is False
    assert fused_attention._active_flash() is None
