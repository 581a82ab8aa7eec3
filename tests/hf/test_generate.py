"""`generate` with a prefix: every way of decoding that the bare model has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import set_seed

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig

from .models import FAMILIES, Tokenizer, after, make, padded, tokens

TEXT = "abcdef"
BOTH = [PrefixTuningConfig(init_text=TEXT), PromptTuningConfig(init_text=TEXT)]


def options(**changes: Any) -> dict[str, Any]:
    return {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, **changes}


@pytest.mark.parametrize("config", BOTH)
@pytest.mark.parametrize(
    "way",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "top_k": 20, "temperature": 0.8},
        {"do_sample": True, "num_return_sequences": 3},
        {"use_cache": False},
        {"prefill_chunk_size": 2},
        {"prompt_lookup_num_tokens": 3},
        {"guidance_scale": 1.5},
        {"guidance_scale": 1.5, "negative_prompt_ids": tokens(2, 4, seed=3)},
    ],
    ids=lambda way: "-".join(way),
)
def test_as_the_text_itself(config: Any, way: dict[str, Any]) -> None:
    """The bare model continues [text][ids]; with the text attached it continues [ids] in the same way."""
    model, ids = make("llama"), tokens(1 if "prompt_lookup_num_tokens" in way else 2, 7)
    set_seed(5)
    expected = model.generate(after(TEXT, ids), **options(**way))[:, len(TEXT) :]
    prefixcore.attach(model, config, tokenizer=Tokenizer())
    set_seed(5)
    assert torch.equal(model.generate(ids, **options(**way)), expected)


@pytest.mark.parametrize("config", BOTH)
def test_with_an_assistant(config: Any) -> None:
    model, assistant, ids = make("llama"), make("llama", seed=9, num_hidden_layers=1), tokens(1, 7)
    prefixcore.attach(model, config, tokenizer=Tokenizer())
    expected = model.generate(ids, **options())
    assert torch.equal(model.generate(ids, assistant_model=assistant, **options()), expected)


@pytest.mark.parametrize("config", BOTH)
def test_its_own_first_layers_as_the_assistant(config: Any) -> None:
    model, ids = make("llama"), tokens(1, 7)
    prefixcore.attach(model, config, tokenizer=Tokenizer())
    expected = model.generate(ids, **options())
    assert torch.equal(model.generate(ids, assistant_early_exit=1, **options()), expected)
    assert torch.equal(model.generate(ids, **options()), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["none", "left"])
def test_static_cache(family: str, side: str) -> None:
    model, batch = make(family), padded(side)
    del batch["labels"]
    prefixcore.attach(model, BOTH[0], tokenizer=Tokenizer())
    expected = model.generate(**batch, **options())
    assert torch.equal(model.generate(**batch, **options(cache_implementation="static")), expected)


@pytest.mark.parametrize("new", [1, 2, 9])
def test_static_cache_of_every_length(new: int) -> None:
    """With one new token the cache is exactly as long as the prompt."""
    model, batch = make("mistral", sliding_window=5), padded("left")
    del batch["labels"]
    prefixcore.attach(model, BOTH[0], tokenizer=Tokenizer())
    expected = model.generate(**batch, **options(max_new_tokens=new))
    got = model.generate(**batch, **options(max_new_tokens=new, cache_implementation="static"))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_is_that_of_each_row_alone(family: str) -> None:
    model, batch = make(family), padded("left")
    del batch["labels"]
    prefixcore.attach(model, BOTH[0], tokenizer=Tokenizer())
    together = model.generate(**batch, **options())
    for row, mask in enumerate(batch["attention_mask"].bool()):
        alone = batch["input_ids"][row : row + 1, mask]
        assert torch.equal(together[row, 9:], model.generate(alone, **options())[0, alone.shape[1] :])


def test_the_cache_holds_the_sequence_alone() -> None:
    model, ids = make("llama"), tokens(2, 7)
    prefixcore.attach(model, BOTH[0], tokenizer=Tokenizer())
    out = model.generate(ids, return_dict_in_generate=True, **options())
    assert out.past_key_values.get_seq_length() == ids.shape[1] + 9


def test_going_on_from_a_cache() -> None:
    """A second question after the first answer, without reading the first again."""
    model, ids, more = make("llama"), tokens(1, 7), tokens(1, 4, seed=2)
    prefixcore.attach(model, BOTH[0], tokenizer=Tokenizer())
    first = model.generate(ids, return_dict_in_generate=True, **options())
    question = torch.cat((first.sequences, more), 1)
    expected = model.generate(question, **options())
    assert torch.equal(model.generate(question, past_key_values=first.past_key_values, **options()), expected)


def test_a_soft_prompt_goes_on_from_a_cache() -> None:
    """Its cache holds the text alone, so generate cuts the new text where it should."""
    model, ids, more = make("llama"), tokens(1, 7), tokens(1, 4, seed=2)
    prefixcore.attach(model, BOTH[1], tokenizer=Tokenizer())
    first = model.generate(ids, return_dict_in_generate=True, **options())
    assert first.past_key_values.get_seq_length() == ids.shape[1] + 9
    question = torch.cat((first.sequences, more), 1)
    expected = model.generate(question, **options())
    assert torch.equal(model.generate(question, past_key_values=first.past_key_values, **options()), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["none", "left"])
def test_a_soft_prompt_and_a_static_cache(family: str, side: str) -> None:
    """Where a window could leave the prompt behind, the prompt would need room in the cache."""
    model, batch = make(family), padded(side)
    del batch["labels"]
    prefixcore.attach(model, BOTH[1], tokenizer=Tokenizer())
    if family in ("gemma2", "gpt_oss"):
        with pytest.raises(NotImplementedError, match="static cache has no room"):
            model.generate(**batch, **options(cache_implementation="static"))
        return
    expected = model.generate(**batch, **options())
    for _ in range(2):  # generate keeps the cache, and empties it
        assert torch.equal(model.generate(**batch, **options(cache_implementation="static")), expected)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("gemma2", "gpt_oss")])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_static_cache_in_the_first_call_of_all(family: str, attention: str) -> None:
    """`generate` makes its masks before the model, which until then has the attention of its own, is called."""
    model, ids = make(family, attn_implementation=attention), tokens(2, 7)
    expected = model.generate(after(TEXT, ids), **options())[:, len(TEXT) :]
    prefixcore.attach(model, BOTH[1], tokenizer=Tokenizer())
    assert torch.equal(model.generate(ids, **options(cache_implementation="static")), expected)


def test_a_soft_prompt_before_no_text_is_refused() -> None:
    model = make("llama")
    prefixcore.attach(model, BOTH[1], tokenizer=Tokenizer())
    with pytest.raises(ValueError, match="the rows have no tokens"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), **options())


@pytest.mark.parametrize("length", [1, len(TEXT) - 1, len(TEXT), len(TEXT) + 1, 12])
def test_a_soft_prompt_that_a_window_may_leave_goes_on_from_a_cache(length: int) -> None:
    """Its cache holds the virtual tokens, too, by which generate cuts too much of the new text."""
    model, ids, more = make("mistral", sliding_window=64), tokens(1, 7), tokens(1, 12, seed=2)
    prefixcore.attach(model, BOTH[1], tokenizer=Tokenizer())
    first = model.generate(ids, return_dict_in_generate=True, **options())
    question = torch.cat((first.sequences, more[:, :length]), 1)
    expected = model.generate(question, **options())
    cache = copy.deepcopy(first.past_key_values)
    with pytest.raises(ValueError, match="leave prefill_chunk_size out"):  # cut before we see it
        model.generate(question, past_key_values=cache, prefill_chunk_size=3, **options())
    assert torch.equal(model.generate(question, past_key_values=first.past_key_values, **options()), expected)


@pytest.mark.parametrize("config", BOTH)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_cache_from_elsewhere_is_refused(family: str, config: Any) -> None:
    """Filled without virtual tokens, behind others, or given to a model that has none any longer."""
    model, ids = make(family), tokens(1, 7)
    with torch.no_grad():
        bare = model(ids, use_cache=True).past_key_values
        handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
        with pytest.raises(ValueError, match="computed without these virtual tokens"):
            model(tokens(1, 1), past_key_values=bare)
        cache = model(ids, use_cache=True).past_key_values
        expected = model(tokens(1, 1), past_key_values=copy.deepcopy(cache)).logits
        with handle.disabled(), pytest.raises(RuntimeError, match="filled by a model with virtual tokens"):
            model(tokens(1, 1), past_key_values=copy.deepcopy(cache))
        assert torch.equal(model(tokens(1, 1), past_key_values=copy.deepcopy(cache)).logits, expected)
        handle.detach()
        with pytest.raises(RuntimeError, match="filled by a model with virtual tokens"):
            model(tokens(1, 1), past_key_values=copy.deepcopy(cache))
        prefixcore.attach(model, config, tokenizer=Tokenizer())  # the same values, but who could tell
        with pytest.raises(ValueError, match="behind other virtual tokens"):
            model(tokens(1, 1), past_key_values=cache)
        cache.crop(-cache.get_seq_length())
        if cache.get_seq_length() == 0:  # older transformers crop otherwise
            model(ids, past_key_values=cache)


def test_an_emptied_cache_is_the_bare_models_again() -> None:
    model, ids = make("llama"), tokens(1, 7)
    with prefixcore.attach(model, BOTH[0], tokenizer=Tokenizer()):
        cache = model(ids, use_cache=True).past_key_values
    expected = model(ids).logits
    cache.crop(-cache.get_seq_length())
    assert cache.get_seq_length() == 0
    assert torch.equal(model(ids, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("config", BOTH)
def test_from_embeddings(config: Any) -> None:
    model, ids = make("llama"), tokens(2, 7)
    prefixcore.attach(model, config, tokenizer=Tokenizer())
    embeds = model.get_input_embeddings()(ids)
    expected = model.generate(ids, **options())[:, 7:]
    assert torch.equal(model.generate(inputs_embeds=embeds, **options()), expected)


@pytest.mark.parametrize("config", BOTH)
def test_a_loop_of_ones_own(config: Any) -> None:
    """Token by token with a cache, without explicit positions or masks."""
    model, ids = make("llama"), tokens(2, 7)
    prefixcore.attach(model, config, tokenizer=Tokenizer())
    expected = model.generate(ids, **options())
    got, cache, step = ids, None, ids
    for _ in range(10):
        out = model(step, past_key_values=cache, use_cache=True)
        step, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        got = torch.cat((got, step), 1)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("config", BOTH)
def test_under_inference_mode_and_then_trained(config: Any) -> None:
    model, ids = make("llama"), tokens(2, 7)
    handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
    with torch.inference_mode():
        before = model.generate(ids, **options())
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(handle.parameters(), lr=5.0).step()
    after = model.generate(ids, **options())
    assert not torch.equal(before, after)
