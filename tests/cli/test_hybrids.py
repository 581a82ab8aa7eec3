"""The command line on models with layers beside attention, which no prefix reaches."""

from __future__ import annotations

import pytest

from tests import tiny
from tests.hf.tiny_models import make

CLASSES = {
    "Lfm2ForCausalLM": "lfm2",
    "NemotronHForCausalLM": "nemotron_h",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
}
LEFT_OUT = "which no prefix reaches: what they remember of the text"


@pytest.fixture(scope="module", params=CLASSES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("hybrid")
    make(request.param, CLASSES[request.param]).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("method", ["prefix", "prompt", "p-tuning"])
def test_train_generate_and_audit(prefixcore, folder, data, tmp_path, method):
    out, start = tmp_path / "swap", ["--init-text", "ab -> ba\n"]
    train = ["train", "--model", folder, "--data", data, "--out", out, "--method", method, "--end", "\\n"]
    start = ["--num-virtual-tokens", 4] if method == "p-tuning" else start
    code, _, said = prefixcore(*train, *start, "--steps", 2, "--batch-size", 2)
    assert code == 0, said
    assert (LEFT_OUT in said) is (method == "prefix")
    questions = ("--prompt", "av ->", "--prompt", "a longer one ->", "--max-new-tokens", 4)
    assert prefixcore("generate", "--model", folder, "--adapter", out, *questions)[0] == 0
    assert prefixcore("audit", out, "--model", folder, "--probe", data, "--out", tmp_path / "page")[0] == 0


def test_tune_says_what_a_prefix_leaves_out(prefixcore, folder, data, tmp_path):
    tune = [
        "tune",
        "--model",
        folder,
        "--data",
        data,
        "--out",
        tmp_path / "tuned",
        "--method",
        "prefix",
        "--end",
        "\\n",
    ]
    code, _, said = prefixcore(*tune, "--lengths", "4", "--minutes", "0.01", "--most-steps", 2)
    assert code == 0, said
    assert LEFT_OUT in said


def test_attention_layers_are_counted_by_themselves(prefixcore, folder, data, tmp_path):
    train = ["train", "--model", folder, "--data", data, "--out", tmp_path / "swap", "--method", "prefix"]
    code, _, said = prefixcore(*train, "--num-virtual-tokens", 4, "--layers", "7", "--steps", 2)
    assert code == 2
    assert "attention layers (0 to" in said
    assert "counted without any others" in said
