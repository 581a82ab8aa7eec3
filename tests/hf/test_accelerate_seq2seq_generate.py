"""`generate` of an accelerated `PeftModelForSeq2SeqLM` writes what PEFT's does, and its cache holds no prefix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import prefixcore

from .accelerated import PREFIXES, evaluations
from .accelerated_seq2seq import CASES, inputs, with_peft
from .encoder_decoders import GREEDY

pytestmark = pytest.mark.filterwarnings("ignore")


def written(model: Any, method: str, family: str, **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(**inputs(method, family, target=False), **{**GREEDY, **options})


@pytest.mark.parametrize(("family", "method"), CASES)
def test_greedy_beams_and_samples(family: str, method: str) -> None:
    model = with_peft(method, family)
    bare, ways = model.get_base_model(), ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 20})
    without = written(bare, "prompt", family)
    expected = [written(model, method, family, **way) for way in ways]
    accelerated = prefixcore.accelerate(model)
    for way, tokens in zip(ways, expected, strict=True):
        assert torch.equal(written(model, method, family, **way), tokens), way
    with model.disable_adapter():
        assert torch.equal(written(model, method, family), without)
    # Without a cache PEFT loses a prefix behind the first token.
    assert torch.equal(written(model, method, family, use_cache=False), expected[0])
    assert torch.equal(written(bare, "prompt", family), without)
    accelerated.undo()
    assert torch.equal(written(model, method, family), expected[0])


@pytest.mark.parametrize(("family", "method"), [("bart", "prompt"), ("t5", "multitask"), ("marian", "p-tuning")])
def test_disabled_it_is_bare_where_peft_keeps_the_soft_prompt(family: str, method: str) -> None:
    """`PeftModelForSeq2SeqLM.generate` does not ask whether adapters are disabled."""
    model, options = with_peft(method, family), {"output_scores": True, "return_dict_in_generate": True}
    bare = written(model.get_base_model(), "prompt", family, **options).scores[0]
    with model.disable_adapter():
        kept = written(model, method, family, **options).scores[0]
    assert not torch.allclose(kept, bare), "PEFT is mended: generate need not be ours there"
    prefixcore.accelerate(model)
    with model.disable_adapter():
        assert torch.equal(written(model, method, family, **options).scores[0], bare)


@pytest.mark.parametrize(("family", "method"), [case for case in CASES if case[1] != "multitask"])
def test_greedy_tokens_are_those_of_forward(family: str, method: str) -> None:
    """Whatever PEFT's own `generate` does: from transformers 5.24 on it loses a prefix."""
    model, batch = with_peft(method, family), inputs(method, family, target=False)
    ids = torch.full((2, 1), model.config.decoder_start_token_id)
    with torch.no_grad():
        for _ in range(6):
            logits = model(**batch, decoder_input_ids=ids).logits[:, -1]
            logits[:, 2] = -torch.inf  # the end, before which `GREEDY` asks for six tokens
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    prefixcore.accelerate(model)
    assert torch.equal(written(model, method, family), ids)


@pytest.mark.parametrize("method", PREFIXES)
def test_a_step_goes_on_from_a_cache_that_holds_the_text_alone(method: str) -> None:
    model, batch = with_peft(method), inputs(method, target=False)
    ids = torch.tensor([[2, 11, 23, 42], [2, 31, 9, 5]])
    expected = model(**batch, decoder_input_ids=ids).logits
    prefixcore.accelerate(model)
    first = model(**batch, decoder_input_ids=ids[:, :3], use_cache=True)
    assert first.past_key_values.get_seq_length() == 3
    second = model(**batch, decoder_input_ids=ids[:, 3:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), expected, rtol=1e-9, atol=1e-10)


def test_a_projected_prefix_is_computed_once_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_peft("projected prefix")
    prefixcore.accelerate(model)
    calls = evaluations(model, monkeypatch)
    written(model, "projected prefix", "bart")
    assert len(calls) == 1


def test_token_types_are_left_out_with_a_warning() -> None:
    model, batch = with_peft("prefix"), inputs("prefix", target=False)
    expected = written(model, "prefix", "bart")
    prefixcore.accelerate(model)
    with pytest.warns(UserWarning, match="Token type ids are not supported"):
        got = model.generate(**batch, token_type_ids=torch.zeros(2, 7).long(), **GREEDY)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("family", "method"), [("bart", "prefix"), ("t5", "prompt")])
def test_continuous_batching_has_no_encoder(family: str, method: str) -> None:
    model = with_peft(method, family)
    with prefixcore.accelerate(model), pytest.raises(NotImplementedError, match="continuous batching") as refusal:
        model.generate_batch([[5, 6, 7]], max_new_tokens=2)
    assert "prefixcore.load" not in str(refusal.value)  # which could not either
