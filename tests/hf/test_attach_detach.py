"""Attaching changes nothing that detaching does not put back, and a refusal changes nothing at all."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
import transformers

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig, PTuningConfig
from prefixcore.hf.attention.patch import Patch

from .models import FAMILIES, Tokenizer, assert_same, make, padded, state, tokens

CONFIGS = [
    PrefixTuningConfig(init_text="abc"),
    PrefixTuningConfig(num_virtual_tokens=3, init="random", layers=[1]),
    PromptTuningConfig(init_text="abc"),
    PTuningConfig(num_virtual_tokens=3),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", CONFIGS)
def test_detach_puts_everything_back(family: str, config: Any) -> None:
    model, batch = make(family), padded("left")
    model.lm_head.weight.requires_grad_(False)  # flags of the user's own
    model.base_model.train()  # and modes
    before, expected = state(model), model(**batch).logits
    rng = torch.get_rng_state()
    torch.set_rng_state(before["rng"])

    handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
    assert handle.is_attached
    assert handle.module is model.prefixcore
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"prefixcore.{n}" for n, _ in handle.named_parameters()
    ]
    assert handle.num_trainable == sum(p.numel() for p in handle.parameters()) > 0
    model(**batch).loss.backward()
    model.eval()
    model.generate(tokens(1, 4), max_new_tokens=3)
    model.base_model.train()
    handle.detach()

    assert not handle.is_attached
    torch.set_rng_state(before["rng"])
    assert_same(before, state(model))
    torch.set_rng_state(rng)
    assert torch.equal(model(**batch).logits, expected)
    handle.detach()  # a second time does nothing
    assert_same(before["requires_grad"], state(model)["requires_grad"])


def test_attaching_does_not_draw_from_the_global_generator_with_a_seed() -> None:
    model = make("llama").train()
    for config in (
        PrefixTuningConfig(num_virtual_tokens=3, seed=1),
        PrefixTuningConfig(num_virtual_tokens=3, init="random", reparameterization="low_rank", rank=1, seed=1),
        PTuningConfig(num_virtual_tokens=3, seed=1),
    ):
        before = torch.get_rng_state()
        with prefixcore.attach(model, config):
            assert torch.equal(torch.get_rng_state(), before)


def test_as_a_context_manager_also_after_an_error() -> None:
    model = make("llama")
    before = state(model)
    with contextlib.suppress(KeyError), prefixcore.attach(model, CONFIGS[1]) as handle:
        assert handle.is_attached
        raise KeyError
    torch.set_rng_state(before["rng"])
    assert_same(before, state(model))


def test_a_detached_handle_keeps_its_values() -> None:
    model = make("llama")
    handle = prefixcore.attach(model, CONFIGS[1])
    values = handle.bake()
    handle.detach()
    assert_same(dict(enumerate(torch.stack(p) for p in values)), dict(enumerate(map(torch.stack, handle.bake()))))
    assert "detached" in repr(handle)
    again = prefixcore.attach(model, PrefixTuningConfig(init=handle.bake(), layers=[1]))
    assert again.is_attached
    assert not handle.is_attached


@pytest.mark.parametrize("config", CONFIGS)
def test_disabled_is_the_bare_model(config: Any) -> None:
    model, batch = make("llama"), padded("left")
    expected = model(**batch).logits
    handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
    attached = model(**batch).logits
    with handle.disabled():
        assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(model(**batch).logits, attached)
    assert not torch.allclose(attached, expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_attached_in_inference_mode_is_trained_all_the_same(config: Any, tmp_path: Any) -> None:
    model, ids = make("llama"), tokens(2, 7)
    with torch.inference_mode():
        handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in handle.parameters())
    folder = handle.save(tmp_path / "adapter")
    handle.detach()
    with torch.inference_mode():
        handle = prefixcore.load(model, folder, trainable=True)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in handle.parameters())
    handle.detach()
    with torch.inference_mode():
        bank = prefixcore.PromptBank(model)
        handles = bank.attach("one", config, tokenizer=Tokenizer()), bank.load("two", folder, trainable=True)
    model(ids, labels=ids, task_ids=["one", "two"]).loss.backward()
    assert all(parameter.grad is not None for each in handles for parameter in each.parameters())


@pytest.mark.parametrize("first", CONFIGS)
@pytest.mark.parametrize("second", [CONFIGS[1], CONFIGS[3]])
def test_twice(first: Any, second: Any) -> None:
    model, ids = make("llama"), tokens(2, 6)
    prefixcore.attach(model, first, tokenizer=Tokenizer())
    expected, before = model(ids).logits, state(model)
    with pytest.raises(ValueError, match="attached to LlamaForCausalLM already"):
        prefixcore.attach(model, second)
    assert_same(before, state(model))
    assert torch.equal(model(ids).logits, expected)


def test_twice_through_the_model_inside() -> None:
    model = make("llama")
    handle = prefixcore.attach(model.model, CONFIGS[1])
    with pytest.raises(ValueError, match="seen at 'model'"):
        prefixcore.attach(model, CONFIGS[1])
    handle.detach()
    prefixcore.attach(model, CONFIGS[1])
    with pytest.raises(ValueError, match="already"):
        prefixcore.attach(model.model, CONFIGS[3])


@pytest.mark.parametrize("config", CONFIGS)
def test_on_the_decoder_without_a_head(config: Any) -> None:
    whole, batch = make("llama"), padded("left")
    del batch["labels"]
    with prefixcore.attach(whole, config, tokenizer=Tokenizer()) as handle:
        expected, values = whole.model(**batch) if config.method == "prefix" else None, handle.bake()
    inner = prefixcore.attach(
        whole.model,
        PrefixTuningConfig(init=values, layers=config.layers)
        if config.method == "prefix"
        else PromptTuningConfig(init=values),
    )
    got = whole.model(**batch).last_hidden_state
    assert got.shape == (3, 9, 32)
    if expected is not None:
        assert torch.equal(got, expected.last_hidden_state)
    inner.detach()


def test_a_model_that_shares_the_configuration_is_not_touched() -> None:
    config = make("llama").config
    torch.manual_seed(0)
    one, other = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    batch = padded("left")
    expected = other(**batch).logits
    handle = prefixcore.attach(one, CONFIGS[1])
    torch.testing.assert_close(other(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    handle.detach()
    assert torch.equal(other(**batch).logits, expected)


@pytest.mark.parametrize("first", [0, 1])
def test_two_prefixes_on_one_configuration_are_detached_in_any_order(first: int) -> None:
    config = make("llama").config
    torch.manual_seed(0)
    models = [transformers.LlamaForCausalLM(config).eval() for _ in range(2)]
    batch, attention = padded("left"), config._attn_implementation
    bare = [model(**batch).logits for model in models]
    handles = [prefixcore.attach(model, CONFIGS[1]) for model in models]
    attached = [model(**batch).logits for model in models]
    handles[first].detach()
    assert torch.equal(models[1 - first](**batch).logits, attached[1 - first])  # not lost, and no error
    torch.testing.assert_close(models[first](**batch).logits, bare[first], rtol=1e-5, atol=1e-5)
    handles[1 - first].detach()
    assert config._attn_implementation == attention
    assert all(torch.equal(model(**batch).logits, logits) for model, logits in zip(models, bare, strict=True))


@pytest.mark.parametrize("config", [CONFIGS[1], CONFIGS[3]])
@pytest.mark.parametrize("where", ["add_module", "wrap_forward"])
def test_an_error_while_patching_leaves_the_model_untouched(
    config: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama")
    before = state(model)

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Patch, where, fail)
    with pytest.raises(KeyboardInterrupt):
        prefixcore.attach(model, config)
    torch.set_rng_state(before["rng"])
    assert_same(before, state(model))


def test_an_error_in_the_dry_run_leaves_the_model_untouched() -> None:
    model = make("llama").train()
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    before = state(model)
    with pytest.raises(NotImplementedError, match="its own code raises ZeroDivisionError"):
        prefixcore.attach(model, CONFIGS[1])
    assert_same(before, state(model))
    hook.remove()


def test_dropout_of_attention_is_announced() -> None:
    with pytest.warns(UserWarning, match="attn_pdrop is 0.1"):
        prefixcore.attach(make("gpt2", attn_pdrop=0.1), CONFIGS[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prefixcore.attach(make("gpt2"), CONFIGS[1])


def test_which_backend_runs_can_be_asked() -> None:
    for config, op in ((CONFIGS[1], "prefix_attention"), (CONFIGS[3], "soft_embedding")):
        with prefixcore.attach(make("llama"), config) as handle:
            assert handle.backend() == prefixcore.which_backend(op, "cpu", torch.float32)
            with prefixcore.use_backend("reference"):
                assert handle.backend().name == "reference"


def test_a_handle_keeps_no_second_copy_of_a_start() -> None:
    handle = prefixcore.attach(make("llama"), PromptTuningConfig(init=torch.randn(3, 32)))
    assert handle.config.init == "tensor"
    assert handle.config.num_virtual_tokens == 3
