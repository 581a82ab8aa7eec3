"""What a step sends, on paper: the sizes are those of real models, and the page has what the script prints."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import prefixcore
from bench.communication import LLAMA_8B, LLAMA_70B, Shape, all_reduce, table, tensor_parallel_line
from tests import tiny
from tests.examples import ROOT


def test_sizes_are_those_of_models() -> None:
    model = tiny.model()
    shape = Shape("tiny", 2, 32, 4, 2, 16, 64, model.config.vocab_size)
    assert shape.weights == sum(parameter.numel() for parameter in model.parameters())
    for config, size in (
        (prefixcore.PrefixTuningConfig(5), shape.prefix(5)),
        (prefixcore.PromptTuningConfig(5), shape.prompt(5)),
    ):
        with prefixcore.attach(model, config) as handle:
            assert handle.num_trainable == size
    from peft import LoraConfig, get_peft_model

    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = get_peft_model(model, LoraConfig(r=3, target_modules=projections))
    assert lora.get_nb_trainable_parameters()[0] == shape.lora(3)


def test_llama_8b_has_eight_billion_weights() -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8))
    assert LLAMA_8B.weights == sum(parameter.numel() for parameter in model.parameters())


def test_a_ring_sends_twice_all_but_its_own_part() -> None:
    assert all_reduce(100, 1) == 0
    assert all_reduce(100, 2) == 100
    assert all_reduce(100, 4) == 150


def test_the_page_has_what_the_script_prints() -> None:
    page = (ROOT / "docs" / "guides" / "distributed.md").read_text(encoding="utf-8")
    for part in (table(LLAMA_8B), table(LLAMA_70B), tensor_parallel_line(LLAMA_8B)):
        assert part in page
