"""Attaching changes nothing that detaching does not put back, and a refusal changes nothing at all."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig, PTuningConfig
from prefixcore.hf import FAMILIES as KNOWN
from prefixcore.hf.attention.patch import Patch
from prefixcore.hf.bank import prefix_calls

from . import tiny_models
from .models import FAMILIES, VOCABULARY, Tokenizer, assert_same, make, padded, state, tokens

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


def _bad_heads() -> Any:
    return PrefixTuningConfig(init=[(torch.zeros(3, 5, 16), torch.zeros(3, 5, 16))] * 2)


REFUSED_CONFIGS = [
    (None, TypeError, "config must be a PrefixTuningConfig"),
    ({"num_virtual_tokens": 3}, TypeError, "got dict"),
    (
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        TypeError,
        "got PrefixTuningConfig of peft: give prefixcore.PrefixTuningConfig the same arguments, or .*accelerate",
    ),
    (PrefixTuningConfig(num_virtual_tokens=3, layers=[0, 2]), ValueError, r"layer 2, but the model has 2 .*\(0 to 1\)"),
    (_bad_heads(), ValueError, r"expected shape \[2, 5, 16\], got \[3, 5, 16\]"),
    (PrefixTuningConfig(init=torch.zeros(5, 7)), ValueError, r"\[P, 128\], got \[5, 7\]"),
    (PrefixTuningConfig(init=torch.full((5, 128), torch.nan)), ValueError, "NaN"),
    (PromptTuningConfig(init=torch.zeros(5, 7)), ValueError, r"expected shape \[5, 32\], got \[5, 7\]"),
    (PrefixTuningConfig(init_text="abc"), ValueError, "needs a tokenizer"),
    (PromptTuningConfig(init_text="abc"), ValueError, "needs a tokenizer"),
    (
        PrefixTuningConfig(num_virtual_tokens=3, init="zero", reparameterization="low_rank", rank=99),
        ValueError,
        "rank 99",
    ),
]


@pytest.mark.parametrize(("config", "error", "message"), REFUSED_CONFIGS)
def test_a_refused_config_leaves_the_model_untouched(config: Any, error: type[Exception], message: str) -> None:
    model = make("llama").train()
    before = state(model)
    with pytest.raises(error, match=message):
        prefixcore.attach(model, config)
    assert_same(before, state(model))


@pytest.mark.parametrize("config", [PrefixTuningConfig(init_text="abc"), PromptTuningConfig(num_virtual_tokens=3)])
def test_the_name_of_a_tokenizer_is_none(config: Any) -> None:
    model = make("llama")
    before, message = state(model), "tokenizer must be a tokenizer or None, got the text 'gpt2'"
    with pytest.raises(TypeError, match=message):
        prefixcore.attach(model, config, tokenizer="gpt2")
    with prefixcore.PromptBank(model) as bank, pytest.raises(TypeError, match=message):
        bank.attach("one", config, tokenizer="gpt2")
    assert_same(before, state(model))


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


def _bloom() -> Any:
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    return transformers.BloomForCausalLM(config)


def _gptj() -> Any:
    config = transformers.GPTJConfig(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4
    )
    return transformers.GPTJForCausalLM(config)


def _mamba() -> Any:
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    return transformers.MambaForCausalLM(config)


def _gpt() -> Any:
    config = transformers.OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return transformers.OpenAIGPTLMHeadModel(config)


def _inkling() -> Any:
    if not hasattr(transformers, "InklingForCausalLM"):
        pytest.skip("this transformers has no Inkling")
    return tiny_models.make("InklingForCausalLM", "inkling_text")


REFUSED_MODELS = [
    (_gpt, "has no attention that a prefix reaches: nothing in it calls transformers' attention interface"),
    (_mamba, "has no attention that a prefix reaches: nothing in it calls transformers' attention interface"),
    (_inkling, "a bias to its scores that it computes from the text"),
]


@pytest.mark.parametrize(("maker", "message"), REFUSED_MODELS)
def test_a_model_out_of_reach_is_left_untouched(maker: Any, message: str) -> None:
    torch.manual_seed(0)
    model = maker().train()
    before = state(model)
    with pytest.raises(NotImplementedError, match=message) as caught:
        prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=3, init="zero"))
    assert "llama" in str(caught.value) or maker is _inkling  # says which families are known
    assert_same(before, state(model))


@pytest.mark.parametrize("maker", [_bloom, _gptj])
def test_a_soft_prompt_needs_no_attention_interface(maker: Any) -> None:
    torch.manual_seed(0)
    model, ids = maker().eval(), tokens(2, 6)
    text = Tokenizer()("abc")["input_ids"]
    expected = model(torch.cat((torch.tensor([text, text]), ids), 1)).logits[:, 3:]
    prefixcore.attach(model, PromptTuningConfig(init_text="abc"), tokenizer=Tokenizer())
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


class OtherForCausalLM(transformers.Olmo2ForCausalLM):
    """A class that no table of models names."""


def test_an_unknown_family_is_checked_and_named() -> None:
    torch.manual_seed(0)
    config = transformers.Olmo2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model, ids = OtherForCausalLM(config).eval(), tokens(2, 6)
    text = Tokenizer()("abc")["input_ids"]
    expected = model(torch.cat((torch.tensor([text, text]), ids), 1)).logits[:, 3:]
    before = state(model)
    with pytest.warns(UserWarning, match="'olmo2' is not among the families"):
        handle = prefixcore.attach(model, PrefixTuningConfig(init_text="abc"), tokenizer=Tokenizer())
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    handle.detach()
    assert_same(before, state(model))


def test_an_unknown_family_that_fails_the_check_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a Llama whose name is not known and whose positions do not move."""
    model = make("llama")
    before = state(model)
    monkeypatch.setattr("prefixcore.hf.families.FAMILIES", {"gpt2": KNOWN["gpt2"]})
    monkeypatch.setattr(prefix_calls, "shift_positions", lambda *_: None)
    with pytest.raises(NotImplementedError, match="does not act as the text"):
        prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=3, init="zero"))
    assert_same(before, state(model))


