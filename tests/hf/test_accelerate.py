"""An accelerated PEFT model computes what PEFT does, on the same parameters, and can do what PEFT's own cannot."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import prefixcore
import prefixcore.hf.attention
import prefixcore.hf.peft.soft_prompt
from prefixcore.hf import attached

from .models import VOCABULARY, make, padded, tokens

P = 5


def cpt(**options: Any) -> Any:
    types = [1, 2, 2, 3, 4]
    return peft.CPTConfig(cpt_token_ids=[3, 4, 5, 6, 7], cpt_mask=[1] * P, cpt_tokens_type_mask=types, **options)


METHODS: dict[str, Callable[..., Any]] = {
    "prefix": lambda **options: peft.PrefixTuningConfig(num_virtual_tokens=P, **options),
    "projected prefix": lambda **options: peft.PrefixTuningConfig(
        num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=8, **options
    ),
    "cartridge": lambda **options: peft.CartridgeConfig(num_virtual_tokens=P, num_frozen_tokens=2, **options),
    "prompt": lambda **options: peft.PromptTuningConfig(num_virtual_tokens=P, **options),
    "p-tuning": lambda **options: peft.PromptEncoderConfig(num_virtual_tokens=P, encoder_hidden_size=8, **options),
    "p-tuning lstm": lambda **options: peft.PromptEncoderConfig(
        num_virtual_tokens=P, encoder_hidden_size=8, encoder_reparameterization_type="LSTM", **options
    ),
    "multitask": lambda **options: peft.MultitaskPromptTuningConfig(num_virtual_tokens=P, num_tasks=3, **options),
    "cpt": cpt,
}
PREFIXES = ["prefix", "projected prefix", "cartridge"]


def with_peft(method: str, family: str = "llama", **options: Any) -> Any:
    torch.manual_seed(3)
    peft_model = peft.get_peft_model(make(family), METHODS[method](task_type="CAUSAL_LM", **options))
    if method == "cpt":  # zero at the start, which would hide it
        torch.nn.init.normal_(peft_model.prompt_encoder["default"].delta_embedding.weight)
    return peft_model


def inputs(method: str, side: str = "right", labels: bool = True) -> dict[str, Any]:
    batch: dict[str, Any] = padded(side)
    if not labels:
        del batch["labels"]
    return {**batch, "task_ids": torch.tensor([2, 0, 1])} if method == "multitask" else batch


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def step(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    out = model(**batch)
    out.loss.backward()
    return out.logits.detach(), out.loss.detach(), gradients(model)


def assert_close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def count_ops(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of our ops, once for each call from then on."""
    calls: list[str] = []

    def counted(name: str, op: Any) -> Any:
        return lambda *arguments, **options: calls.append(name) or op(*arguments, **options)

    for module, name in (
        (prefixcore.hf.attention, "prefix_attention"),
        (prefixcore.hf.peft.soft_prompt, "soft_embedding"),
    ):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return calls


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
    encoder = model.prompt_encoder["default"]
    forward, calls = encoder.forward, []
    monkeypatch.setattr(encoder, "forward", lambda indices: calls.append(1) or forward(indices))
    model.generate(**inputs("prefix", labels=False), max_new_tokens=5, eos_token_id=None)
    assert len(calls) == 1


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


def _of_length(method: str, num_virtual_tokens: int = P) -> Any:
    config = METHODS[method](task_type="CAUSAL_LM")
    config.num_virtual_tokens = num_virtual_tokens
    return config


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


@pytest.mark.parametrize("method", METHODS)
def test_an_optimizer_made_before_goes_on(method: str) -> None:
    def train(model: Any, accelerate_after: int) -> Any:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for i in range(4):
            if i == accelerate_after:
                prefixcore.accelerate(model)
            optimizer.zero_grad()
            loss = model(**inputs(method)).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    losses = train(with_peft(method), 4)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(train(with_peft(method), 2), losses, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", [{"use_reentrant": False}, {}], ids=["as asked", "as prepare_model_for_kbit_training"])
def test_gradient_checkpointing(method: str, how: dict[str, Any]) -> None:
    expected = step(with_peft(method).train(), inputs(method))
    torch.manual_seed(3)
    base = make("llama")
    base.enable_input_require_grads()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    model = prefixcore.accelerate(base, METHODS[method](task_type="CAUSAL_LM")).model
    if method == "cpt":
        torch.nn.init.normal_(model.prompt_encoder["default"].delta_embedding.weight)
    assert base.is_gradient_checkpointing
    recomputed = []
    base.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: recomputed.append(1))
    assert_close(step(model.train(), inputs(method)), expected)
    assert len(recomputed) == 2
    model.add_adapter("other", _of_length(method))
    assert base.is_gradient_checkpointing


