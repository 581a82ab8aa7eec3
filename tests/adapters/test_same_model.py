"""One model in two forms is one model; another is another, however it is stored; and someone may insist."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, inject_adapter_in_model
from torch import nn

import prefixcore
from prefixcore import AdapterError, PrefixTuningConfig, PromptTuningConfig
from prefixcore.adapters import compare_fingerprints, fingerprint, read_adapter
from prefixcore.adapters.samples import Sample

from .models import make_model
from .quantized import quantize

IDS = torch.tensor([[5, 6, 7]])


def _half(model: Any) -> Any:
    return model.half()


def _bfloat16(model: Any) -> Any:
    return model.bfloat16()


def _quantized(model: Any) -> Any:
    quantize(model.bfloat16())
    return model


def _with_a_token(model: Any) -> Any:
    model.resize_token_embeddings(model.config.vocab_size + 1)
    return model


def _with_many_tokens(model: Any) -> Any:
    model.bfloat16().resize_token_embeddings(model.config.vocab_size + 40)
    return model


def _with_lora(model: Any) -> Any:
    return inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "embed_tokens"], r=2), model)


def _with_ia3(model: Any) -> Any:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    return inject_adapter_in_model(config, model.half())


FORMS = {
    "float32": lambda model: model,
    "float16": _half,
    "bfloat16": _bfloat16,
    "quantized": _quantized,
    "a token more": _with_a_token,
    "many tokens more": _with_many_tokens,
    "LoRA": _with_lora,
    "IA3": _with_ia3,
}


@pytest.fixture(scope="module")
def forms() -> dict[str, Any]:
    return {name: fingerprint(change(make_model("llama"))) for name, change in FORMS.items()}


@pytest.mark.parametrize("loaded", FORMS)
@pytest.mark.parametrize("trained", FORMS)
def test_the_same_base_in_two_forms(trained: str, loaded: str, forms: dict[str, Any]) -> None:
    compare_fingerprints(json.loads(json.dumps(forms[trained])), forms[loaded])


@pytest.mark.parametrize("form", FORMS)
def test_other_weights_in_any_form(form: str, forms: dict[str, Any]) -> None:
    for trained in FORMS:
        other = fingerprint(FORMS[form](make_model("llama", seed=1)))
        with pytest.raises(AdapterError, match="base_model.weights: [^;]*other weights"):
            compare_fingerprints(forms[trained], other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trained", FORMS)
def test_a_sibling_that_was_trained_on_a_little(trained: str, form: str, forms: dict[str, Any]) -> None:
    sibling = make_model("llama")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sibling.parameters():
            parameter.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=generator))
    with pytest.raises(AdapterError, match="base_model.weights: [^;]*other weights"):
        compare_fingerprints(forms[trained], fingerprint(FORMS[form](sibling)))


def test_tied_or_not() -> None:
    tied = make_model("llama", tie_word_embeddings=True)
    untied = make_model("llama", tie_word_embeddings=False)
    untied.load_state_dict(tied.state_dict())
    one, other = fingerprint(tied), fingerprint(untied)
    assert one["num_parameters"] < other["num_parameters"]
    compare_fingerprints(one, other)
    compare_fingerprints(other, one)


def test_a_layer_more_is_not_a_token_more(forms: dict[str, Any]) -> None:
    for changes in ({"num_hidden_layers": 3, "vocab_size": 62}, {"intermediate_size": 49}, {"attention_bias": True}):
        model = make_model("llama", **changes)
        with torch.no_grad():
            for name, parameter in make_model("llama").named_parameters():
                here = model.get_parameter(name)
                here[tuple(slice(size) for size in parameter.shape)] = parameter
        with pytest.raises(AdapterError, match="num_hidden_layers|num_parameters"):
            compare_fingerprints(forms["float32"], fingerprint(model))


def test_files_cut_in_another_way(tmp_path: Path) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    compare_fingerprints(fingerprint(model), fingerprint(type(model).from_pretrained(tmp_path / "cut")))


def test_lora_on_one_side_alone(tmp_path: Path) -> None:
    inside, bare = _with_lora(make_model("llama")), make_model("llama")
    prefixcore.attach(inside, PrefixTuningConfig(3, seed=0)).save(tmp_path / "inside")
    prefixcore.load(bare, tmp_path / "inside").save(tmp_path / "bare")
    prefixcore.load(_with_lora(make_model("llama")), tmp_path / "bare").detach()
    late = make_model("llama")  # the LoRA after the prefix
    handle = prefixcore.attach(late, PrefixTuningConfig(3, seed=0))
    _with_lora(late)
    handle.save(tmp_path / "late")
    prefixcore.load(make_model("llama"), tmp_path / "late").detach()


def test_a_trained_lora_changes_nothing_either(forms: dict[str, Any]) -> None:
    model = _with_lora(make_model("llama"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    assert fingerprint(model) == forms["float32"]


def test_many_weights_have_a_small_record() -> None:
    model = nn.ModuleList(nn.Linear(64, 64) for _ in range(2000))
    found = fingerprint(model)
    assert len(found["samples"]) == 512
    assert len(json.dumps(found)) < 120_000
    model[1999] = nn.Identity()  # one weight fewer leaves the others where they are
    assert len(found["samples"].keys() ^ fingerprint(model)["samples"].keys()) <= 4


# --- Someone insists ------------------------------------------------------------------------------------------------


def test_insisting_is_recorded_and_carried_on(tmp_path: Path) -> None:
    prefixcore.attach(make_model("llama"), PromptTuningConfig(3, seed=0)).save(tmp_path / "one")
    other = make_model("llama", seed=1)
    with pytest.raises(AdapterError, match=r"other weights.*strict=False \(--force\)"):
        prefixcore.load(other, tmp_path / "one")
    with pytest.warns(UserWarning, match="loaded all the same: base_model.weights"):
        handle = prefixcore.load(other, tmp_path / "one", trainable=True, strict=False)
    assert len(handle.forced) == 1
    handle.save(tmp_path / "two")
    handle.detach()
    base = read_adapter(tmp_path / "two").manifest.base_model  # type: ignore[union-attr]
    assert "other weights" in base["forced"][0]
    with prefixcore.load(other, tmp_path / "two") as again:  # the model that it was trained on last
        assert again.forced == handle.forced
        again.save(tmp_path / "three")
    base = read_adapter(tmp_path / "three").manifest.base_model  # type: ignore[union-attr]
    assert base["forced"] == list(handle.forced)
    with prefixcore.load(make_model("llama"), tmp_path / "one", strict=False) as fits:
        assert fits.forced == ()


def test_shapes_are_not_a_matter_of_insisting(tmp_path: Path) -> None:
    prefixcore.attach(make_model("llama"), PrefixTuningConfig(3, seed=0)).save(tmp_path / "a")
    with (
        pytest.warns(UserWarning, match="num_key_value_heads"),
        pytest.raises(AdapterError, match="the prefix of layer 0"),
    ):
        prefixcore.load(make_model("llama", num_key_value_heads=4), tmp_path / "a", strict=False)


def test_nobody_is_told_to_load_the_model_that_they_loaded() -> None:
    one, other = fingerprint(make_model("llama")), fingerprint(make_model("llama", seed=1))
    one["name_or_path"] = "tiny/llama"
    for name, told in (("tiny/llama", False), ("other/llama", True)):
        with pytest.raises(AdapterError) as caught:
            compare_fingerprints(one, {**other, "name_or_path": name})
        assert ("it was trained for 'tiny/llama'" in str(caught.value)) == told


# --- What version 0.1.0 wrote: digests alone ------------------------------------------------------------------------


def _old(model: Any) -> dict[str, Any]:
    new = ("samples", "left_out", "body_parameters", "tables")
    return {name: value for name, value in fingerprint(model).items() if name not in new}


def test_digests_alone_are_still_read() -> None:
    model = make_model("llama")
    old = _old(model)
    compare_fingerprints(old, fingerprint(model))
    compare_fingerprints(old, fingerprint(copy.deepcopy(model).bfloat16()))
    with pytest.raises(AdapterError, match="other weights"):
        compare_fingerprints(old, fingerprint(make_model("llama", seed=1)))
    with pytest.raises(AdapterError, match="vocab_size"):
        compare_fingerprints(old, fingerprint(_with_a_token(copy.deepcopy(model))))
    with pytest.raises(AdapterError, match="load it in float32 or in bfloat16"):
        compare_fingerprints(_old(copy.deepcopy(model).bfloat16()), fingerprint(copy.deepcopy(model).half()))


# --- The text of a sample -------------------------------------------------------------------------------------------


def test_a_sample_is_a_text_and_back() -> None:
    sample = Sample("bfloat16", (3, 4), {0: 1.0, 5: -2.5e-8, 11: 0.0})
    assert str(sample) == "bfloat16 [3, 4] 0:1 5:-2.5e-08 11:0"
    assert Sample.parse(str(sample)) == sample
    assert Sample.parse("float32 []") == Sample("float32", (), {})
    for text in (None, 3, "", "float32", "float32 [3] 0", "float32 [3] 0:nan", "float32 [3] 0:1e999", "float32 [x]"):
        assert Sample.parse(text) is None
