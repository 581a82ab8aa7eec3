"""Every command opens a model that reads images, too, and learns and writes text with it."""

from __future__ import annotations

import pytest

from tests import tiny
from tests.hf.tiny_models import make

CLASSES = {
    "Mistral3ForConditionalGeneration": "mistral3",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",  # positions of three axes
}


@pytest.fixture(scope="module", params=CLASSES)
def folder(request, tmp_path_factory):
    """One that `AutoModelForCausalLM` does not open."""
    path = tmp_path_factory.mktemp("image-model")
    make(request.param, CLASSES[request.param]).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_train_generate_verify_bake_and_serve(prefixcore, folder, data, tmp_path, method):
    out, adapters = tmp_path / "swap", tmp_path / "adapters"
    train = ("train", "--model", folder, "--data", data, "--out", out, "--method", method, "--end", "\\n")
    assert prefixcore(*train, "--init-text", "ab -> ba\n", "--steps", 2, "--batch-size", 2)[0] == 0
    code, answer, _ = prefixcore("generate", "--adapter", out, "--prompt", "av ->", "--max-new-tokens", 4)
    assert code == 0
    assert answer.strip("\n")
    _, checks, _ = prefixcore("verify", out, "--model", folder)
    assert "is the one that the adapter was trained for" in checks
    if method == "prompt":
        assert prefixcore("bake", out, "--model", folder, "--out", tmp_path / "baked")[0] == 0
        out = tmp_path / "baked"
    assert prefixcore("add", out, adapters)[0] == 0
    served = prefixcore("serve", "--model", folder, "--adapters", adapters, "--dry-run")
    assert served[0] == 0, served
    assert "PrefixConnector" in served[1]
