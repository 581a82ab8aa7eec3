"""Training an accelerated PEFT model: the parameters are the same, checkpointing works, and it is resumed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import prefixcore
import prefixcore.hf.attention.interface
import prefixcore.hf.peft.soft_prompt

from .accelerated import METHODS, P, _of_length, assert_close, count_ops, gradients, inputs, step, with_peft
from .models import make


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


@pytest.fixture
def engine() -> Iterator[Accelerator]:
    """Of mixed precision, whatever a Trainer has made of the process before; accelerate keeps one state for all."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_mixed_precision_that_is_there_already_is_not_lost(engine: Accelerator, method: str) -> None:
    """Its wrapper is `model.forward`, in whose place ours would be put: the model would go on in float32."""
    model = with_peft(method)
    prepared = engine.prepare(model)
    with pytest.raises(ValueError, match=r"call prefixcore.accelerate first and Accelerator.prepare after it"):
        prefixcore.accelerate(prepared)
    with torch.no_grad():
        expected = prepared(**inputs(method)).logits
    prefixcore.accelerate(engine.unwrap_model(prepared, keep_fp32_wrapper=False))
    with torch.no_grad():
        got = engine.prepare(model)(**inputs(method)).logits
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_mixed_precision_of_the_accelerate_library(engine: Accelerator, method: str) -> None:
    """It takes the function of a bound `forward` and binds it to the model: as Trainer does with `bf16=True`."""
    results = []
    for accelerated in (False, True):
        model = with_peft(method)
        if accelerated:
            prefixcore.accelerate(model)
        model = engine.prepare(model)
        results.append(step(model, inputs(method)))
        bare = engine.unwrap_model(model, keep_fp32_wrapper=False)  # which binds what it finds
        results[-1] = (*results[-1], *step(bare, inputs(method)))
    torch.testing.assert_close(results[1], results[0], rtol=0.05, atol=0.1)
    handle = prefixcore.attach(make("llama"), prefixcore.PrefixTuningConfig(P, seed=0))
    expected = step(handle.model, inputs(method))
    bare = engine.unwrap_model(engine.prepare(handle.model), keep_fp32_wrapper=False)
    assert_close(step(bare, inputs(method)), expected)
