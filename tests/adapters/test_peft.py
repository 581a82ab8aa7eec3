"""Adapters from PEFT and to PEFT, with the real PEFT on the other side."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import (
    CartridgeConfig,
    LoraConfig,
    PeftModel,
    PromptEncoderConfig,
    get_peft_model,
)
from peft import PrefixTuningConfig as PeftPrefixConfig
from peft import PromptTuningConfig as PeftPromptConfig
from safetensors.torch import load_file

from prefixcore.adapters import AdapterError, Manifest, make_module, read_adapter, write_adapter
from prefixcore.nn import PrefixTuningConfig, PromptTuningConfig, SoftPrompt
from prefixcore.nn.trained import trained_parameters

from .models import CONFIGS, P, flat, same, save

IDS = torch.tensor([[3, 14, 15, 9, 26, 5]])
COMMON = {"task_type": "CAUSAL_LM", "num_virtual_tokens": P}
PEFT = {
    "prefix": lambda: PeftPrefixConfig(**COMMON),
    "prefix-zero": lambda: PeftPrefixConfig(**COMMON, init_weights="zero"),
    "prefix-projection": lambda: PeftPrefixConfig(**COMMON, prefix_projection=True, encoder_hidden_size=24),
    "cartridge": lambda: CartridgeConfig(**COMMON, num_frozen_tokens=2),
    "prompt": lambda: PeftPromptConfig(**COMMON),
    "prompt-vocab": lambda: PeftPromptConfig(**COMMON, prompt_tuning_init="SAMPLE_VOCAB"),
    "p-tuning-mlp": lambda: PromptEncoderConfig(**COMMON, encoder_hidden_size=24),
    "p-tuning-lstm": lambda: PromptEncoderConfig(
        **COMMON, encoder_reparameterization_type="LSTM", encoder_hidden_size=24, encoder_num_layers=1
    ),
}


def _wrapped(model, name):
    torch.manual_seed(9)
    return get_peft_model(copy.deepcopy(model), PEFT[name]()).eval()


def _values(peft):
    """What PEFT hands to the model, in our shapes."""
    prompt = peft.get_prompt(batch_size=1)
    if isinstance(prompt, torch.Tensor):
        return prompt[0].detach()
    return [(layer.keys[0].detach(), layer.values[0].detach()) for layer in prompt.layers]


def _logits(peft):
    with torch.no_grad():
        return peft(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


@pytest.mark.parametrize("name", PEFT)
def test_peft_saves_and_we_read(name, model_and_shapes, tmp_path):
    model, shapes = model_and_shapes
    peft = _wrapped(model, name)
    peft.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert same(adapter.tensors, _values(peft))
    assert adapter.config.num_virtual_tokens == P
    assert not adapter.config.is_reparameterized
    assert adapter.manifest is None
    assert adapter.training_state is None
    if "prompt" in name or "tuning" in name:
        assert isinstance(adapter.config, PromptTuningConfig)
        assert adapter.layer_shapes == adapter.layers == []
    else:
        assert isinstance(adapter.config, PrefixTuningConfig)
        assert adapter.config.num_frozen_tokens == (2 if name == "cartridge" else 0)
        assert adapter.layer_shapes == shapes
        assert adapter.layers == [0, 1]


@pytest.mark.parametrize("name", PEFT)
def test_what_peft_saved_goes_back_with_the_same_logits(name, model_and_shapes, tmp_path):
    model, shapes = model_and_shapes
    peft = _wrapped(model, name)
    peft.save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs")
    module = make_module(adapter, trainable=True)
    assert all(parameter.requires_grad for _, parameter in trained_parameters(module))
    manifest = Manifest.create(model, adapter.config, shapes if adapter.layers else None)
    write_adapter(tmp_path / "ours", module=module, config=adapter.config, manifest=manifest)
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    # In the same mode: PEFT evaluates its encoders anew, and with other kernels, while it trains.
    theirs = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "theirs").eval()
    assert torch.equal(_logits(again), _logits(theirs))
    torch.testing.assert_close(_logits(again), _logits(peft), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_we_write_and_peft_loads(name, model_and_shapes, tmp_path):
    model, shapes = model_and_shapes
    module = save(tmp_path, name, model, shapes)
    peft = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert same(_values(peft), module.bake())
    assert not torch.equal(_logits(peft), model(IDS).logits)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("prefix", "prefix"),
        ("prefix-mlp", "prefix-projection"),
        ("prefix-frozen", "cartridge"),
        ("prompt", "prompt"),
        ("p-tuning-mlp", "p-tuning-mlp"),
        ("p-tuning-lstm", "p-tuning-lstm"),
    ],
)
def test_our_files_say_what_pefts_say(ours, theirs, model_and_shapes, tmp_path):
    model, shapes = model_and_shapes
    save(tmp_path / "ours", ours, model, shapes)
    _wrapped(model, theirs).save_pretrained(tmp_path / "theirs")
    one = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    other = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert other.keys() - one.keys() == {"peft_version"}  # PEFT did not write it, and fills it in
    assert one.keys() <= other.keys()
    free = {"encoder_hidden_size", "encoder_num_layers", "base_model_name_or_path"}
    assert {k: v for k, v in one.items() if k not in free} == {k: other[k] for k in one if k not in free}
    a = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    b = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}


def test_text_start_is_kept_for_peft_if_the_tokenizer_is_known(llama, tmp_path):
    for tokenizer, word in ((None, "RANDOM"), ("some/tokenizer", "TEXT")):
        config = PromptTuningConfig(init_text="Name the capital.", tokenizer_name_or_path=tokenizer)
        module = SoftPrompt(32, config, torch.randn(P, 32))
        write_adapter(tmp_path, module=module, config=config, manifest=Manifest.create(llama, config))
        assert json.loads((tmp_path / "adapter_config.json").read_text())["prompt_tuning_init"] == word
        peft = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path)
        assert same(_values(peft), module.bake())
        assert read_adapter(tmp_path).config.init_text == "Name the capital."


def test_half_precision_prefix_is_read_as_fp32(llama, tmp_path):
    peft = _wrapped(llama, "prefix")
    peft.half().save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert {t.dtype for t in flat(adapter.tensors)} == {torch.float32}


def test_a_pickle_is_never_read(llama, tmp_path):
    peft = _wrapped(llama, "prefix")
    peft.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors: missing; adapter_model.bin is a pickle"):
        read_adapter(tmp_path)


def test_other_methods_are_named(llama, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(copy.deepcopy(llama), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="adapter_config.json: peft_type: .*got 'LORA'"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": None}, "peft_type: expected"),
        ({"num_layers": None}, "num_layers: expected"),
        ({"num_layers": 3}, r"prompt_embeddings: expected shape \[5, 192\], got \[5, 128\]"),
        ({"num_virtual_tokens": 4}, r"prompt_embeddings: expected shape \[4, 128\]"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens: expected"),
        ({"token_dim": "32"}, "token_dim: expected"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected"),
        ({"num_attention_heads": 3}, "token_dim: 32 is no multiple"),
        ({"num_transformer_submodules": 3}, "num_transformer_submodules: expected 1"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"task_type": "CHAT"}, "task_type must be"),
        ({"peft_type": "CARTRIDGE", "num_frozen_tokens": 6}, "num_frozen_tokens is 6"),
        ({"peft_type": "CARTRIDGE", "num_frozen_tokens": None}, "num_frozen_tokens must be"),
        ({"peft_type": "PROMPT_TUNING"}, r"expected shape \[5, 32\], got \[5, 128\]"),
    ],
)
def test_a_wrong_field_is_named(changes, message, llama, tmp_path):
    _wrapped(llama, "prefix").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path)
