"""`generate` of an accelerated PEFT model writes what its own `forward` says, whatever PEFT finds the cache by."""

from __future__ import annotations

import functools
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import prefixcore
from prefixcore.hf.model.sample_inputs import CACHES

from .accelerated import METHODS, PREFIXES, with_peft
from .models import close, tokens

PROMPTS = [method for method in METHODS if method not in PREFIXES]


def options(method: str) -> dict[str, Any]:
    rows = {"task_ids": torch.tensor([2, 0, 1])} if method == "multitask" else {}
    return {**rows, "attention_mask": torch.ones(3, 7, dtype=torch.long)}


def written(model: Any, method: str, **more: Any) -> Any:
    more = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, **options(method), **more}
    return model.generate(input_ids=tokens(3, 7), **more)


def written_by_forward(model: Any, method: str) -> Tensor:
    """The greedy tokens, each from a forward over all that stand before it."""
    rows = {name: value for name, value in options(method).items() if name == "task_ids"}
    ids = tokens(3, 7)
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(input_ids=ids, **rows).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.fixture
def cache_of_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT 0.21 with transformers 5.24: it prepares a step without seeing the cache, which the model does get."""
    prepare = peft.PeftModelForCausalLM.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def unseeing(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        base, hidden = self.base_model_prepare_inputs_for_generation, {}

        def without_cache(*args: Any, **kwargs: Any) -> dict[str, Any]:
            inputs = base(*args, **kwargs)
            hidden.update({name: inputs.pop(name) for name in CACHES if name in inputs})
            return inputs

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(self.__dict__, "base_model_prepare_inputs_for_generation", without_cache)
            inputs = prepare(self, *args, **kwargs)
        return {**inputs, **hidden}

    monkeypatch.setattr(peft.PeftModelForCausalLM, "prepare_inputs_for_generation", unseeing)


@pytest.mark.parametrize("method", METHODS)
def test_greedy_tokens_are_those_of_forward(method: str) -> None:
    model = with_peft(method).eval()
    expected = written_by_forward(model, method)
    prefixcore.accelerate(model)
    assert torch.equal(written(model, method), expected)


@pytest.mark.parametrize("method", PROMPTS)
@pytest.mark.usefixtures("cache_of_another_name")
def test_so_they_are_where_peft_finds_no_cache(method: str) -> None:
    model = with_peft(method).eval()
    expected = written_by_forward(model, method)
    assert not torch.equal(written(model, method), expected), "PEFT puts the prompt before each token"
    with prefixcore.accelerate(model):
        assert torch.equal(written(model, method), expected)
        with model.disable_adapter():
            bare = written(model, "prompt")
    assert torch.equal(bare, written(model.get_base_model(), "prompt"))
    assert not torch.equal(written(model, method), expected), "undo gives PEFT's own back"


@pytest.mark.usefixtures("cache_of_another_name")
@pytest.mark.parametrize("more", [{"num_beams": 3}, {"use_cache": False}], ids=str)
def test_so_they_are_with_beams_and_without_a_cache(more: dict[str, Any]) -> None:
    model = with_peft("prompt").eval()
    prompt = model.get_prompt(1)[0].detach()
    prefixcore.accelerate(model)
    got = written(model, "prompt", **more)
    handle = prefixcore.attach(model.get_base_model(), prefixcore.PromptTuningConfig(len(prompt)))
    handle.module.embedding.data.copy_(prompt)
    assert torch.equal(got, written(model.get_base_model(), "prompt", **more))


@pytest.mark.parametrize("method", PREFIXES)
def test_guidance_is_pefts(method: str) -> None:
    """Its side without the prompt has no prefix either."""
    model = with_peft(method).eval()
    scores = []
    for accelerate in (False, True):
        if accelerate:
            prefixcore.accelerate(model)
        how = {"guidance_scale": 1.5, "max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True}
        scores += written(model, method, **how).scores
    close(*scores)


def test_arguments_that_the_model_does_not_take_are_refused() -> None:
    model = with_peft("prompt").eval()
    prefixcore.accelerate(model)
    with pytest.raises(ValueError, match="no_such_argument"):
        written(model, "prompt", no_such_argument=1)
