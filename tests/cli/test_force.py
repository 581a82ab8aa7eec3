"""`--force`: a model that an adapter was not trained for is taken where someone insists; what is saved says so."""

from __future__ import annotations

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def _sibling(model_folder, target):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(target)
    return target


def test_generate_resume_and_inspect(prefixcore, model_folder, adapter, data, tmp_path):
    sibling = _sibling(model_folder, tmp_path / "sibling")
    ask = ("generate", "--model", sibling, "--adapter", adapter, "--prompt", "av ->", "--max-new-tokens", 2)
    code, out, err = prefixcore(*ask)
    assert (code, out) == (2, "")
    assert "other weights" in err.splitlines()[-1]
    assert "--force" in err.splitlines()[-1]
    code, out, err = prefixcore(*ask, "--force")
    assert code == 0
    assert "warning: " in err
    assert "is loaded all the same: base_model.weights" in err

    again = ("train", "--model", sibling, "--data", data, "--steps", 1, "--out", tmp_path / "out", "--resume", adapter)
    assert prefixcore(*again)[0] == 2
    assert prefixcore(*again, "--force")[0] == 0
    manifest = json.loads((tmp_path / "out" / "prefixcore_manifest.json").read_text())
    assert "other weights" in manifest["base_model"]["forced"][0]
    assert "forced" in prefixcore("inspect", tmp_path / "out")[1]
    assert "forced" not in prefixcore("inspect", adapter)[1]


def test_it_is_for_an_adapter_that_is_loaded(train):
    code, _, err = train("--method", "prompt", "--force")
    assert code == 2
    assert "--force is for --resume" in err
