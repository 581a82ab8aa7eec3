"""What `accelerate` does not take of encoder-decoders, in words, with the model left as it was."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

import prefixcore

from . import models
from .accelerated import METHODS
from .accelerated_seq2seq import inputs, with_peft
from .encoder_decoders import make
from .tiny_models import make as make_any

pytestmark = pytest.mark.filterwarnings("ignore")


_OLDER = "|T5.*calls attention 0 times"
"""Before transformers 5.15 its attention is its own."""


def _any(name: str) -> Any:
    return make_any(f"{name}ForConditionalGeneration", name.lower(), decoder_start_token_id=1)


@pytest.mark.parametrize(
    ("build", "method", "options", "message"),
    [
        (lambda: make("t5"), "prefix", {}, f"T5.*learned bias.*PREFIX_TUNING stands at.*works as it is{_OLDER}"),
        (lambda: make("mt5"), "cartridge", {}, f"MT5.*learned bias.*CARTRIDGE stands at positions{_OLDER}"),
        (lambda: _any("LED"), "prefix", {}, "LED.*a prefix must reach each layer once"),
        (lambda: make("bart"), "prefix", {}, "a prefix for 2 layers.*has 3 that.*num_layers=3"),
        (lambda: make("bart"), "prefix", {"num_attention_heads": 2}, "2 heads of dimension 16"),
        (
            lambda: make("bart"),
            "prefix",
            {"num_layers": 3, "num_transformer_submodules": 1},
            "num_transformer_submodules=1.*takes 2: leave it out",
        ),
        (
            lambda: make("t5"),
            "prompt",
            {"num_transformer_submodules": 3},
            "num_transformer_submodules=3.*takes 1 or 2: leave it out, and PEFT chooses 2",
        ),
        (lambda: make("t5"), "prompt", {"task_type": "CAUSAL_LM"}, "T5.*is an encoder-decoder, and its PeftModel.*"),
        (
            lambda: models.make("llama"),
            "prompt",
            {},
            "Llama.*is no encoder-decoder, but its PeftModel is a PeftModelForSeq2SeqLM",
        ),
        (
            lambda: models.make("llama"),
            "prompt",
            {"task_type": "CAUSAL_LM", "num_transformer_submodules": 2},
            "num_transformer_submodules=2.*takes 1: leave it out, and PEFT chooses 1",
        ),
    ],
)
def test_refused_by_name(build: Any, method: str, options: dict[str, Any], message: str) -> None:
    config = METHODS[method](**{"task_type": "SEQ_2_SEQ_LM", **options})
    model = peft.get_peft_model(build(), config)
    attributes, base = set(model.__dict__), set(model.base_model.__dict__)
    attention = model.base_model.config._attn_implementation
    with pytest.raises(NotImplementedError, match=message):
        prefixcore.accelerate(model)
    assert set(model.__dict__) == attributes
    assert set(model.base_model.__dict__) == base
    assert model.base_model.config._attn_implementation == attention


def test_an_adapter_that_is_added_has_to_reach_each_layer() -> None:
    model = with_peft("prefix", "bart")
    prefixcore.accelerate(model)
    model.add_adapter("short", METHODS["prefix"](task_type="SEQ_2_SEQ_LM", num_layers=2))
    model.set_adapter("short")
    with pytest.raises(NotImplementedError, match="adapter 'short' is a prefix for 2 layers.*has 3"):
        model(**inputs("prefix"))


@pytest.mark.parametrize(("family", "method"), [("bart", "prefix"), ("t5", "prompt")])
def test_generate_takes_arguments_by_name_as_peft_does(family: str, method: str) -> None:
    model = with_peft(method, family)
    prefixcore.accelerate(model)
    with pytest.raises(TypeError, match=r"by name: generate\(input_ids=...\)"):
        model.generate(inputs(method, family)["input_ids"])


def test_peft_itself_fails_where_the_words_say_so() -> None:
    """With one stack its cache has no place for cross-attention; with fewer layers none for the last."""
    for options in ({"num_layers": 3, "num_transformer_submodules": 1}, {"num_layers": 2}):
        model = peft.get_peft_model(make("bart"), METHODS["prefix"](task_type="SEQ_2_SEQ_LM", **options))
        with torch.no_grad(), pytest.raises((RuntimeError, IndexError)):
            model(**inputs("prefix"))
