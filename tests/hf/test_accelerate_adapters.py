"""Adapters of an accelerated PEFT model: added, switched, disabled, saved, loaded; and how it is undone and copied."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import prefixcore
import prefixcore.hf.attention.interface
import prefixcore.hf.peft.soft_prompt
from prefixcore.hf import attached

from .accelerated import METHODS, P, _of_length, assert_close, inputs, pickled, step, with_peft
from .models import make, tokens


@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_added_switched_and_deleted(method: str) -> None:
    options = {} if method == "cpt" else {"num_virtual_tokens": P + 2}
    batch = inputs(method)

    def run(model: Any) -> list[Any]:
        model.add_adapter("other", _of_length(method, **options))
        for parameter in model.prompt_encoder["other"].parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        found = [step(model, batch)]
        model.set_adapter("other")
        found.append(step(model, batch))
        model.set_adapter("default")
        found.append(step(model, batch))
        with pytest.warns(UserWarning, match="was active"):
            model.delete_adapter("default")
        with torch.no_grad():  # without labels: PEFT's loss of CPT asks for an adapter of the name "default"
            logits = model(**inputs(method, labels=False)).logits
        return [*found, logits, list(model.state_dict())]

    expected = run(with_peft(method))
    model = with_peft(method)
    prefixcore.accelerate(model)
    got = run(model)
    for one, other in zip(got[:-1], expected[:-1], strict=True):
        assert_close(one, other)
    assert got[-1] == expected[-1]
    assert not torch.equal(expected[0][1], expected[1][1])


@pytest.mark.parametrize("method", METHODS)
def test_disable_adapter_and_the_base_model_are_bare(method: str) -> None:
    ids = tokens(2, 7)
    bare = make("llama")
    expected, text = bare(ids).logits, bare.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    options = {"task_ids": torch.tensor([0, 1])} if method == "multitask" else {}
    model = with_peft(method)
    prefixcore.accelerate(model)
    before = model(input_ids=ids, **options).logits

    def check(called: Any) -> None:
        assert torch.equal(called(input_ids=ids).logits, expected)
        assert torch.equal(called.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None), text)

    with model.disable_adapter():
        check(model)
        with model.disable_adapter():
            check(model)
        check(model)
    check(model.base_model)
    assert torch.equal(model.base_model.model(ids)[0], bare.model(ids)[0])
    assert torch.equal(model.base_model.model.forward(ids)[0], bare.model(ids)[0])
    assert torch.equal(model(input_ids=ids, **options).logits, before)


@pytest.mark.parametrize("method", METHODS)
def test_the_files_are_the_same(method: str, tmp_path: Path) -> None:
    for name in ("peft", "accelerated"):
        model = with_peft(method)
        if name == "accelerated":
            prefixcore.accelerate(model)
        model(**inputs(method)).loss.backward()
        model.save_pretrained(tmp_path / name)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "accelerated" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_an_adapter_is_loaded_beside_another(method: str, tmp_path: Path) -> None:
    saved = with_peft(method)
    saved.save_pretrained(tmp_path)
    model = with_peft(method)
    prefixcore.accelerate(model)
    model.load_adapter(tmp_path, "loaded")
    model.load_adapter(tmp_path, "resumed", is_trainable=True)
    for name in ("loaded", "resumed"):
        model.set_adapter(name)
        out = model(**inputs(method))
        assert_close(out.logits, saved(**inputs(method)).logits)
    out.loss.backward()
    assert all(p.grad is not None for p in model.prompt_encoder["resumed"].parameters())


@pytest.mark.parametrize("method", METHODS)
def test_undo(method: str) -> None:
    model = with_peft(method)
    before, base = set(model.__dict__), dict(vars(model.base_model))
    attention = model.base_model.config._attn_implementation
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    expected = step(model, inputs(method))
    with prefixcore.accelerate(model) as accelerated:
        assert accelerated.is_accelerated
        step(model, inputs(method))
        with pytest.raises(ValueError, match="accelerated already"):
            prefixcore.accelerate(model)
    assert not accelerated.is_accelerated
    assert set(model.__dict__) == before
    assert vars(model.base_model).keys() == base.keys()
    assert "forward" not in model.base_model.model.__dict__
    assert model.base_model.config._attn_implementation == attention
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(step(model, inputs(method))[1], expected[1])
    accelerated.undo()
    prefixcore.accelerate(model)
    assert_close(step(model, inputs(method)), expected)


def test_undone_while_disabled() -> None:
    model = with_peft("prefix")
    expected = model(**inputs("prefix")).logits
    accelerated = prefixcore.accelerate(model)
    with model.disable_adapter():
        accelerated.undo()
    assert_close(model(**inputs("prefix")).logits, expected)


@pytest.mark.parametrize(
    ("method", "duplicate"),
    [
        *((method, copy.deepcopy) for method in METHODS),
        *((method, pickled) for method in METHODS if method != "cpt"),  # PEFT's encoder holds a hook, a closure
    ],
)
def test_a_copy_is_accelerated_and_independent(method: str, duplicate: Any) -> None:
    model = with_peft(method)
    prefixcore.accelerate(model)
    with torch.no_grad():
        expected = model(**inputs(method)).logits
    other = duplicate(model)
    with torch.no_grad():
        assert torch.equal(other(**inputs(method)).logits, expected)
        for parameter in other.prompt_encoder.parameters():
            parameter.add_(1.0)
        changed = other(**inputs(method)).logits
        assert not torch.allclose(changed, expected)
        assert torch.equal(model(**inputs(method)).logits, expected)
    other.__dict__["_prefixcore_accelerated"].undo()
    with torch.no_grad():
        assert_close(other(**inputs(method)).logits, changed)
        assert torch.equal(model(**inputs(method)).logits, expected)


def test_attach_and_accelerate_know_of_each_other() -> None:
    model = with_peft("prefix")
    accelerated = prefixcore.accelerate(model)
    with pytest.raises(ValueError, match="attached"):
        prefixcore.attach(model.base_model, prefixcore.PrefixTuningConfig(3))
    accelerated.undo()
    assert attached(model.base_model) is None
    with (
        prefixcore.attach(model.base_model, prefixcore.PrefixTuningConfig(3)),
        pytest.raises(ValueError, match="attached"),
    ):
        prefixcore.accelerate(model)
