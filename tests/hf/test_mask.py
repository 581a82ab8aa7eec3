"""What the attention function is told about visibility: as little as says everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig
from prefixcore.hf.attention import interface as attention

from .models import make, padded, tokens, window_of


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every call of the op."""
    seen: list[dict[str, Any]] = []
    op = attention.prefix_attention

    def spy(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append({"T": query.shape[2], "S": key.shape[2], **kwargs})
        return op(query, key, *args, **kwargs)

    monkeypatch.setattr(attention, "prefix_attention", spy)
    return seen


def attach(family: str, **changes: Any) -> Any:
    model = make(family, **changes)
    prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=3, init="random"))
    return model


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
@pytest.mark.parametrize("mask", [None, "ones"])
def test_nothing_where_nothing_is_padded(family: str, mask: str | None, calls: list[dict[str, Any]]) -> None:
    model, ids = attach(family, **window_of(family, 4)), tokens(2, 9)
    calls.clear()
    model(ids, attention_mask=None if mask is None else torch.ones_like(ids))
    model.generate(ids, max_new_tokens=4)
    assert len(calls) >= 4
    for call in calls:
        assert call["attn_mask"] is None
        assert call["is_causal"] is True
    windows = {call["sliding_window"] for call in calls}
    assert windows == {"llama": {None}, "gpt2": {None}, "mistral": {4}, "gemma2": {4, None}}[family]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padding_mask_is_the_largest(family: str, side: str, calls: list[dict[str, Any]]) -> None:
    model, batch = attach(family, **window_of(family, 4)), padded(side)
    calls.clear()
    model(**batch)
    assert all(call["attn_mask"].shape == (3, 9) for call in calls)
    assert all(torch.equal(call["attn_mask"], batch["attention_mask"].bool()) for call in calls)
    assert all(call["is_causal"] is True for call in calls)
    if side == "left":
        del batch["labels"]
        model.generate(**batch, max_new_tokens=6, eos_token_id=None)
        # Once a window has passed the padding there is nothing left to mask.
        assert all(c["attn_mask"] is None or c["attn_mask"].shape == (3, c["S"]) for c in calls)


def test_one_mask_a_forward_is_made_not_one_a_layer(calls: list[dict[str, Any]]) -> None:
    model, batch = attach("llama"), padded("left")
    calls.clear()
    model(**batch)
    assert len(calls) == 2
    assert calls[0]["attn_mask"] is calls[1]["attn_mask"]


def test_a_static_cache_gets_a_mask_that_says_everything(calls: list[dict[str, Any]]) -> None:
    model, batch = attach("llama"), padded("left")
    cache = StaticCache(config=model.config, max_cache_len=20)
    calls.clear()
    model(batch["input_ids"], attention_mask=batch["attention_mask"], past_key_values=cache)
    for call in calls:
        assert call["attn_mask"].shape == (3, 1, 9, 20)
        assert call["attn_mask"].dtype == torch.bool
        assert call["is_causal"] is False
        assert not call["attn_mask"][..., 9:].any()


def test_packed_rows_by_their_positions(calls: list[dict[str, Any]]) -> None:
    """Each packed sequence sees the prefix and itself: as in rows of their own."""
    model, ids = attach("llama"), tokens(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
    calls.clear()
    got = model(ids, position_ids=positions, use_cache=False).logits
    assert all(call["attn_mask"] is None and call["cu_seqlens"].tolist() == [0, 4, 7, 9] for call in calls)
    for a, b in ((0, 4), (4, 7), (7, 9)):
        torch.testing.assert_close(got[:, a:b], model(ids[:, a:b]).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_packed_rows_by_their_lengths(family: str, calls: list[dict[str, Any]]) -> None:
    """As `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` makes them: no mask reaches the op."""
    from transformers import DataCollatorWithFlattening

    model = attach(family, **window_of(family, 3))
    parts = [tokens(1, length, seed=length)[0].tolist() for length in (4, 3, 2)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": part, "labels": part} for part in parts])
    calls.clear()
    got = model(**batch)
    assert all(call["attn_mask"] is None and call["cu_seqlens"] is not None for call in calls)
    expected = [model(torch.tensor([part])).logits for part in parts]
    torch.testing.assert_close(got.logits, torch.cat(expected, 1), rtol=1e-5, atol=1e-5)
    got.loss.backward()


def test_a_mask_of_ones_own() -> None:
    """Four dimensions, additive or boolean: over the sequence, beside the prefix, and instead of causality."""
    model, ids = attach("llama"), tokens(2, 6)
    causal = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    additive = torch.zeros(2, 1, 6, 6).masked_fill(~causal, torch.finfo(torch.float32).min)
    expected = model(ids).logits
    for mask in (causal, additive):
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, rtol=1e-5, atol=1e-5)
    both_ways = model(ids, attention_mask=torch.ones(2, 1, 6, 6, dtype=torch.bool)).logits
    assert not torch.allclose(both_ways, expected, atol=1e-3)


@pytest.mark.parametrize("mask", [[[1] * 5] * 2, [[1, 1, 0, 0, 0], [0, 1, 1, 1, 1]]])
@pytest.mark.parametrize("config", [PrefixTuningConfig(3, init="random"), PromptTuningConfig(3, init="random")])
def test_a_mask_that_is_too_short_is_an_error(config: Any, mask: Any) -> None:
    model = make("llama")
    prefixcore.attach(model, config)
    with pytest.raises(ValueError, match=r"attention_mask: expected .* all 6 tokens.*got \[2, 5\]"):
        model(tokens(2, 6), attention_mask=torch.tensor(mask))
