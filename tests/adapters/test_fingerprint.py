"""Which base model: the same one in another dtype is known again, any other is refused by the field that differs."""

from __future__ import annotations

import copy
import importlib
import json
import time

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from prefixcore.adapters import AdapterError, compare_fingerprints, fingerprint

from .models import make_model


def _refused(expected, actual):
    with pytest.raises(AdapterError) as caught:
        compare_fingerprints(expected, actual)
    return str(caught.value)


def test_the_same_model_again_and_through_json(llama):
    one = fingerprint(llama)
    assert one == fingerprint(copy.deepcopy(llama))
    compare_fingerprints(json.loads(json.dumps(one)), one)
    assert one["num_parameters"] == llama.num_parameters()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_trained_in_fp32_and_loaded_in_another_dtype(dtype, llama):
    compare_fingerprints(fingerprint(llama), fingerprint(copy.deepcopy(llama).to(dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trained_in_half_precision_and_loaded_in_fp32(dtype, llama):
    half = copy.deepcopy(llama).to(dtype)
    compare_fingerprints(fingerprint(half), fingerprint(copy.deepcopy(half).float()))


def test_neither_the_attached_module_nor_the_name_counts(llama):
    model = copy.deepcopy(llama)
    before = fingerprint(model)
    model.prefixcore = nn.Linear(3, 3)
    assert fingerprint(model) == before
    compare_fingerprints({**before, "name_or_path": "somewhere/else"}, before)


def test_a_compiled_model_is_the_model(llama):
    assert fingerprint(torch.compile(llama)) == fingerprint(llama)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden_size": 48}, "hidden_size: the adapter was trained for 32, this model has 48"),
        ({"num_hidden_layers": 3}, "num_hidden_layers"),
        ({"num_attention_heads": 2}, "num_attention_heads"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"head_dim": 8}, "head_dim"),
        ({"vocab_size": 64}, "vocab_size"),
        ({"intermediate_size": 64}, "num_parameters"),
    ],
)
def test_another_architecture(changes, field, llama):
    assert field in _refused(fingerprint(llama), fingerprint(make_model("llama", **changes)))


def test_another_family_and_another_head(models, llama):
    assert "base_model.class" in _refused(fingerprint(llama), fingerprint(models["gpt2"]))
    classifier = LlamaForSequenceClassification(llama.config)
    assert "LlamaForSequenceClassification" in _refused(fingerprint(llama), fingerprint(classifier))


def test_other_weights(llama):
    text = _refused(fingerprint(llama), fingerprint(make_model("llama", seed=1)))
    assert "base_model.weights" in text
    tuned = copy.deepcopy(llama)
    with torch.no_grad():  # as a short fine-tuning would
        tuned.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    assert "base_model.weights" in _refused(fingerprint(llama), fingerprint(tuned))


def test_a_hundred_million_parameters_in_well_under_a_second():
    config = LlamaConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=16, vocab_size=32000)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert model.num_parameters() > 9e7
    start = time.process_time()  # others on the machine do not lengthen it
    fingerprint(model)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("first", [torch.inference_mode, lambda: torch.device("meta")])
def test_what_the_first_model_was_read_in_is_not_left_to_the_next(first):
    kept = importlib.import_module("prefixcore.adapters.fingerprint")
    weight = torch.nn.Parameter(torch.arange(3001.0))
    expected = kept._sample(weight)
    kept._places.cache_clear()
    with first():
        kept._sample(weight.detach())
    assert torch.equal(kept._sample(weight), expected)
