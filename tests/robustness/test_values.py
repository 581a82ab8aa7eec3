"""Values of options that nothing can be done with, a device that is not there among them, are one line."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "mps", "xla", "meta", "hpu", "toaster", ""])
def test_a_device_that_is_not_there(refused_training, refused_generation, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is there")
    assert "cannot be used" in refused_training("--device", device)
    assert "cannot be used" in refused_generation("--device", device, "--prompt", "a")


@pytest.mark.parametrize("seed", [2**63, 2**64, 10**30, "9" * 5000, -1])
def test_seeds_that_no_generator_takes(refused_training, refused_generation, seed):
    assert "--seed" in refused_training("--seed", seed)
    assert "--seed" in refused_generation("--seed", seed, "--prompt", "a", "--sample")


@pytest.mark.parametrize(
    "options",
    [
        ["--sample", "--temperature", "1e-300"],
        ["--sample", "--temperature", "1e300"],
        ["--sample", "--temperature", "nan"],
        ["--sample", "--top-p", "nan"],
        ["--num-beams", 10**9],
        ["--max-new-tokens", 10**15],
        ["--max-new-tokens", 10**30],
        ["--end", "é"],  # not in the vocabulary, so that it can never be seen
        ["--end", "\udcff"],
    ],
)
def test_values_that_cannot_be_generated_with(refused_generation, options):
    refused_generation("--prompt", "a", *options)


def test_the_coldest_temperature_takes_the_likeliest_token(prefixcore, model_folder, adapter):
    base = ["generate", "--model", model_folder, "--adapter", adapter, "--prompt", "av ->", "--max-new-tokens", 5]
    assert prefixcore(*base, "--sample", "--temperature", "1e-6") == prefixcore(*base)


@pytest.mark.parametrize(
    "options",
    [
        ["--lr", "inf"],
        ["--weight-decay", "nan"],
        ["--epochs", "1e308"],
        ["--end", "é"],
        ["--end", "\udcff"],
        ["--init", "text", "--init-text", "\udcff"],
        ["--num-virtual-tokens", 10**30],
        ["--layers", "9" * 5000],
    ],
)
def test_values_that_cannot_be_trained_with(refused, model_folder, data, tmp_path, options):
    steps = [] if "--epochs" in options else ["--steps", 2]
    base = ["train", "--model", model_folder, "--data", data, "--out", tmp_path / "out", "--method", "prompt", *steps]
    refused(*base, *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "program"),
    [
        ([], "prefixcore"),
        (["nonsense\x1b[2J"], "prefixcore"),
        (["train"], "prefixcore train"),
        (["train", "--seed", "1" * 5000, "--model", "x", "--data", "y", "--out", "z"], "prefixcore train"),
        (["generate", "--model", "x", "--adapter", "y", "--bogus"], "prefixcore"),
        (["generate", "--model", "x", "--adapter", "y", "--max-new-tokens", "many\nmore"], "prefixcore generate"),
        (["inspect"], "prefixcore inspect"),
    ],
)
def test_options_that_are_none_are_one_line(prefixcore, arguments, program):
    """Without the page of options that argparse puts before it."""
    code, out, err = prefixcore(*arguments)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.isprintable()
    assert line.startswith(f"{program}: error: ")
    assert line.endswith("--help)")
