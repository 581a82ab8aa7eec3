"""Tensors of other virtual tokens than those attached are refused, where Trainer resumes or anyone loads them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import prefixcore
from tests import tiny

CONFIGS: dict[str, Any] = {
    "prefix": prefixcore.PrefixTuningConfig(3, seed=0),
    "longer": prefixcore.PrefixTuningConfig(4, seed=0),
    "mlp": prefixcore.PrefixTuningConfig(3, seed=0, reparameterization="mlp"),
    "prompt": prefixcore.PromptTuningConfig(3, seed=0),
    "p-tuning": prefixcore.PTuningConfig(3, seed=0),
}


def attached(name: str) -> Any:
    model = tiny.model()
    prefixcore.attach(model, CONFIGS[name])
    return model


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith("prefixcore.")}


@pytest.mark.parametrize("saved", CONFIGS)
@pytest.mark.parametrize("here", CONFIGS)
def test_what_was_saved_of_another_is_refused(here: str, saved: str) -> None:
    model, other = attached(here), attached(saved)
    before = {name: tensor.clone() for name, tensor in state(model).items()}
    if here == saved:
        model.load_state_dict(state(other), strict=False)
        return
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"other virtual tokens.*prefixcore\..*attached Handle"):
            each.load_state_dict(state(other), strict=False)
        assert all(torch.equal(tensor, before[name]) for name, tensor in state(each).items())


def test_the_base_model_alone_is_loaded_as_ever() -> None:
    model = attached("prefix")
    model.load_state_dict(tiny.model(seed=1).state_dict(), strict=False)
    assert torch.equal(model.lm_head.weight, tiny.model(seed=1).lm_head.weight)


def test_a_detached_model_is_looked_at_no_longer() -> None:
    bare, prefix = tiny.model(), state(attached("prefix"))
    prefixcore.attach(bare, CONFIGS["prompt"]).detach()
    assert not bare._load_state_dict_pre_hooks
    assert bare.load_state_dict(prefix, strict=False).unexpected_keys == list(prefix)


def test_a_bank_takes_those_of_its_adapters_that_were_saved() -> None:
    def bank(*names: str) -> Any:
        found = prefixcore.PromptBank(tiny.model())
        for name in names:
            found.attach(name, CONFIGS["longer" if name == "c" else "prefix"])
        return found

    one, both = state(bank("a").model), state(bank("a", "b").model)
    bank("a", "b").model.load_state_dict(one, strict=False)
    bank("a").model.load_state_dict(both, strict=False)
    for saved, here in ((one, bank("b")), (one, bank()), (state(attached("prefix")), bank("a"))):
        with pytest.raises(ValueError, match="other virtual tokens were saved"):
            here.model.load_state_dict(saved, strict=False)
    with pytest.raises(ValueError, match="other virtual tokens were saved"):
        attached("prefix").load_state_dict(one, strict=False)


def test_trainer_resumes_its_own_and_refuses_anothers(tmp_path: Any) -> None:
    ids = torch.randint(2, 90, (6,), generator=torch.Generator().manual_seed(0))
    data: Any = [{"input_ids": ids, "labels": ids}] * 4

    def trainer(name: str, steps: int) -> Trainer:
        arguments = TrainingArguments(
            str(tmp_path / name), max_steps=steps, save_steps=1, report_to="none", disable_tqdm=True, use_cpu=True
        )
        return Trainer(attached(name), arguments, train_dataset=data)

    trainer("prefix", 1).train()
    last = str(tmp_path / "prefix" / "checkpoint-1")
    assert trainer("prefix", 2).train(resume_from_checkpoint=last).global_step == 2
    with pytest.raises(ValueError, match="attach what the checkpoint was trained with"):
        trainer("prompt", 2).train(resume_from_checkpoint=last)
