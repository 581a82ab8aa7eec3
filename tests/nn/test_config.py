"""Configurations: defaults, PEFT's names, and every value that is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from prefixcore.nn import PrefixTuningConfig, PromptTuningConfig, PTuningConfig

ALL = [PrefixTuningConfig, PromptTuningConfig, PTuningConfig]


@pytest.mark.parametrize("make", ALL)
def test_start_is_text_if_there_is_one_and_vocabulary_otherwise(make):
    assert make(num_virtual_tokens=3).init == "vocab"
    config = make(init_text="Name the capital.")
    assert config.init == "text"
    assert config.num_virtual_tokens is None


def test_tensors_bring_their_own_length():
    assert PrefixTuningConfig(init=torch.zeros(7, 64)).num_virtual_tokens == 7
    pair = (torch.zeros(2, 5, 8), torch.zeros(2, 5, 8))
    assert PrefixTuningConfig(init=[pair, pair]).num_virtual_tokens == 5
    assert PromptTuningConfig(init=torch.zeros(4, 16)).num_virtual_tokens == 4


def test_peft_names():
    assert PrefixTuningConfig(2, prefix_projection=True).reparameterization == "mlp"
    assert PrefixTuningConfig(2, reparameterization="mlp").prefix_projection is True
    assert PrefixTuningConfig(2, init_weights="zero").init == "zero"
    assert PromptTuningConfig(2, prompt_tuning_init="SAMPLE_VOCAB").init == "vocab"
    assert PromptTuningConfig(2, prompt_tuning_init="RANDOM").init == "random"
    config = PromptTuningConfig(2, prompt_tuning_init="TEXT", prompt_tuning_init_text="Hello")
    assert (config.init, config.init_text) == ("text", "Hello")


@pytest.mark.parametrize(
    "config",
    [
        PrefixTuningConfig(init_text="abc", layers=[2, 0], num_frozen_tokens=1, prefix_projection=True, seed=3),
        PrefixTuningConfig(init=torch.zeros(2, 8), reparameterization="random_basis", num_basis=10),
        PromptTuningConfig(4, init="zero", reparameterization="low_rank", rank=2),
        PTuningConfig(4, encoder_reparameterization_type="LSTM", encoder_dropout=0.1),
    ],
)
def test_dict_survives_json_and_makes_the_same_config(config):
    again = type(config)(**json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()


def test_settled_has_a_length_and_no_tensors():
    resolved = PrefixTuningConfig(init=torch.zeros(2, 8), num_frozen_tokens=1).resolved(2)
    assert (resolved.init, resolved.num_virtual_tokens, resolved.num_frozen_tokens) == ("tensor", 2, 1)
    assert PromptTuningConfig(init_text="abc").resolved(3).num_virtual_tokens == 3


def test_a_config_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PrefixTuningConfig(2).rank = 3
    assert PrefixTuningConfig(2, layers=[3, 1]).layers == [1, 3]


PAIR = (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (PrefixTuningConfig, {}, "needs num_virtual_tokens"),
        (PrefixTuningConfig, {"num_virtual_tokens": 0}, "num_virtual_tokens must be"),
        (PrefixTuningConfig, {"num_virtual_tokens": 2.0}, "num_virtual_tokens must be"),
        (PrefixTuningConfig, {"num_virtual_tokens": True}, "num_virtual_tokens must be"),
        (PrefixTuningConfig, {"num_virtual_tokens": 2, "init": "ones"}, "init must be one of"),
        (PrefixTuningConfig, {"num_virtual_tokens": 2, "init": 1.0}, "init must be one of"),
        (PrefixTuningConfig, {"num_virtual_tokens": 2, "init": "text"}, "needs init_text"),
        (PrefixTuningConfig, {"init": "text", "init_text": ""}, "needs init_text"),
        (PrefixTuningConfig, {"num_virtual_tokens": 2, "init": "zero", "init_text": "a"}, "only read with"),
        (PrefixTuningConfig, {"init_text": 3, "num_virtual_tokens": 2}, "init_text must be a string"),
        (PrefixTuningConfig, {"num_virtual_tokens": 3, "init": torch.zeros(2, 8)}, "init holds 2"),
        (PrefixTuningConfig, {"init": torch.zeros(2, 3, 4)}, r"\[P, width\]"),
        (PrefixTuningConfig, {"init": []}, "holds no layer"),
        (PrefixTuningConfig, {"init": [PAIR, (PAIR[0],)]}, "entry 1"),
        (PrefixTuningConfig, {"init": [1.0, 2.0]}, "entry 0"),
        (PrefixTuningConfig, {"num_virtual_tokens": 2, "init_weights": "ones"}, "init_weights"),
        (PrefixTuningConfig, {"num_virtual_tokens": 2, "init": "random", "init_weights": "zero"}, "init_weights"),
        (PrefixTuningConfig, {"num_virtual_tokens": 2, "reparameterization": "lora"}, "reparameterization must"),
        (
            PrefixTuningConfig,
            {"num_virtual_tokens": 2, "prefix_projection": True, "reparameterization": "low_rank"},
            "prefix_projection is the MLP",
        ),
        (PrefixTuningConfig, {"num_virtual_tokens": 2, "encoder_hidden_size": 0}, "encoder_hidden_size"),
        (PrefixTuningConfig, {"num_virtual_tokens": 2, "rank": 0}, "rank"),
        (PrefixTuningConfig, {"num_virtual_tokens": 2, "num_basis": -1}, "num_basis"),
        (PrefixTuningConfig, {"num_virtual_tokens": 2, "layers": []}, "layers must be"),
        (PrefixTuningConfig, {"num_virtual_tokens": 2, "layers": [0, 0]}, "layers must be"),
        (PrefixTuningConfig, {"num_virtual_tokens": 2, "layers": [-1]}, "layers must be"),
        (PrefixTuningConfig, {"num_virtual_tokens": 2, "layers": 1}, "layers must be"),
        (PrefixTuningConfig, {"num_virtual_tokens": 2, "num_frozen_tokens": -1}, "num_frozen_tokens"),
        (PrefixTuningConfig, {"num_virtual_tokens": 2, "num_frozen_tokens": 3}, "none would be left"),
        (
            PrefixTuningConfig,
            {"num_virtual_tokens": 2, "num_frozen_tokens": 2, "prefix_projection": True},
            "none would be left",
        ),
        (PrefixTuningConfig, {"num_virtual_tokens": 2, "seed": -1}, "seed"),
        (PrefixTuningConfig, {"num_virtual_tokens": 2, "task_type": "CHAT"}, "task_type"),
        (PromptTuningConfig, {"num_virtual_tokens": 2, "reparameterization": "mlp"}, "reparameterization must"),
        (PromptTuningConfig, {"init": [PAIR]}, "single tensor"),
        (PromptTuningConfig, {"num_virtual_tokens": 2, "prompt_tuning_init": "ZERO"}, "prompt_tuning_init"),
        (
            PromptTuningConfig,
            {"num_virtual_tokens": 2, "init": "zero", "prompt_tuning_init": "RANDOM"},
            "prompt_tuning_init",
        ),
        (
            PromptTuningConfig,
            {"init_text": "a", "prompt_tuning_init_text": "b"},
            "two names for one text",
        ),
        (PTuningConfig, {"num_virtual_tokens": 2, "encoder_reparameterization_type": "GRU"}, "MLP"),
        (PTuningConfig, {"num_virtual_tokens": 2, "encoder_num_layers": 0}, "encoder_num_layers"),
        (PTuningConfig, {"num_virtual_tokens": 2, "encoder_dropout": 1.0}, "encoder_dropout"),
        (PTuningConfig, {"num_virtual_tokens": 2, "encoder_hidden_size": "8"}, "encoder_hidden_size"),
    ],
)
def test_refused(make, values, message):
    with pytest.raises(ValueError, match=message):
        make(**values)
