"""A cache whose rows are reordered, selected, repeated or given to other tasks, and what `task_ids` may be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from prefixcore import PrefixTuningConfig, PromptBank, PromptTuningConfig
from prefixcore.hf.bank import prompt_calls

from . import tiny_models
from .models import close, make, padded, tokens

CONFIGS = {
    "long": PrefixTuningConfig(5, init="random", seed=1),
    "short": PrefixTuningConfig(2, init="random", seed=2),
    "prompt": PromptTuningConfig(6, init="random", seed=5),
    "short prompt": PromptTuningConfig(1, init="random", seed=6),
}


def fill(model: Any) -> PromptBank:
    bank = PromptBank(model)
    for name, config in CONFIGS.items():
        bank.attach(name, config)
    return bank


SELECTIONS = {
    "reorder": [1, 2, 0],
    "select": [2, 0],
    "select one": [1],
    "repeat": [0, 0, 1, 1, 2, 2],
}


@pytest.mark.parametrize("names", [["long", "short", None], ["prompt", "short prompt", "long"]], ids=str)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2: soft prompts are in the cache itself
@torch.no_grad()
def test_rows_of_a_cache_take_their_tasks_along(family: str, selection: str, names: Any) -> None:
    model, ids = make(family), tokens(3, 8)
    fill(model)
    places = SELECTIONS[selection]
    following = tokens(len(places), 3, seed=5)
    expected = model(torch.cat([ids[places], following], 1), task_ids=[names[i] for i in places]).logits[:, 8:]
    for task_ids in (None, [names[i] for i in places]):
        cache = model(ids, task_ids=names, use_cache=True).past_key_values
        if selection == "repeat":
            cache.batch_repeat_interleave(2)
        elif selection == "reorder":
            cache.reorder_cache(torch.tensor(places))
        else:
            cache.batch_select_indices(torch.tensor(places))
        close(model(following, past_key_values=cache, task_ids=task_ids).logits, expected)


@pytest.mark.parametrize("name", list(CONFIGS))
@torch.no_grad()
def test_generate_does_not_go_on_behind_the_task_of_the_cache(name: str) -> None:
    model, ids = make("llama"), tokens(1, 8)
    fill(model)
    other = "short" if name == "long" else "long"
    cache = model(ids, task_ids=[name]).past_key_values
    with pytest.raises(ValueError, match="filled behind other virtual tokens"):
        model.generate(torch.cat([ids, ids], 1), past_key_values=cache, task_ids=[other], max_new_tokens=2)


@torch.no_grad()
def test_a_cache_cropped_into_its_soft_prompt_is_refused() -> None:
    model, ids = make("gemma2"), tokens(1, 8)
    fill(model)
    cache = model(ids, task_ids="prompt", past_key_values=DynamicCache()).past_key_values
    cache.crop(4 - cache.get_seq_length())
    with pytest.raises(ValueError, match="cropped to 4 tokens"):
        model(ids, task_ids="prompt", past_key_values=cache)


@pytest.mark.parametrize("name", list(CONFIGS))
@torch.no_grad()
def test_a_cache_from_a_tuple(name: str) -> None:
    model, ids, following = make("gemma2"), tokens(1, 8), tokens(1, 3)
    fill(model)
    cache = model(ids, task_ids=name, use_cache=True, return_dict=False)[1]
    expected = model(torch.cat([ids, following], 1), task_ids=name).logits[:, 8:]
    close(model(following, past_key_values=cache, task_ids=name).logits, expected)


def test_fewer_task_ids_than_rows_are_refused() -> None:
    model = make("llama")
    fill(model)
    with pytest.raises(ValueError, match="one for each of 4 rows, got 2"):
        model(tokens(4, 5), task_ids=["long", "short"])


@pytest.mark.parametrize(
    "task_ids",
    [
        np.array([0, 1]),
        [np.int64(0), np.int32(1)],
        np.array(["long", "short"]),
        [torch.tensor(0), torch.tensor([1])],
        torch.tensor([[0], [1]]),
    ],
    ids=str,
)
def test_numbers_and_names_of_any_library(task_ids: Any) -> None:
    model, ids = make("llama"), tokens(2, 5)
    fill(model)
    assert torch.equal(model(ids, task_ids=task_ids).logits, model(ids, task_ids=["long", "short"]).logits)


@pytest.mark.parametrize("name", ["keys", "type", "_modules", "0", "-1"])
def test_names_that_modules_have_methods_of(name: str) -> None:
    model = make("llama")
    bank = PromptBank(model)
    bank.attach(name, CONFIGS["long"])
    assert any(key.startswith(f"prefixcore.{name}.") for key in model.state_dict())
    bank.attach(name, CONFIGS["short"], replace=True)
    model(tokens(1, 4), task_ids=[name], labels=tokens(1, 4)).loss.backward()
    assert all(p.grad is not None for p in bank[name].parameters())
    bank.remove(name)
    assert not any(key.startswith(f"prefixcore.{name}.") for key in model.state_dict())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_padding_inside_a_text_moves_no_position(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a soft prompt is computed, and whatever calls came before."""
    ids = tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[0, 3:5] = 0
    seen, found = mask.bool(), []
    for size in (0, 2**60):
        monkeypatch.setattr(prompt_calls, "WORTH", {"cpu": size, "gpu": size})
        model = make(family)
        fill(model).remove("long")
        found.append(model(ids, attention_mask=mask, task_ids="prompt", use_cache=False).logits[seen])
    close(found[0], found[1])
    close(found[0][:6], model(ids[:1, seen[0]], task_ids="prompt", use_cache=False).logits[0])


