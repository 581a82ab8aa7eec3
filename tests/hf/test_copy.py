"""Copies, pickles and saved models of an attached model do what one would expect of any model."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig, PTuningConfig
from prefixcore.hf import attached

from .accelerated import pickled
from .models import assert_same, make, padded, state, tokens

CONFIGS = [
    PrefixTuningConfig(num_virtual_tokens=4),
    PrefixTuningConfig(num_virtual_tokens=4, reparameterization="mlp", num_frozen_tokens=1),
    PromptTuningConfig(num_virtual_tokens=4),
    PTuningConfig(num_virtual_tokens=4),
]


def same(got: Any, expected: Any) -> bool:
    """Whether logits at tokens agree: a soft prompt is computed in two ways, which differ at padding."""
    seen = padded("left")["attention_mask"].bool()
    return torch.allclose(got.float()[seen], expected.float()[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_is_attached_and_independent(config: Any, duplicate: Any) -> None:
    model, batch = make("llama"), padded("left")
    bare = state(model)
    handle = prefixcore.attach(model, config)
    out = model(**batch)  # leaves a graph that cannot be copied
    with torch.no_grad():
        model(**batch)
    other = duplicate(model)
    copied = attached(other)
    assert copied is not None
    assert copied.model is other
    assert copied.module is other.prefixcore
    assert same(other(**batch).logits, out.logits)

    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1.0)
    assert not same(other(**batch).logits, out.logits)
    assert same(model(**batch).logits, out.logits)

    copied.detach()
    assert attached(other) is None
    assert attached(model) is not None
    assert_same(bare["state_dict"], state(other)["state_dict"])
    assert_same(bare["requires_grad"], state(other)["requires_grad"])
    assert_same(bare["hooks"], state(other)["hooks"])
    assert_same(bare["attributes"], state(other)["attributes"])
    assert other.config._attn_implementation == "sdpa"
    assert same(model(**batch).logits, out.logits)
    handle.detach()
    assert torch.equal(model(**batch).logits, other(**batch).logits)


def test_a_tokenizer_that_cannot_be_pickled_is_in_nobodys_way() -> None:
    model = make("llama")
    prefixcore.attach(model, CONFIGS[0], tokenizer=lambda text: text)
    copied = attached(pickled(model))
    assert copied is not None
    assert copied.tokenizer is None


def test_the_handle_of_a_model() -> None:
    model = make("llama")
    assert attached(model) is None
    handle = prefixcore.attach(model, CONFIGS[0])
    assert attached(model) is handle


def test_a_pickle_is_read_by_a_process_that_has_not_imported_prefixcore(tmp_path: Path) -> None:
    model, ids = make("llama"), tokens(1, 5)
    prefixcore.attach(model, CONFIGS[0])
    torch.save((model, ids, model(ids).logits), tmp_path / "model.pt")
    code = f"""
import torch
model, ids, expected = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
torch.testing.assert_close(model(ids).logits, expected)
"""
    root = Path(prefixcore.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("config", CONFIGS)
def test_save_pretrained_writes_what_is_trained_and_no_model(config: Any, tmp_path: Path) -> None:
    """Nothing is lost (Trainer resumes from it), and nobody loads the folder as the bare model in silence."""
    model, batch = make("llama"), padded("left")
    handle = prefixcore.attach(model, config)
    with_tokens = model(**batch).logits
    model.save_pretrained(tmp_path)
    for model_class in (transformers.AutoModelForCausalLM, transformers.AutoModel, transformers.LlamaForCausalLM):
        with pytest.raises(ValueError, match=r"call prefixcore\.load\(model, this folder\)"):
            model_class.from_pretrained(tmp_path)  # at once: no default model of seven billion weights is made
    again = make("llama")
    with prefixcore.load(again, tmp_path):
        assert same(again(**batch).logits, with_tokens)

    copied = copy.deepcopy(model)  # with a method of its own
    with torch.no_grad():
        next(copied.prefixcore.parameters()).add_(1.0)
    changed = copied(**batch).logits
    copied.save_pretrained(tmp_path / "copied")
    with prefixcore.load(again, tmp_path / "copied"):
        assert same(again(**batch).logits, changed)
    handle.detach()
    model.save_pretrained(tmp_path / "bare")
    assert "call prefixcore.load" not in (tmp_path / "bare" / "config.json").read_text()

    other = make("llama")
    prefixcore.attach(other, config)
    from safetensors.torch import load_file

    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    torch.testing.assert_close(other(**batch).logits, with_tokens, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS)
def test_state_dict_round_trip(config: Any) -> None:
    model, batch = make("llama"), padded("left")
    prefixcore.attach(model, config)
    expected, saved = model(**batch).logits, copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model(**batch)
        for parameter in model.prefixcore.parameters():
            parameter.add_(1.0)
    assert not same(model(**batch).logits, expected)
    model.load_state_dict(saved)
    assert same(model(**batch).logits, expected)
    with torch.no_grad():
        assert same(model(**batch).logits, expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_to_another_dtype_and_back(config: Any) -> None:
    model, batch = make("llama"), padded("left")
    handle = prefixcore.attach(model, config)
    expected = model(**batch).logits
    model.to(torch.bfloat16)
    with torch.no_grad():
        low = model(**batch).logits
    assert low.dtype == torch.bfloat16
    seen = batch["attention_mask"].bool()
    assert (low.float() - expected)[seen].norm() < 0.2 * expected[seen].norm()
    model(**batch).loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in handle.parameters())


@pytest.mark.parametrize("config", [c for c in CONFIGS if isinstance(c, PrefixTuningConfig)])
def test_on_the_meta_device_a_prefix_has_shapes_alone(config: Any) -> None:
    model, batch = make("llama"), padded("none")
    prefixcore.attach(model, config)
    expected = model(batch["input_ids"]).logits.shape
    logits = model.to("meta")(batch["input_ids"].to("meta")).logits
    assert logits.is_meta
    assert logits.shape == expected