def test_checkpointing_turned_on_later() -> None:
    expected = step(with_peft("prefix").train(), inputs("prefix"))
    model = with_peft("prefix").train()
    prefixcore.accelerate(model)
    model.gradient_checkpointing_enable()
    assert_close(step(model, inputs("prefix")), expected)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant"):
        model(**inputs("prefix"))


@pytest.mark.parametrize("method", METHODS)
def test_two_adapters_under_checkpointing_each_get_their_own_gradient(method: str) -> None:
    """The backward runs layers again when another adapter is active."""

    def run(checkpointing: bool) -> Any:
        model = with_peft(method).train()
        prefixcore.accelerate(model)
        model.add_adapter("other", _of_length(method))
        torch.nn.init.normal_(next(model.prompt_encoder["other"].parameters()), generator=torch.manual_seed(1))
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        losses = []
        for name in ("default", "other"):
            model.set_adapter(name)
            losses.append(model(**inputs(method)).loss)
        sum(losses).backward()
        return torch.stack(losses).detach(), gradients(model)

    expected = run(False)
    names = {name.split(".")[1] for name in expected[1]}
    assert names == {"default", "other"}
    assert_close(run(True), expected)


def test_input_gradients_keep_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook that training in few bits needs leaves the embedding a plain look-up; another hook does not."""
    model, batch = with_peft("prompt"), inputs("prompt")
    expected = step(model, batch)
    calls = count_ops(monkeypatch)
    prefixcore.accelerate(model)
    model.enable_input_require_grads()
    assert_close(step(model, batch), expected)
    assert calls == ["soft_embedding"]
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: 2 * output)
    assert not torch.allclose(step(model, batch)[1], expected[1])
    assert calls == ["soft_embedding"]


@pytest.mark.parametrize("method", METHODS)
def test_training_is_resumed(method: str, tmp_path: Path) -> None:
    model = with_peft(method)
    expected = model(**inputs(method)).loss.detach()
    model.save_pretrained(tmp_path)
    accelerated = prefixcore.accelerate(make("llama"), tmp_path, is_trainable=True)
    resumed = accelerated.model
    loss = resumed(**inputs(method)).loss
    assert_close(loss.detach(), expected)
    optimizer = torch.optim.SGD([p for p in resumed.parameters() if p.requires_grad], lr=0.1)
    loss.backward()
    optimizer.step()
    trained = resumed(**inputs(method)).loss.detach()
    assert trained < expected
    resumed.save_pretrained(tmp_path / "again")
    accelerated.undo()
    assert_close(resumed(**inputs(method)).loss.detach(), trained)
    loaded = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "again")
    assert_close(loaded(**inputs(method)).loss.detach(), trained)


def test_frozen_tokens_stay_when_training_is_resumed(tmp_path: Path) -> None:
    with_peft("cartridge").save_pretrained(tmp_path)
    model = prefixcore.accelerate(make("llama"), str(tmp_path), is_trainable=True).model
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names == ["prompt_encoder.default.trainable_embedding"]


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


def pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


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


def test_continuous_batching_is_refused() -> None:
    model = with_peft("prefix")
    with prefixcore.accelerate(model), pytest.raises(NotImplementedError, match="continuous batching"):
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


_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("build", "task_type", "method", "message"),
    [
        (lambda: _t5(), "SEQ_2_SEQ_LM", "prefix", "encoder-decoder"),
        (lambda: _t5(), "SEQ_2_SEQ_LM", "prompt", "encoder-decoder"),
        (lambda: _bloom(), "CAUSAL_LM", "prefix", "Bloom"),
        (lambda: _gpt_neo(), "CAUSAL_LM", "prefix", "GPTNeo"),
        (lambda: _bert(), "TOKEN_CLS", "prefix", "not causal"),
        (lambda: make("llama"), None, "prompt", "task_type"),
    ],
    ids=["t5 prefix", "t5 prompt", "bloom", "gpt_neo", "bert", "no task"],
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


def _t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )


def _bloom() -> Any:
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    )


def _gpt_neo() -> Any:
    config = transformers.GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    return transformers.GPTNeoForCausalLM(config)


def _bert() -> Any:
    return transformers.BertForTokenClassification(transformers.BertConfig(**_SMALL, intermediate_size=48))


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


def test_the_base_model_compiles_bare() -> None:
    model, batch = with_peft("prefix"), inputs("prefix")
    expected = model.base_model(**batch).logits
    prefixcore.accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model, backend="eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(**batch).logits, expected)


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