@torch.no_grad()
def test_rows_without_a_task_in_a_bank_of_soft_prompts() -> None:
    """Positions come from the mask there too, before and after a call that needs our attention."""
    model, batch = make("gpt2"), padded("left")
    PromptBank(model).attach("prompt", CONFIGS["prompt"])
    inputs, seen = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}, batch["attention_mask"]
    before = model(**inputs, task_ids=[None] * 3).logits[seen.bool()]
    model(**inputs, task_ids=["prompt", None, None])
    close(before, model(**inputs, task_ids=[None] * 3).logits[seen.bool()])


@pytest.mark.filterwarnings("ignore:.*is not among the families")
@pytest.mark.parametrize("name", ["BloomForCausalLM", "GPTJForCausalLM", "MambaForCausalLM", "CTRLLMHeadModel"])
@torch.no_grad()
def test_mixed_rows_of_models_that_are_not_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bloom and others hand no arguments on to the model without a head; CTRL scales embeddings in place."""
    monkeypatch.setattr(prompt_calls, "WORTH", {"cpu": 0, "gpu": 0})
    model, ids = tiny_models.make(name, tiny_models.every_class()[name]).eval(), tokens(3, 9)
    bank = PromptBank(model)
    handles = [bank.attach(name, CONFIGS[name]) for name in ("prompt", "short prompt")]
    before = [p.clone() for handle in handles for p in handle.parameters()]
    names = ["prompt", None, "short prompt"]
    together = model(ids, task_ids=names).logits
    for row, name in enumerate(names):
        close(together[row], model(ids[row : row + 1], task_ids=[name]).logits[0])
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    model.generate(ids, attention_mask=torch.ones_like(ids), task_ids=names, **options)
    assert all(torch.equal(p, q) for p, q in zip(before, (p for h in handles for p in h.parameters()), strict=True))


@pytest.mark.filterwarnings("ignore:.*is not among the families")
@pytest.mark.parametrize("name", ["BartForCausalLM", "RecurrentGemmaForCausalLM"])
@torch.no_grad()
def test_models_that_count_padding_refuse_rows_of_different_lengths(name: str) -> None:
    model = tiny_models.make(name, tiny_models.every_class()[name], is_decoder=True)
    ids = tokens(2, 9)
    bank = PromptBank(model)
    bank.attach("prompt", CONFIGS["prompt"])
    bank.attach("short prompt", CONFIGS["short prompt"])
    bank.attach("other prompt", PromptTuningConfig(6, init="random", seed=7))
    with pytest.raises(NotImplementedError, match="soft prompts of one length"):
        model(ids, task_ids=["prompt", "short prompt"])
    together = model(ids, task_ids=["prompt", "other prompt"]).logits
    close(together[1], model(ids[1:], task_ids=["other prompt"]).logits[0])


@pytest.mark.filterwarnings("ignore:.*is not among the families")
@torch.no_grad()
def test_a_model_that_counts_from_two_has_rows_of_different_lengths() -> None:
    """RoBERTa as a decoder: each row is told positions that begin at 2, as it counts by itself."""
    model = tiny_models.make("RobertaForCausalLM", "roberta", is_decoder=True)
    ids = tokens(2, 9)
    bank = PromptBank(model)
    bank.attach("prompt", CONFIGS["prompt"])
    bank.attach("short prompt", CONFIGS["short prompt"])
    together = model(ids, task_ids=["prompt", "short prompt"]).logits
    for row, name in enumerate(["prompt", "short prompt"]):
        close(together[row], model(ids[row : row + 1], task_ids=[name]).logits[0])
