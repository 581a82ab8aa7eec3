"""JSONL, the split, tokens and batches."""

from __future__ import annotations

import json

import pytest
import torch

from prefixcore.training import DataError, Example, TokenizedExample, collate, read_jsonl, split, tokenize
from prefixcore.training.data import IGNORED, batches, make_batch, pad_id
from tests import tiny


def write(path, text, encoding="utf-8"):
    path.write_text(text, encoding=encoding)
    return path


def test_reads_prompts_and_completions_and_ignores_other_fields(tmp_path):
    lines = [
        json.dumps({"prompt": "a", "completion": "b", "source": 3}),
        "",
        json.dumps({"completion": "é\n", "prompt": ""}),
    ]
    path = write(tmp_path / "x.jsonl", "\n".join(lines))
    examples = read_jsonl(path)
    assert [(e.prompt, e.completion) for e in examples] == [("a", "b"), ("", "é\n")]
    assert examples[1].source == f"{path}, line 3"


def test_a_byte_order_mark_is_passed_over(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"prompt": "a", "completion": "b"}', encoding="utf-8-sig")
    assert len(read_jsonl(path)) == 1


GOOD = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "{oops}", "line 2: not valid JSON"),
        (GOOD + GOOD + "[1, 2]", "line 3: expected a JSON object, got a list"),
        ("null", "line 1: expected a JSON object, got null"),
        (GOOD + '\n{"prompt": "a"}', "line 3: the field 'completion' is missing (found: prompt)"),
        ("{}", "line 1: the field 'prompt' is missing (found: none)"),
        ('{"prompt": 7, "completion": "b"}', "line 1: the field 'prompt' must be a string, got a number"),
        ('{"prompt": "a", "completion": true}', "'completion' must be a string, got true or false"),
        ('{"prompt": "a", "completion": ""}', "line 1: the field 'completion' is empty"),
        ("\n \n", "no examples; expected lines like"),
        ("", "no examples; expected lines like"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, message):
    path = write(tmp_path / "data.jsonl", text)
    with pytest.raises(DataError) as error:
        read_jsonl(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_other_encodings_and_missing_files_are_named(tmp_path):
    path = write(tmp_path / "latin.jsonl", GOOD.replace("a", "é"), encoding="latin-1")
    with pytest.raises(DataError, match=r"latin\.jsonl: not UTF-8"):
        read_jsonl(path)
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        read_jsonl(tmp_path / "none.jsonl")


def numbered(count):
    return [Example(f"p{i}", f"c{i}") for i in range(count)]


def test_split_is_a_partition_that_the_seed_decides():
    examples = numbered(20)
    training, held_out = split(examples, 0.25, seed=3)
    assert len(held_out) == 5
    assert sorted(e.prompt for e in training + held_out) == sorted(e.prompt for e in examples)
    assert split(examples, 0.25, seed=3) == (training, held_out)
    assert split(examples, 0.25, seed=4) != (training, held_out)


def test_split_keeps_examples_with_one_prompt_together():
    examples = [Example(f"p{i % 4}", f"c{i}") for i in range(40)]
    for seed in range(5):
        training, held_out = split(examples, 0.5, seed)
        assert len(held_out) == 20
        assert not {e.prompt for e in training} & {e.prompt for e in held_out}


def test_split_leaves_at_least_one_on_either_side():
    assert [len(part) for part in split(numbered(2), 0.01, seed=0)] == [1, 1]
    assert [len(part) for part in split(numbered(2), 0.99, seed=0)] == [1, 1]
    assert split(numbered(1), 0.0, seed=0) == (numbered(1), [])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_split_refuses_other_fractions(fraction):
    with pytest.raises(DataError, match="fraction must be"):
        split(numbered(5), fraction, seed=0)


def test_split_refuses_a_single_prompt():
    with pytest.raises(DataError, match="2 examples have 1 different prompts"):
        split([Example("p", "a"), Example("p", "b")], 0.5, seed=0)


def test_tokenize_closes_a_completion_once():
    tokenizer = tiny.tokenizer()
    example = Example("ab", "cd")
    assert tokenize(tokenizer, [example])[0].completion_ids[-1] == tokenizer.eos_token_id
    line = tokenizer("cd\n")["input_ids"]
    assert tokenize(tokenizer, [example], end="\n")[0].completion_ids == line
    assert tokenize(tokenizer, [Example("ab", "cd\n")], end="\n")[0].completion_ids == line
    assert tokenize(tokenizer, [example])[0].prompt_ids == tokenizer("ab")["input_ids"]


def test_tokenize_names_the_example_that_does_not_fit():
    tokenizer = tiny.tokenizer()
    examples = [Example("a", "b"), Example("abc", "def", source="x.jsonl, line 2")]
    assert [e.length for e in tokenize(tokenizer, examples, max_length=7)] == [3, 7]
    with pytest.raises(DataError, match=r"x\.jsonl, line 2: 7 tokens, more than the limit of 6"):
        tokenize(tokenizer, examples, max_length=6)
    with pytest.raises(DataError, match="prompt has no token"):
        tokenize(tokenizer, [Example("", "b")])


def test_labels_are_on_the_completion_only():
    rows = [TokenizedExample([5, 6], [7]), TokenizedExample([8], [9, 10, 11])]
    batch = collate(rows, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 10, 11]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7, IGNORED], [IGNORED, 9, 10, 11]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    left = collate(rows, pad_token_id=0, side="left")
    assert left["input_ids"].tolist()[0] == [0, 5, 6, 7]
    assert left["attention_mask"].tolist()[0] == [0, 1, 1, 1]
    assert left["labels"].tolist()[0] == [IGNORED, IGNORED, IGNORED, 7]


def test_packed_or_padded_the_same_is_learnt():
    rows = [TokenizedExample([5, 6], [7]), TokenizedExample([8], [9, 10, 11])]
    packed, padded = (make_batch(rows, 0, packed=packed, device=torch.device("cpu")) for packed in (True, False))
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11]]
    assert packed["cu_seq_lens_q"].tolist() == [0, 3, 7]
    assert packed["logits_to_keep"].tolist() == [1, 3, 4, 5, 6]
    assert packed["labels"].tolist() == [[IGNORED, 7, 9, 10, 11]]
    assert {name: tensor.tolist() for name, tensor in padded.items()} == {
        name: tensor.tolist() for name, tensor in collate(rows, 0).items()
    }


def test_every_epoch_sees_every_example_once_in_a_new_order():
    rows = [TokenizedExample([i], [100 + i]) for i in range(7)]
    source = batches(rows, batch_size=3, seed=1)
    epochs = [[next(source) for _ in range(3)] for _ in range(2)]
    orders = [[row.prompt_ids[0] for batch in epoch for row in batch] for epoch in epochs]
    assert [len(batch) for batch in epochs[0]] == [3, 3, 1]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert orders[0] != orders[1]
    again = batches(rows, batch_size=3, seed=1)
    assert next(again) == epochs[0][0]


def test_padding_falls_back_to_the_end_of_sequence():
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    assert pad_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert pad_id(tokenizer) == 0
