"""Texts up to the model's last position are read, and longer ones refused or said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from tests import tiny

from .commands import NEW


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> dict[str, Path]:
    """Models with a table of 32 positions: a family that is known, and one that is not."""
    torch.manual_seed(0)
    found = {
        "gpt2": GPT2LMHeadModel(
            GPT2Config(vocab_size=98, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
        ),
        "opt": OPTForCausalLM(
            OPTConfig(
                vocab_size=98, max_position_embeddings=32, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64,
                num_hidden_layers=2, num_attention_heads=4, bos_token_id=0, eos_token_id=0, pad_token_id=0,
            )
        ),
    }  # fmt: skip
    folders = {}
    for name, model in found.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        tiny.tokenizer().save_pretrained(folders[name])
    return folders


@pytest.mark.filterwarnings("ignore:'opt' is not among the families")
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_texts_up_to_the_last_position_and_not_beyond(train, prefixcore, learned, tmp_path, name):
    """Every way to share 30 positions between prompt and completion is trained on and evaluated; 31 are refused."""
    fits = [{"prompt": "a" * n, "completion": "b" * (29 - n)} for n in range(1, 29)]
    for file, examples in {"fits": fits, "over": [*fits, {"prompt": "c" * 29, "completion": "d"}]}.items():
        (tmp_path / file).write_text("".join(json.dumps(example) + "\n" for example in examples))
    base = [*NEW, "--model", learned[name], "--steps", 2, "--eval-fraction", 0.5]
    assert train(*base, "--data", tmp_path / "fits")[0] == 0
    for limit in ([], ["--max-length", 100]):  # a table has no more rows, whoever insists
        code, _, err = train(*base, "--data", tmp_path / "over", *limit, "--eval-fraction", 0)
        assert code == 2
        assert "line 29: 31 tokens, more than the 30 that 2 virtual ones leave" in err.splitlines()[-1]
        assert "take fewer virtual tokens (--num-virtual-tokens), shorten the example" in err.splitlines()[-1]
    code, _, err = train(*base, "--data", tmp_path / "over", "--skip-too-long")
    assert code == 0, err
    assert "left out 1 of" in err

    base = ["generate", "--model", learned[name], "--adapter", tmp_path / "adapter", "--json", "--end", ""]
    alone = prefixcore(*base, "--prompt", "b")[1]
    code, out, err = prefixcore(*base, "--prompt", "a" * 29, "--prompt", "b")  # one token fits, and 29
    assert code == 0, err
    completions = [json.loads(line)["completion"] for line in out.splitlines()]
    assert len(completions[0]) <= 1
    assert completions[1] == json.loads(alone)["completion"]
    code, _, err = prefixcore(*base, "--prompt", "a" * 30)
    assert code == 2
    assert "leave no room" in err.splitlines()[-1]


def test_a_model_that_computes_positions_reads_longer_texts_if_someone_insists(train, tmp_path, data):
    long = tmp_path / "long.jsonl"
    long.write_text(data.read_text() + json.dumps({"prompt": "a" * 150, "completion": "b"}) + "\n")
    code, _, err = train(*NEW, "--data", long)
    assert code == 2
    assert "line 26: 152 tokens, more than the 126" in err.splitlines()[-1]
    assert "--max-length" in err.splitlines()[-1]
    assert train(*NEW, "--data", long, "--max-length", 200)[0] == 0


def test_a_prompt_beyond_what_the_model_was_made_for_is_said(prefixcore, model_folder, adapter):
    base = ["generate", "--model", model_folder, "--adapter", adapter, "--max-new-tokens", 2]
    code, _, err = prefixcore(*base, "--prompt", "a" * 200)
    assert code == 0
    assert "warning: prompt 1: 200 tokens and 9 virtual ones are more than the 128 positions" in err