def _classifier() -> Any:
    return transformers.LlamaForSequenceClassification(make("llama").config)


def test_a_head_that_counts_on_places_takes_a_prefix_but_no_soft_prompt() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    model = transformers.BertForMultipleChoice(transformers.BertConfig(vocab_size=VOCABULARY, **sizes)).eval()
    before = state(model)
    with pytest.raises(NotImplementedError, match="a prefix .* for any head"):
        prefixcore.attach(model, PromptTuningConfig(num_virtual_tokens=3, init="zero"))
    assert_same(before, state(model))
    prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=3, init="random"))


@pytest.mark.parametrize("family", ["Bert", "Camembert"])
def test_a_prefix_for_multiple_choice_starts_from_tokens(family: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, pad_token_id=0, **sizes)
    model = getattr(transformers, f"{family}ForMultipleChoice")(config).eval()
    handle = prefixcore.attach(model, PrefixTuningConfig(init_text="abcdef"), tokenizer=Tokenizer())
    start = handle.bake()
    choices = tokens(6, 7).view(2, 3, 7)
    apart = [model(choices[:, i : i + 1]).logits for i in range(3)]
    torch.testing.assert_close(model(choices).logits, torch.cat(apart, 1))
    model(choices, labels=torch.tensor([0, 2])).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in handle.parameters())
    handle.detach()
    with prefixcore.attach(model.base_model, PrefixTuningConfig(init_text="abcdef"), tokenizer=Tokenizer()) as body:
        for pair, expected in zip(start, body.bake(), strict=True):
            torch.testing.assert_close(pair, expected)


def test_a_classifier_takes_a_prefix() -> None:
    torch.manual_seed(0)
    model, batch = _classifier().eval(), padded("right")
    batch["labels"] = torch.tensor([0, 1, 0])
    bare = model(**batch).logits
    handle = prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=3, init="random"))
    out = model(**batch)
    assert not torch.allclose(out.logits, bare)
    out.loss.backward()
    assert all(p.grad.abs().max() > 0 for p in handle.parameters())


def test_a_model_that_reads_no_tokens() -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    model = transformers.ViTModel(config)
    before = state(model)
    with pytest.raises(NotImplementedError, match="reads pixel_values"):
        prefixcore.attach(model, PromptTuningConfig(num_virtual_tokens=3, init="zero"))
    with pytest.raises(ValueError, match="starts from tokens, but ViTModel reads pixel_values"):
        prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=3))
    assert_same(before, state(model))


def test_only_transformers_models() -> None:
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        prefixcore.attach(torch.nn.Linear(2, 2), CONFIGS[1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="attach to the model inside"):
        prefixcore.attach(torch.nn.DataParallel(make("llama")), CONFIGS[1])  # type: ignore[arg-type]


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


def test_setting_another_attention_afterwards_is_noticed() -> None:
    model, ids = make("llama"), tokens(1, 5)
    handle = prefixcore.attach(model, CONFIGS[1])
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="would not be seen"):
        model(ids)
    handle.detach()
    assert model.config._attn_implementation == "sdpa"


def test_attention_weights_are_refused() -> None:
    model, ids = make("llama"), tokens(1, 5)
    handle = prefixcore.attach(model, CONFIGS[1])
    with pytest.raises(NotImplementedError, match="output_attentions"):
        model(ids, output_attentions=True)
    handle.detach()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match=r"config\.output_attentions"):
        prefixcore.attach(model, CONFIGS[1])


def test_learned_positions_run_out() -> None:
    """GPT-2 of 64 positions: refused with the numbers, never an index error inside; at the limit it works."""
    model = make("gpt2")
    for config in (
        PrefixTuningConfig(num_virtual_tokens=64, init="zero"),
        PrefixTuningConfig(num_virtual_tokens=64),
        PromptTuningConfig(num_virtual_tokens=64),
    ):
        before = state(model)
        with pytest.raises(ValueError, match="64 virtual tokens leave no room"):
            prefixcore.attach(model, config)
        torch.set_rng_state(before["rng"])
        assert_same(before, state(model))
    for config in (
        PrefixTuningConfig(num_virtual_tokens=10, init="zero"),
        PromptTuningConfig(num_virtual_tokens=10, init="zero"),
    ):
        with prefixcore.attach(model, config):
            assert model(tokens(1, 54)).logits.shape[1] == 54
            with pytest.raises(ValueError, match=r"64 positions.*needs 65.*at most 54 tokens"):
                model(tokens(1, 55))
            with pytest.raises(ValueError, match="needs 65"):
                model.generate(tokens(1, 50), max_new_tokens=20, eos_token_id=None)
            # 60 tokens, but no row of them has more than 50 positions.
            mask = torch.ones(1, 60, dtype=torch.long)
            mask[:, :10] = 0
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            model(tokens(1, 60), attention_mask=mask, position_ids=positions)


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
