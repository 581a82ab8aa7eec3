"""Virtual tokens and PEFT's LoRA in one model: whichever is first, both train, or one does, as said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import prefixcore

from .models import make, padded

CONFIGS = [
    prefixcore.PrefixTuningConfig(4, seed=0),
    prefixcore.PrefixTuningConfig(4, seed=0, reparameterization="mlp"),
    prefixcore.PromptTuningConfig(4, seed=0),
    prefixcore.PTuningConfig(4, seed=0),
]


def lora(**options: Any) -> Any:
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": ["q_proj", "v_proj"], **options})


def made(config: Any, first: str) -> tuple[Any, Any]:
    """The PeftModel and the handle; `first` is "attach" or "lora"."""
    model = make("llama").train()
    if first == "attach":
        handle = prefixcore.attach(model, config)
        torch.manual_seed(1)
        return peft.get_peft_model(model, lora()).train(), handle
    torch.manual_seed(1)
    model = peft.get_peft_model(model, lora()).train()
    with pytest.warns(UserWarning, match="train_with_peft"):
        handle = prefixcore.attach(model.get_base_model(), config)
    return model, handle


def parts(model: Any, handle: Any) -> dict[str, list[torch.Tensor]]:
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    own = {id(p) for p in (*adapters, *handle.parameters())}
    return {
        "virtual tokens": list(handle.parameters()),
        "peft": adapters,
        "base": [p for p in model.parameters() if id(p) not in own],
    }


def moved(model: Any, handle: Any) -> set[str]:
    """Which of the three two steps of training change."""
    before = {name: [p.detach().clone() for p in each] for name, each in parts(model, handle).items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # the second matrix of a LoRA starts at zero, and so does the gradient of the first
        optimizer.zero_grad()
        model(**padded("right")).loss.backward()
        optimizer.step()
    return {
        name
        for name, each in parts(model, handle).items()
        if any(not torch.equal(p, old) for p, old in zip(each, before[name], strict=True))
    }


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("first", ["attach", "lora"])
def test_both_train(config: Any, first: str) -> None:
    model, handle = made(config, first)
    handle.train_with_peft()
    assert moved(model, handle) == {"virtual tokens", "peft"}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("first", ["attach", "lora"])
def test_one_is_frozen_as_said(config: Any, first: str, recwarn: pytest.WarningsRecorder) -> None:
    model, handle = made(config, first)
    handle.train_with_peft(virtual_tokens=False)
    assert moved(model, handle) == {"peft"}
    handle.train_with_peft(peft=False)
    assert moved(model, handle) == {"virtual tokens"}
    assert not [w for w in recwarn if "train_with_peft" in str(w.message)]


@pytest.mark.parametrize("config", CONFIGS)
def test_peft_does_not_freeze_in_silence(config: Any) -> None:
    model, handle = made(config, "attach")
    with pytest.warns(UserWarning, match="PEFT has frozen the virtual tokens"):
        assert moved(model, handle) == {"peft"}


def test_what_was_frozen_by_hand_is_left_alone(recwarn: pytest.WarningsRecorder) -> None:
    model = make("llama").train()
    handle = prefixcore.attach(model, CONFIGS[0])
    for parameter in handle.parameters():
        parameter.requires_grad_(False)
    model(**padded("right"))
    with torch.no_grad():
        peft.get_peft_model(model, lora())(**padded("right"))
    assert not [w for w in recwarn if "PEFT" in str(w.message)]


@pytest.mark.parametrize(
    "config", [*CONFIGS, prefixcore.PTuningConfig(4, encoder_reparameterization_type="LSTM", encoder_num_layers=1)]
)
def test_all_linear_leaves_the_reparameterization_alone(config: Any) -> None:
    model = make("llama").train()
    handle = prefixcore.attach(model, config)
    model = peft.get_peft_model(model, lora(target_modules="all-linear")).train()
    assert not [name for name, _ in model.named_parameters() if "lora_" in name and "prefixcore" in name]
    handle.train_with_peft()
    assert moved(model, handle) == {"virtual tokens", "peft"}


def test_a_lora_in_the_reparameterization_is_refused() -> None:
    model = make("llama").train()
    prefixcore.attach(model, CONFIGS[1])
    model = peft.get_peft_model(model, lora(target_modules=["q_proj", "embedding"])).train()
    with pytest.raises(RuntimeError, match="exclude_modules"):
        model(**padded("right"))


@pytest.mark.parametrize("first", ["attach", "lora"])
def test_detach_leaves_the_base_frozen(first: str) -> None:
    model, handle = made(CONFIGS[0], first)
    handle.train_with_peft()
    handle.detach()
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert any(p.requires_grad for p in model.parameters())


def test_detach_without_an_adapter_of_peft() -> None:
    model = make("llama")
    prefixcore.attach(model, CONFIGS[0]).detach()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("first", ["bank", "lora"])
def test_each_adapter_of_a_bank_is_trained_or_not_as_its_handle_says(first: str) -> None:
    model = make("llama").train()
    if first == "lora":
        model = peft.get_peft_model(model, lora()).train()
        with pytest.warns(UserWarning, match="train_with_peft"):
            bank = prefixcore.PromptBank(model.get_base_model())
    else:
        bank = prefixcore.PromptBank(model)
    handles = {name: bank.attach(name, CONFIGS[i]) for name, i in (("prefix", 0), ("prompt", 2), ("mlp", 1))}
    if first == "bank":
        model = peft.get_peft_model(model, lora()).train()
        for name in handles:
            with pytest.warns(UserWarning, match=f"PEFT has frozen the virtual tokens of '{name}'"):
                model.get_base_model()(**padded("right"), task_ids=name)
    for name, handle in handles.items():
        handle.train_with_peft(virtual_tokens=name != "prompt")
    # The model inside: PEFT's forward has an argument of the name task_ids, and drops it.
    model.get_base_model()(**padded("right"), task_ids=["prefix", "prompt", "mlp"]).loss.backward()
    for name, handle in handles.items():
        assert all((p.grad is not None) == (name != "prompt") for p in handle.parameters())
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


def test_an_adapter_that_a_bank_loaded_to_be_used_is_not_trained(tmp_path: Path) -> None:
    with prefixcore.attach(make("llama"), CONFIGS[0]) as handle:
        handle.save(tmp_path / "one")
    loaded = prefixcore.PromptBank(make("llama")).load("one", tmp_path / "one")
    with pytest.raises(ValueError, match="trainable=True"):
        loaded.train_with_peft()
    loaded.train_with_peft(virtual_tokens=False)
    assert loaded.num_trainable == 0


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[2]])
@pytest.mark.parametrize("first", ["attach", "lora"])
def test_saved_apart_and_loaded_in_either_order(config: Any, first: str, tmp_path: Path) -> None:
    model, handle = made(config, first)
    handle.train_with_peft()
    moved(model, handle)
    batch = padded("right")
    expected = model.eval()(**batch).logits
    handle.save(tmp_path / "virtual")
    model.save_pretrained(tmp_path / "lora")
    assert not any("prefixcore" in name for name in peft.utils.load_peft_weights(str(tmp_path / "lora")))

    one = make("llama")
    prefixcore.load(one, tmp_path / "virtual")
    one = peft.PeftModel.from_pretrained(one, tmp_path / "lora").eval()
    torch.testing.assert_close(one(**batch).logits, expected)

    other = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "lora").eval()
    prefixcore.load(other.get_base_model(), tmp_path / "virtual")
    torch.testing.assert_close(other(**batch).logits, expected)
