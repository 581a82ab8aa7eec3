"""Data, prompts and tokenizers: text that cannot be read, or cannot be turned into the model's ids, is one line."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import tiny

from .commands import NEW, copy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{"prompt": "a", "completion": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1: nested too deep"),
        (b'{"prompt": "a", "completion": "b", "n": ' + b"9" * 10_000 + b"}", "line 1: not valid JSON"),
        (b'{"prompt": "a\\ud800", "completion": "b"}', "'prompt' holds half of a character"),
        (b'{"prompt": "a", "completion": "\\udfff"}', "'completion' holds half of a character"),
        (b'{"prompt": "\xe9", "completion": "b"}', "not UTF-8"),
        (b'{"\\u001b[2J\\u009b": "a"}', "(found: \\x1b[2J\\x9b)"),
        (b"\0\0\0", "line 1: not valid JSON"),
    ],
)
def test_data_that_is_no_text(refused_training, tmp_path, text, expected):
    (tmp_path / "data.jsonl").write_bytes(text)
    assert expected in refused_training("--data", tmp_path / "data.jsonl")


def test_data_that_is_something_else_than_a_file(refused_training, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        assert f"{path}: is not a regular file" in refused_training("--data", path)
    assert "no such file" in refused_training("--data", tmp_path / "nothing")


@pytest.mark.parametrize("path", ["/proc/self/mem", "/dev/zero", "/", "x" * 5000, "\udcff"])
def test_data_that_cannot_be_read(refused_training, path):
    refused_training("--data", path)
    refused_training("--eval-data", path)


@pytest.fixture(scope="module")
def vocabulary_of_one(tmp_path_factory, model_folder) -> Path:
    """The tiny model with a tokenizer that knows the letter a and no more."""
    folder = copy(model_folder, tmp_path_factory.mktemp("one") / "model", "tokenizer.json", None)
    backend = Tokenizer(models.WordLevel({"a": 2}, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vocabulary_too_large(tmp_path_factory, model_folder) -> Path:
    """The tiny model with a tokenizer whose ids begin where the model's end, padding included."""
    folder = copy(model_folder, tmp_path_factory.mktemp("large") / "model", "tokenizer.json", None)
    words = {"<end>": 500, **{character: 200 + i for i, character in enumerate(tiny.CHARACTERS)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<end>").save_pretrained(folder)
    return folder


def test_text_that_the_tokenizer_cannot_encode(refused_training, refused_generation, vocabulary_of_one):
    assert "cannot be encoded" in refused_training("--model", vocabulary_of_one)
    assert "--init-text cannot be encoded" in refused_training("--model", vocabulary_of_one, "--init-text", "b")
    assert "prompt 2 cannot be encoded" in refused_generation(
        "--model", vocabulary_of_one, "--prompt", "a", "--prompt", "b"
    )
    assert "not UTF-8" in refused_generation("--prompt", "a\udce9")


def test_ids_beyond_the_table(refused_training, refused_generation, vocabulary_too_large):
    for options in ([], ["--init-text", "b"]):
        assert "the model's vocabulary has 98" in refused_training("--model", vocabulary_too_large, *options)
    assert "prompt 1 has the token id" in refused_generation("--model", vocabulary_too_large, "--prompt", "a")


def test_a_padding_id_beyond_the_table_is_not_used(train, prefixcore, model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    assert tokenizer.pad_token_id == 98
    tokenizer.save_pretrained(folder)
    code, _, err = train(*NEW, "--model", folder, "--eval-fraction", 0.5)
    assert code == 0, err
    prompts = ["--prompt", "a", "--prompt", "abc"]
    assert prefixcore("generate", "--model", folder, "--adapter", tmp_path / "adapter", *prompts)[0] == 0
