"""An accelerated PEFT model computes what PEFT does."""

from __future__ import annotations

import inspect
from typing import Any

import peft
import pytest
import torch
import transformers

import prefixcore
import prefixcore.hf.attention.interface
import prefixcore.hf.peft.soft_prompt

from .accelerated import (
    METHODS,
    PREFIXES,
    P,
    _of_length,
    assert_close,
    count_ops,
    evaluations,
    gradients,
    inputs,
    step,
    with_peft,
)
from .models import VOCABULARY, make, padded, tokens


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_logits_loss_gradients(method: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = with_peft(method), inputs(method, side)
    names = [name for name, _ in model.named_parameters()]
    keys = list(model.state_dict())
    expected = step(model, batch)
    calls = count_ops(monkeypatch)
    prefixcore.accelerate(model)
    got = step(model, batch)
    assert expected[2], "nothing is trained"
    assert_close(got, expected)
    assert set(calls) == {"prefix_attention" if method in PREFIXES else "soft_embedding"}
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == keys
    assert got[0].shape[1] == (9 if method in PREFIXES else 9 + P)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3", "gpt_oss"])
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_families(family: str, method: str) -> None:
    model, batch = with_peft(method, family), inputs(method, "left")
    expected = step(model, batch)
    prefixcore.accelerate(model)
    assert_close(step(model, batch), expected)


@pytest.mark.parametrize("name", ["Olmo", "StableLm"])
def test_families_that_are_not_known(name: str) -> None:
    """They are compared with PEFT on the spot. The layers of StableLm do not get the arguments of its call."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    base, batch = getattr(transformers, f"{name}ForCausalLM")(config).eval(), padded("right")
    bare = base(**batch).logits
    model = peft.get_peft_model(base, METHODS["prefix"](task_type="CAUSAL_LM")).eval()
    expected = step(model, batch)
    prefixcore.accelerate(model)
    assert_close(step(model, batch), expected)
    assert torch.equal(base(**batch).logits, bare)


@pytest.mark.parametrize("method", METHODS)
def test_without_a_mask_and_with_embeddings(method: str) -> None:
    model, batch = with_peft(method), {**inputs(method, "none"), "attention_mask": None}
    embeds = {**batch, "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]), "input_ids": None}
    expected = step(model, batch), step(model, embeds)
    prefixcore.accelerate(model)
    assert_close(step(model, batch), expected[0])
    assert_close(step(model, embeds), expected[1])


@pytest.mark.parametrize("method", PREFIXES)
def test_given_positions(method: str) -> None:
    model, batch = with_peft(method), padded("left")
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = step(model, batch)
    prefixcore.accelerate(model)
    assert_close(step(model, batch), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}], ids=str)
def test_generate(method: str, options: dict[str, Any]) -> None:
    model, batch = with_peft(method), inputs(method, "left", labels=False)
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, **options}

    def generated() -> Any:
        torch.manual_seed(0)
        return model.generate(**batch, **options)

    expected = generated()
    accelerated = prefixcore.accelerate(model)
    assert torch.equal(generated(), expected)
    assert_close(step(model, inputs(method)), step(model, inputs(method)))  # nothing is held from it
    accelerated.undo()
    assert torch.equal(generated(), expected)


def test_a_projected_prefix_is_computed_once_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_peft("projected prefix")
    prefixcore.accelerate(model)
    calls = evaluations(model, monkeypatch)
    model.generate(**inputs("prefix", labels=False), max_new_tokens=5, eos_token_id=None)
    assert len(calls) == 1


def test_a_prefix_is_not_in_the_cache() -> None:
    model, ids = with_peft("prefix"), tokens(2, 9)
    expected = model(input_ids=ids).logits
    prefixcore.accelerate(model)
    first = model(input_ids=ids[:, :6], use_cache=True)
    assert first.past_key_values.get_seq_length() == 6
    second = model(input_ids=ids[:, 6:], past_key_values=first.past_key_values, attention_mask=torch.ones(2, 9).long())
    assert_close(torch.cat((first.logits, second.logits), 1), expected)


def test_a_cache_is_of_the_adapter_that_filled_it() -> None:
    model, ids = with_peft("prefix"), tokens(2, 9)
    accelerated = prefixcore.accelerate(model)
    model.add_adapter("other", _of_length("prefix", P + 2))
    rest: dict[str, Any] = {"input_ids": ids[:, 6:], "attention_mask": torch.ones(2, 9).long()}

    def filled(model: Any) -> Any:
        return model(input_ids=ids[:, :6], use_cache=True).past_key_values

    model.set_adapter("other")
    expected = model(input_ids=ids).logits[:, 6:]
    cache, again = filled(model), filled(model)
    assert_close(model(**rest, past_key_values=cache).logits, expected)
    with pytest.raises(RuntimeError, match="start a new cache"):
        model.base_model(**rest, past_key_values=again)
    model.set_adapter("default")
    with pytest.raises(ValueError, match="filled behind other virtual tokens"):
        model(**rest, past_key_values=again)
    with pytest.raises(ValueError, match="without these virtual tokens"):
        model(**rest, past_key_values=filled(model.base_model))
    model.set_adapter("other")
    assert_close(model(**rest, past_key_values=again).logits, expected)
    accelerated.undo()


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_compiled(method: str) -> None:
    model, batch = with_peft(method), inputs(method)
    expected = step(model, batch)
    prefixcore.accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(3):
        out = compiled(**batch)
        out.loss.backward()
        assert_close((out.logits.detach(), out.loss.detach(), gradients(model)), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(**batch)
    if method == "prompt":
        with pytest.raises(IndexError, match="expected 0 <= id"):
            compiled(**{**batch, "input_ids": torch.full((3, 9), VOCABULARY)})


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_an_exported_program_has_the_virtual_tokens(method: str) -> None:
    model, ids = with_peft(method), tokens(2, 5)
    bare, signature = model.get_base_model()(ids).logits, inspect.signature(model.forward)
    prefixcore.accelerate(model)
    assert inspect.signature(model.forward) == signature
    given = {"input_ids": ids, "use_cache": False}
    program = torch.export.export(model, (), given, strict=False).module()
    expected = model(**given).logits
    assert_close(program(**given).logits, expected)
    assert (expected[:, -5:] - bare).abs().max() > 1e-3


def test_the_base_model_compiles_bare() -> None:
    model, batch = with_peft("prefix"), inputs("prefix")
    expected = model.base_model(**batch).logits
    prefixcore.accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model, backend="eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(**batch).logits, expected)


def test_the_loss_of_cpt_needs_no_adapter_of_a_certain_name() -> None:
    expected = with_peft("cpt")(**inputs("cpt")).loss
    model = peft.get_peft_model(make("llama"), METHODS["cpt"](task_type="CAUSAL_LM"), adapter_name="mine")
    model.prompt_encoder["mine"].load_state_dict(with_peft("cpt").prompt_encoder["default"].state_dict())
    prefixcore.accelerate(model)
    types = torch.full((3, 9), 4)
    assert_close(model(**inputs("cpt"), input_type_mask=types).loss, expected)
    assert torch.equal(types, torch.full((3, 9), 4))


def test_ids_out_of_range() -> None:
    model = with_peft("prompt")
    prefixcore.accelerate(model)
    with pytest.raises(IndexError, match=f"0 to {VOCABULARY - 1}"):
        model(input_ids=torch.tensor([[1, VOCABULARY]]))
    assert repr(model.__dict__["_prefixcore_accelerated"]) == "Accelerated(PROMPT_TUNING on LlamaForCausalLM)"


@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    model, batch = with_peft(method), inputs(method)
    model.base_model.to(dtype)
    expected = step(model, batch)
    accelerated = prefixcore.accelerate(model)
    got = step(model, batch)
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.1)
    assert got[0].dtype == dtype
    assert next(iter(got[2].values())).dtype == torch.float32
    assert accelerated.backend().name
