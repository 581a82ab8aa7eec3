"""Answers that a trainer learns from, written by vLLM with virtual tokens that change from step to step."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import prefixcore
from prefixcore.serving import launch
from prefixcore.serving.client import ServingError
from prefixcore.serving.offline import PrefixLLM
from tests import tiny

from .test_front import OPTIONS, make_model

CONFIGS = {
    "prefix": prefixcore.PrefixTuningConfig(num_virtual_tokens=17, init="random", seed=0),
    "prompt": prefixcore.PromptTuningConfig(num_virtual_tokens=6, init="random", seed=0),
}
PROMPTS = [[5, 6, 7]] * 3 + [[8, 9]] * 3 + [[30]] * 3


@pytest.fixture(scope="module", params=["server", "colocated"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("rollouts")
    make_model().save_pretrained(folder / "tiny-llama")
    tiny.tokenizer().save_pretrained(folder / "tiny-llama")
    adapters = folder / "adapters"
    adapters.mkdir()  # empty: the adapter comes while vLLM runs
    if request.param == "server":
        arguments = (*OPTIONS, "--logprobs-mode", "processed_logprobs")
        with launch.start(folder / "tiny-llama", adapters, placeholder=1, arguments=arguments) as server:
            yield SimpleNamespace(server=server.url, adapters=adapters)
        return
    llm = PrefixLLM(
        folder / "tiny-llama", adapters, dtype="float32", enforce_eager=True, max_model_len=512,
        logprobs_mode="processed_logprobs",
    )  # fmt: skip
    yield SimpleNamespace(server=llm, adapters=adapters)
    llm.llm_engine.engine_core.shutdown()


def stand_in(model: Any, **settings: Any) -> Any:
    """As much of TRL's GRPOTrainer, which this environment does not have, as is asked for answers."""
    accelerator = SimpleNamespace(process_index=0, is_main_process=True, num_processes=1)
    arguments = SimpleNamespace(generation_kwargs=settings.pop("generation_kwargs", None))
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    return SimpleNamespace(
        model=model, use_vllm=False, args=arguments, accelerator=accelerator, max_completion_length=12,
        add_callback=lambda callback: None,
        vllm_importance_sampling_correction=True, **{**sampling, **settings},
    )  # fmt: skip


def log_probabilities(model: Any, prompt: list[int], made: list[int], temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + made])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)[range(len(made)), made]


@pytest.mark.filterwarnings("error:the server says")
@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("name", CONFIGS)
def test_answers_are_sampled_from_the_model_as_it_is(name: str, temperature: float, place: Any) -> None:
    handle = prefixcore.attach(make_model(), CONFIGS[name])
    trainer = stand_in(handle.model, temperature=temperature)
    rollouts = prefixcore.ServedRollouts(trainer, place.server, place.adapters)
    assert trainer.use_vllm
    assert trainer.vllm_generation is rollouts
    bare = make_model()
    for step in range(3):
        rollouts.sync_weights()
        back, ids, logprobs, of = rollouts.generate(PROMPTS, None, 3)
        assert back == PROMPTS
        assert len({tuple(made) for made in ids}) > 3
        for prompt, made, values, tokens in zip(PROMPTS, ids, logprobs, of, strict=True):
            assert 0 < len(made) <= 12
            assert [each[0] for each in tokens] == made
            own = log_probabilities(handle.model, prompt, made, temperature)
            torch.testing.assert_close(torch.tensor(values)[:, 0], own, rtol=1e-3, atol=2e-3)
            assert (own - log_probabilities(bare, prompt, made, temperature)).abs().max() > 0.1
        with torch.no_grad():  # a step of training
            for parameter in handle.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)))


def test_greedy_answers_are_those_of_generate(place: Any) -> None:
    handle = prefixcore.attach(make_model(), CONFIGS["prefix"])
    trainer = stand_in(handle.model, top_k=1, generation_kwargs={"ignore_eos": True})
    rollouts = prefixcore.ServedRollouts(trainer, place.server, place.adapters, name="greedy")
    rollouts.sync_weights()
    _, ids, logprobs, _ = rollouts.generate(PROMPTS, None, 3)
    for prompt, made, values in zip(PROMPTS, ids, logprobs, strict=True):
        row = torch.tensor([prompt])
        want = handle.model.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=12, min_new_tokens=12, do_sample=False
        )
        assert made == want[0, len(prompt) :].tolist()
        assert all(abs(value[0] or 0.0) < 1e-6 for value in values)  # of the one token that top_k leaves
    assert (Path(place.adapters) / "greedy" / "adapter_model.safetensors").is_file()


def test_what_cannot_be_served_is_refused(place: Any) -> None:
    handle = prefixcore.attach(make_model(), prefixcore.PrefixTuningConfig(num_virtual_tokens=4, layers=[0]))
    rollouts = prefixcore.ServedRollouts(stand_in(handle.model), place.server, place.adapters, name="lower")
    with pytest.raises(ServingError, match="layers"):
        rollouts.sync_weights()
    handle = prefixcore.attach(make_model(), CONFIGS["prefix"])
    rollouts = prefixcore.ServedRollouts(stand_in(handle.model), place.server, place.adapters, name="longest")
    rollouts.sync_weights()
    with pytest.raises(ServingError, match="512"):
        rollouts.generate([[5] * 600], None, 1)
    shutil.rmtree(place.adapters / "longest")
    with pytest.raises(ServingError, match="longest"):
        rollouts.generate(PROMPTS, None, 3)


def test_a_regular_expression(place: Any) -> None:
    handle = prefixcore.attach(make_model(), CONFIGS["prefix"])
    trainer = stand_in(handle.model)
    trainer.args.vllm_structured_outputs_regex = "[ab]{12}"
    rollouts = prefixcore.ServedRollouts(trainer, place.server, place.adapters, name="regular")
    rollouts.sync_weights()
    _, ids, _, _ = rollouts.generate(PROMPTS, None, 3)
    texts = [tiny.tokenizer().decode(made, skip_special_tokens=True) for made in ids]
    assert all(set(text) == {"a", "b"} or len(set(text)) == 1 for text in texts)
    assert {letter for text in texts for letter in text} == {"a", "b"}
