"""What a model with virtual tokens generates on the device of the tests, a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig
from tests.device import DEVICE

from .models import Tokenizer, make

REQUESTS = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 8, 9, 1, 2, 3]]
TEXT = "abcdefghijklmnopq"
GREEDY = GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=-1, pad_token_id=0)


@pytest.fixture(
    params=[PrefixTuningConfig(init_text=TEXT), PromptTuningConfig(init_text=TEXT)], ids=["prefix", "prompt"]
)
def model(request: pytest.FixtureRequest) -> Any:
    """An attached model, on the device."""
    model = make("llama").to(DEVICE)
    prefixcore.attach(model, request.param, tokenizer=Tokenizer())
    return model


def check(made: list[list[int]]) -> None:
    """Each token is the likeliest after those before it, by the bare model that reads the text too."""
    bare = make("llama").to(DEVICE)
    text = Tokenizer()(TEXT)["input_ids"]
    for ids, new in zip(REQUESTS, made, strict=True):
        assert len(new) == GREEDY.max_new_tokens
        whole = torch.tensor([[*text, *ids, *new]], device=DEVICE)
        with torch.no_grad():
            logits = bare(whole).logits[0, len(text) + len(ids) - 1 : -1].float()
        chosen = logits.gather(1, whole[0, -len(new) :, None])[:, 0]
        assert float((logits.amax(-1) - chosen).max()) < 0.05


def test_generate(model: Any) -> None:
    made = []
    for ids in REQUESTS:
        row = torch.tensor([ids], device=DEVICE)
        made.append(model.generate(row, GREEDY, attention_mask=torch.ones_like(row))[0, len(ids) :].tolist())
    check(made)


@pytest.mark.parametrize("graphs", [None, False, True], ids=["by default", "without graphs", "in CUDA graphs"])
def test_continuous_batching(model: Any, graphs: bool | None) -> None:
    if graphs and DEVICE.type != "cuda":
        pytest.skip("CUDA graphs are of a GPU")
    pages = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64, use_cuda_graph=graphs)
    made = model.generate_batch(REQUESTS, generation_config=GREEDY, continuous_batching_config=pages).values()
    assert [each.error for each in made] == [None] * len(REQUESTS)
    check([each.generated_tokens for each in made])
