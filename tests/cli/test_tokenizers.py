"""Tokenizers with which a training is not what it looks like: what is said of them."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, normalizers, processors

from tests import tiny
from tests.cli.test_train_chat import write
from tests.training import templates


def model_folder_with(path, tokenizer, eos_token_id=0):
    model = tiny.model()
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = eos_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def train(prefixcore, tmp_path):
    def call(tokenizer, rows, *options):
        model = model_folder_with(tmp_path / "model", tokenizer)
        data = write(tmp_path / "data.jsonl", rows)
        base = ["train", "--model", model, "--data", data, "--method", "prompt", "--init", "vocab", "--steps", 1]
        return prefixcore(*base, "--num-virtual-tokens", 2, "--eval-fraction", 0, "--out", tmp_path / "out", *options)

    return call


ROWS = [{"prompt": "ab ->", "completion": " ba"}, {"prompt": "cd ->", "completion": " dc"}]
NOTHING_ENDS = "warning: no token ends what is learnt"


def test_nothing_is_said_of_others(train):
    code, _, err = train(tiny.tokenizer(), ROWS)
    assert code == 0
    assert "warning" not in err


TOGETHER = "warning: nothing stands between prompt and completion in"


@pytest.mark.parametrize(
    ("prompt", "completion", "touch"),
    [
        ("ab?", "ba", True),
        ("ab", "ba", True),
        ("ab ->", "3", True),
        ("ab ", "ba", False),
        ("ab\n", "ba", False),
        ("ab", " ba", False),
        ("ab(", "ba", False),
        ('ab "', "ba", False),
        ("ab", ", ba", False),
    ],
)
def test_words_that_run_together(train, prompt, completion, touch):
    rows = [{"prompt": prompt, "completion": completion}] * 2 + [{"prompt": "ef", "completion": " fe"}]
    code, _, err = train(tiny.tokenizer(), rows)
    assert code == 0
    assert (TOGETHER in err) == touch
    if touch:
        assert f"{TOGETHER} 2 of 3 examples, such as {prompt[-4:] + completion!r}" in err
    _, _, err = train(tiny.tokenizer(), [*rows, rows[-1]])
    assert TOGETHER not in err  # as many that do not


def test_a_tokenizer_that_begins_completions_with_a_space(train):
    """As SentencePiece does: they do not run together."""
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    code, _, err = train(tokenizer, [{"prompt": "ab?", "completion": "ba"}])
    assert (code, TOGETHER in err) == (0, False)


def test_no_end_of_sequence(train):
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    code, _, err = train(tokenizer, ROWS)
    assert code == 0
    assert NOTHING_ENDS in err
    assert r"give --end, such as '\n'" in err
    for end in ("\\n", ""):
        code, _, err = train(tokenizer, ROWS, "--end", end)
        assert (code, NOTHING_ENDS in err) == (0, False)


def test_a_token_behind_each_prompt(train):
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", 0)]
    )
    assert "warning: the tokenizer puts '<end>' behind each text" in train(tokenizer, ROWS)[2]


def test_characters_without_a_token(train, prefixcore, tmp_path):
    rows = [*ROWS, {"prompt": "ef ->", "completion": " f\u00e9"}]
    code, _, err = train(tiny.tokenizer(), rows)
    assert code == 0
    assert f"warning: 1 of 3 examples, the first of them {tmp_path / 'data.jsonl'}, line 3, hold characters" in err
    asked = ["--model", tmp_path / "model", "--adapter", tmp_path / "out", "--max-new-tokens", 2]
    code, _, err = prefixcore("generate", *asked, "--prompt", "ab", "--prompt", "\u00e9")
    assert code == 0
    assert "warning: 1 of 2 prompts, the first of them prompt 2, hold characters" in err
    assert "the model reads '<unknown>' in their place" in err


def test_a_template_that_ends_turns_with_another_token(train):
    tokenizer = templates.tokenizer(templates.HERMES)
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in ("<|im_start|>", "<|im_end|>")])
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    tokenizer.eos_token = "<|im_end|>"
    assert "warning" not in train(tokenizer, rows, "--chat")[2]
    tokenizer.eos_token = "<end>"
    code, _, err = train(tokenizer, rows, "--chat")
    assert code == 0
    assert "warning: the chat template ends turns with '<|im_end|>', which neither" in err


def test_a_template_that_ends_turns_with_none(train):
    tokenizer = templates.tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                                    "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    code, _, err = train(tokenizer, rows, "--chat")
    assert code == 0, json.dumps(err)
    assert f"{NOTHING_ENDS}, as the chat template writes none" in err
