"""Model folders that are broken, or ask for what their files do not hold, are one line."""

from __future__ import annotations

import json
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest

from .commands import copy


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize(
    "contents", [None, b"", b"\xff" * 3000, b"[1]", b"[" * 100_000, os.mkdir, os.mkfifo, "/dev/zero", "loop"]
)
def test_broken_model_folders(refused_training, refused_generation, model_folder, tmp_path, name, contents):
    if contents == "loop":
        contents = name
    folder = copy(model_folder, tmp_path / "model", name, contents)
    assert str(folder) in refused_training("--model", folder)
    assert str(folder) in refused_generation("--model", folder, "--prompt", "a")


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "bert"},
        {"model_type": "t5"},
        {"model_type": "gpt2"},
        {"model_type": "nonsense"},
        {"model_type": 5},
        {"hidden_size": 64},
        {"hidden_size": "wide"},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 0},
        {"vocab_size": 50},
        {"hidden_act": "nonsense"},
        {"dtype": "float99"},
        {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}},
    ],
    ids=str,
)
def test_models_that_their_weights_do_not_fit(refused_training, model_folder, tmp_path, fields):
    config = json.loads((model_folder / "config.json").read_text())
    folder = copy(model_folder, tmp_path / "model", "config.json", json.dumps({**config, **fields}).encode())
    assert f"--model {folder}" in refused_training("--model", folder)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1,000,000,000, of at most 4,096"),
        ({"num_hidden_layers": 1e12}, "num_hidden_layers 1e+12"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers of more digits"),
        ({"model_type": "gpt2", "n_layer": 10**9}, "n_layer 1,000,000,000"),
        ({"model_type": "qwen2", "num_hidden_layers": 10**9}, "1,000,000,000"),  # makes a list of as many
        ({"model_type": "mixtral", "num_local_experts": 10**9}, "num_local_experts 1,000,000,000"),
        ({"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**9}}, "1,000,000,000"),
        ({"num_hidden_layers": 0}, "has 0 layers"),
        ({"num_hidden_layers": -5}, "has -5 layers"),
        ({"hidden_size": 10**5}, "asks for weights of 96,900,000 numbers, and its files of weights have"),
        ({"hidden_size": 10**13}, "asks for weights of"),
        ({"hidden_size": 2**62}, "asks for weights of more numbers than can be counted"),
        ({"vocab_size": 10**13}, "asks for weights of 640,000,000,024,736 numbers"),
        ({"intermediate_size": 10**12}, "asks for weights of"),
        ({"head_dim": 10**12}, "asks for weights of"),
        ({"vocab_size": 10**13, "quantization_config": {"quant_method": "fp8"}}, "asks for weights of"),
        ({"padding": "a" * 2**22}, "its config.json has 4,19"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_models_that_no_memory_holds(refused_training, refused_generation, model_folder, tmp_path, fields, said):
    """Known from the configuration, before anything is made of that size."""
    config = json.loads((model_folder / "config.json").read_text())
    folder = copy(model_folder, tmp_path / "model", "config.json", json.dumps({**config, **fields}).encode())
    with memory_limited():
        for line in (
            refused_training("--model", folder),
            refused_generation("--model", folder, "--prompt", "a"),
        ):
            assert f"--model {folder}" in line
            assert said in line


@contextmanager
def memory_limited():
    """A block that can take a gigabyte more than there is taken, where the system says how much that is."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
