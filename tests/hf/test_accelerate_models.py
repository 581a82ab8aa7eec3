"""Which models and heads are accelerated, and which are refused, by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import prefixcore
import prefixcore.hf.attention.interface
import prefixcore.hf.peft.soft_prompt

from .accelerated import METHODS, PREFIXES, P, assert_close, gradients, inputs, step, with_peft
from .models import VOCABULARY, make, tokens


@pytest.mark.parametrize("method", PREFIXES)
def test_continuous_batching(method: str) -> None:
    """PEFT hands `generate_batch` on to the base model, without the prefix; accelerated it has it."""
    model, requests = with_peft(method), [[5, 6, 7], [8, 9, 10, 11]]
    pages = transformers.ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    options = transformers.GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1)

    def batched() -> list[list[int]]:
        made = model.generate_batch(requests, generation_config=options, continuous_batching_config=pages)
        return [each.generated_tokens for each in made.values()]

    def managed(manager: Any) -> list[list[int]]:
        names = manager.add_requests(requests, max_new_tokens=5)
        found = {}
        while len(found) < len(names):
            result = manager.get_result(timeout=10)
            found[result.request_id] = result.generated_tokens
        return [found[name] for name in names]

    def one_by_one() -> list[list[int]]:
        rows = [torch.tensor([ids]) for ids in requests]
        given = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        made = [model.generate(input_ids=row, attention_mask=torch.ones_like(row), **given) for row in rows]
        return [out[0, row.shape[1] :].tolist() for out, row in zip(made, rows, strict=True)]

    expected = one_by_one()
    with model.disable_adapter():
        bare = one_by_one()
    assert batched() == bare != expected
    with prefixcore.accelerate(model):
        assert batched() == one_by_one() == expected
        with model.continuous_batching_context_manager(options, continuous_batching_config=pages) as manager:
            assert managed(manager) == expected
        with model.disable_adapter():
            assert batched() == bare
        assert model.base_model.generate_batch(requests, options, pages)["req_0"].generated_tokens == bare[0]
        model.generate_batch(requests, options, pages, persistent_manager=True)
        with model.base_model.continuous_batching_context_manager(options, continuous_batching_config=pages) as manager:
            assert managed(manager) == bare  # of the base model by itself, though one with the prefix was kept
        with torch.no_grad():
            for parameter in model.prompt_encoder.parameters():
                parameter.mul_(-3.0)
        assert batched() == one_by_one() != expected
    assert batched() == bare


def test_continuous_batching_of_a_soft_prompt_is_refused() -> None:
    model = with_peft("prompt")
    with prefixcore.accelerate(model), pytest.raises(NotImplementedError, match="without its PROMPT_TUNING"):
        model.generate_batch([[1, 2, 3]], max_new_tokens=2)


_HEADS = {
    "SEQ_CLS": (transformers.LlamaForSequenceClassification, {"labels": torch.tensor([0, 1, 1])}),
    "TOKEN_CLS": (transformers.LlamaForTokenClassification, {"labels": torch.ones(3, 9, dtype=torch.long)}),
    "QUESTION_ANS": (
        transformers.LlamaForQuestionAnswering,
        {"start_positions": torch.tensor([1, 2, 0]), "end_positions": torch.tensor([3, 4, 1])},
    ),
    "FEATURE_EXTRACTION": (transformers.LlamaModel, {}),
}


@pytest.mark.parametrize("task_type", _HEADS)
@pytest.mark.parametrize("method", ["prefix", "cartridge", "prompt", "p-tuning"])
def test_other_heads(task_type: str, method: str) -> None:
    cls, targets = _HEADS[task_type]
    torch.manual_seed(0)
    base = cls(make("llama").config)
    config = METHODS[method](task_type=task_type)
    model = peft.get_peft_model(base, config).eval()
    batch = {**inputs(method, "right", labels=False), **targets}
    if task_type == "TOKEN_CLS" and method not in PREFIXES:
        batch["labels"] = torch.ones(3, 9 + P, dtype=torch.long)  # PEFT leaves the labels as they are

    def run() -> Any:
        out = model(**batch)
        loss = out.loss if targets else out.last_hidden_state.square().mean()
        loss.backward()
        return loss.detach(), out[1] if targets else out[0].detach(), gradients(model)

    expected = run()
    prefixcore.accelerate(model)
    assert_close(run(), expected)
    if task_type == "SEQ_CLS":
        assert any("modules_to_save" in name for name in expected[2])  # PEFT trains the head too


@pytest.mark.parametrize("method", ["prompt", "p-tuning"])
def test_a_soft_prompt_on_an_encoder(method: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=VOCABULARY, **sizes))
    model = peft.get_peft_model(base, METHODS[method](task_type="SEQ_CLS")).eval()
    batch = {**inputs(method, labels=False), "labels": torch.tensor([0, 1, 1])}
    batch["token_type_ids"] = torch.ones_like(batch["input_ids"])
    expected = step(model, batch)
    prefixcore.accelerate(model)
    assert_close(step(model, batch), expected)


@pytest.mark.parametrize(
    ("build", "task_type", "method", "message"),
    [
        (lambda: _bloom(), "CAUSAL_LM", "prefix", "Bloom.*the PeftModel works as it is"),
        (lambda: _gpt_neo(), "CAUSAL_LM", "prefix", "GPTNeo.*the PeftModel works as it is"),
        (lambda: make("llama"), None, "prompt", "task_type"),
    ],
    ids=["bloom", "gpt_neo", "no task"],
)
def test_refused_by_name(build: Any, task_type: Any, method: str, message: str) -> None:
    model_class = peft.get_peft_model if task_type else peft.PeftModel
    model = model_class(build(), METHODS[method](task_type=task_type))
    attributes, base = set(model.__dict__), set(model.base_model.__dict__)
    attention = model.base_model.config._attn_implementation
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(NotImplementedError, match=message):
        prefixcore.accelerate(model)
    assert set(model.__dict__) == attributes
    assert set(model.base_model.__dict__) == base
    assert model.base_model.config._attn_implementation == attention
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("build", [lambda: _bloom(), lambda: _gpt_neo()], ids=["bloom", "gpt_neo"])
def test_what_a_refusal_advises_works(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = build().eval()
    bare = copy.deepcopy(base)
    model = peft.get_peft_model(base, METHODS["prefix"](task_type="CAUSAL_LM"))
    with pytest.raises(NotImplementedError, match=r"works as it is.*give the folder to prefixcore.load"):
        prefixcore.accelerate(model)
    ids = tokens(2, 7)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    expected = model.eval()(input_ids=ids).logits
    with prefixcore.load(bare, tmp_path) as handle:
        torch.testing.assert_close(handle.model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_where_peft_itself_fails_load_is_advised_and_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PEFT 0.21 does with a prefix on an encoder from transformers 5.24 on."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=VOCABULARY, **sizes)).eval()
    bare, batch = copy.deepcopy(base), inputs("prefix", labels=False)
    model = peft.get_peft_model(base, METHODS["prefix"](task_type="SEQ_CLS"))

    def forward(self: Any, **kwargs: Any) -> Any:
        raise ValueError("Model does not support past key values")

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(NotImplementedError, match=r"does not support past key values.*give its folder to the other"):
        prefixcore.accelerate(model)
    model.save_pretrained(tmp_path)
    without = bare(**batch).logits
    with prefixcore.load(bare, tmp_path) as handle:
        assert handle.bake()[0][0].shape == (4, P, 8)
        assert not torch.allclose(bare(**batch).logits, without, atol=1e-4)


def _bloom() -> Any:
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    )


def _gpt_neo() -> Any:
    config = transformers.GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    return transformers.GPTNeoForCausalLM(config)


def test_a_peft_before_0_20_is_refused_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_peft("prompt")
    monkeypatch.delattr(peft.PeftModel, "_adjust_prompt_learning_kwargs")
    monkeypatch.setattr(peft, "__version__", "0.19.1")
    with pytest.raises(NotImplementedError, match="PEFT has from 0.20 on, and not in 0.19.1"):
        prefixcore.accelerate(model)


def test_what_is_not_for_it() -> None:
    with pytest.raises(TypeError, match=r"PeftModel.*got LlamaForCausalLM"):
        prefixcore.accelerate(make("llama"))
    with pytest.raises(TypeError, match="got Linear"):
        prefixcore.accelerate(torch.nn.Linear(2, 2), METHODS["prompt"]())  # type: ignore[arg-type]
    lora = peft.get_peft_model(make("llama"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(NotImplementedError, match="LORA learns no virtual tokens"):
        prefixcore.accelerate(lora)
    model = with_peft("multitask")
    prefixcore.accelerate(model)
    with pytest.raises(ValueError, match="task_ids"):
        model(input_ids=tokens(2, 5))
