"""The attention function by itself, and models with softcap, sinks and windows against transformers' own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import prefixcore
from prefixcore import PrefixTuningConfig
from prefixcore.hf.attention.interface import ATTENTION, LAYER, Layer, prefix_attention_forward

from .models import FAMILIES, KNOWN, make, padded, tokens, window_of


def test_both_interfaces_know_the_name() -> None:
    assert isinstance(ALL_ATTENTION_FUNCTIONS, AttentionInterface)
    assert isinstance(ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface)
    assert ALL_ATTENTION_FUNCTIONS[ATTENTION] is prefix_attention_forward
    assert ATTENTION in ALL_MASK_ATTENTION_FUNCTIONS


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_without_a_prefix_it_is_eager_attention(family: str, side: str) -> None:
    """Softcap (Gemma 2), sinks (gpt-oss), windows, grouped heads and scales all arrive at the op."""
    model, batch = make(family, **window_of(family, 4)).requires_grad_(False), padded(side)
    outputs = {}
    for implementation in ("eager", ATTENTION):
        model.set_attn_implementation(implementation)
        outputs[implementation] = model(**batch)
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(outputs[ATTENTION].logits[seen], outputs["eager"].logits[seen], rtol=1e-5, atol=1e-5)
    if side != "left":  # there the first token is predicted from padding, which sees nothing
        torch.testing.assert_close(outputs[ATTENTION].loss, outputs["eager"].loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [name for name in FAMILIES if KNOWN[name].attention_arguments])
def test_softcap_and_sinks_matter(family: str) -> None:
    """So that the test above would notice if they did not arrive."""
    model, ids = make(family), tokens(2, 6)
    expected = model(ids).logits
    for layer in model.model.layers:
        if "softcap" in KNOWN[family].attention_arguments:
            layer.self_attn.attn_logit_softcapping = None
        if "s_aux" in KNOWN[family].attention_arguments:
            torch.nn.init.constant_(layer.self_attn.sinks, -30.0)
    assert (model(ids).logits - expected).abs().max() > 1e-3


def _call(**changes: Any) -> Any:
    module: Any = SimpleNamespace(is_causal=True)
    query = torch.randn(2, 4, 3, 8)
    key = torch.randn(2, 2, 3, 8)
    return prefix_attention_forward(module, query, key, key, None, **changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("head_mask", torch.ones(4)),
        ("cache", object()),
        ("output_attentions", True),
    ],
)
def test_what_it_cannot_honour_is_named(name: str, value: Any) -> None:
    with pytest.raises(NotImplementedError, match=f"cannot honour {name}:"):
        _call(**{name: value})
    _call(**{name: False if name == "output_attentions" else None})


def test_arguments_that_do_not_concern_it_pass() -> None:
    out, weights = _call(position_ids=torch.arange(3)[None], use_cache=False, num_items_in_batch=3, max_length_q=None)
    assert weights is None
    assert out.shape == (2, 3, 4, 8)
    assert out.is_contiguous()


def test_an_unknown_argument_of_a_model_is_found_when_attaching() -> None:
    model = make("llama")
    inner = model.model.layers[1].self_attn
    forward = inner.forward
    inner.forward = lambda *args, **kwargs: forward(*args, alibi=torch.ones(1), **kwargs)
    with pytest.raises(NotImplementedError, match=r"model\.layers\.1\.self_attn calls attention with alibi"):
        prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=2))


def test_a_layer_that_is_not_reached_is_found_when_attaching() -> None:
    model = make("llama", num_hidden_layers=3)
    model.model.layers[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
    with pytest.raises(NotImplementedError, match="3 layers with attention, but 2 attention modules"):
        prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=2))


def test_a_layer_without_its_model_is_an_error() -> None:
    module: Any = SimpleNamespace(is_causal=True, **{LAYER: Layer(0, "sdpa")})
    query = torch.randn(2, 4, 3, 8)
    with pytest.raises(RuntimeError, match="does not get the arguments of its model's forward"):
        prefix_attention_forward(module, query, query, query, None)


def test_modules_without_a_layer_prefix_see_none() -> None:
    model, ids = make("llama"), tokens(2, 6)
    other = make("llama", seed=5)
    expected = other(ids).logits
    prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=2, init="random"))
    other.set_attn_implementation(ATTENTION)
    torch.testing.assert_close(other(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["StableLm", "Nemotron"])
def test_a_decoder_that_hands_no_arguments_on(name: str) -> None:
    """Its layers find the prefix by the thread that runs them; what a thread does not tell is refused."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, num_attention_heads=4, num_key_value_heads=2)
    config.initializer_range = 0.2
    model, batch = getattr(transformers, f"{name}ForCausalLM")(config).eval(), padded("left")
    with torch.no_grad():
        bare = model(**batch).logits
    handle = prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=3, init="random", seed=0))
    ids = batch["input_ids"][:1]
    expected = model(ids).logits
    assert (expected - bare[:1]).abs().max() > 1e-3
    torch.testing.assert_close(model(**batch).logits[:1], expected, rtol=1e-5, atol=1e-5)
    with handle.disabled(), torch.no_grad():
        assert torch.equal(model(**batch).logits, bare)
        with ThreadPoolExecutor(1) as pool:
            got = pool.submit(lambda: model(ids).logits).result()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(NotImplementedError, match="which repeats them in the backward"):
        model(**batch)
    model.eval()
    packed = prefixcore.PackedCollator()([{"input_ids": [5, 6]}, {"input_ids": [7]}])
    with pytest.raises(NotImplementedError, match="cannot be packed"):
        model(**packed)
