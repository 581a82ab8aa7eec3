"""Rows of conversations: OpenAI's and TRL's `messages`, TRL's `prompt` and `completion`, ShareGPT's `conversations`."""

from __future__ import annotations

import json
import re

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from prefixcore.training import DataError, describe_data, read_examples, split
from tests.examples import ROOT

from .templates import HERMES, WEATHER, call, said, tokenizer
from .test_reading import write

USER = {"role": "user", "content": "Is it cold in Oslo?"}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "call_1", "content": "-3 C"}
ANSWER = {"role": "assistant", "content": "Yes."}
ASKED = [USER, call("Oslo"), RESULT, ANSWER]


def read(folder, row, kind=".jsonl"):
    folder.mkdir(exist_ok=True)
    [example] = read_examples(write(folder, kind, [row]), chat=True)
    return example


def test_the_digest_of_plain_conversations_stays(tmp_path):
    """As adapters that were trained on them have it."""
    rows = [
        '{"messages": [{"role": "system", "content": "Kurz, bitte: é"}, {"content": "2 + 2?", "role": "user"}, '
        '{"role": "assistant", "content": "4"}, {"role": "user", "content": "thanks"}]}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": null}, '
        '{"role": "user", "content": "c"}, {"role": "assistant", "content": ""}], "tools": [], "other": 1}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(rows), encoding="utf-8")
    digest = "70020dce677b9319db0de4dd09b449afc3ab7a6ac990ca04b6153af3d8bb62e0"
    assert describe_data(read_examples(tmp_path / "x.jsonl", chat=True))["sha256"] == digest


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet", ""])
def test_every_kind_of_file_has_the_same_conversations(tmp_path, kind):
    """A CSV has the JSON texts; so may the others."""
    expected = read(tmp_path / "expected", {"messages": ASKED, "tools": [WEATHER], "chat_template_kwargs": {"a": 1}})
    texts = {"tools": json.dumps([WEATHER]), "chat_template_kwargs": '{"a": 1}'}
    messages = json.dumps(ASKED) if kind == ".csv" else ASKED
    example = read(tmp_path / "found", {"messages": messages, **texts}, kind)
    assert (example.prompt, example.completion) == (expected.prompt, expected.completion)
    assert example.given == {"tools": [WEATHER], "a": 1}
    if kind != ".csv":
        assert read(tmp_path / "objects", {"messages": ASKED, "tools": [WEATHER]}, kind).given == {"tools": [WEATHER]}


def asked(name, **arguments):
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def tables(folder, table):
    """As Parquet, and as a folder of a data set."""
    parquet.write_table(table, folder / "x.parquet")
    data = datasets.Dataset.from_parquet(str(folder / "x.parquet"), cache_dir=str(folder / "cache"))
    data.save_to_disk(folder / "x")
    return folder / "x.parquet", folder / "x"


def test_nulls_of_a_column_of_objects_are_fields_of_other_rows(tmp_path):
    """What the others ask a tool with is not learnt."""
    rows = [{"messages": [USER, each]} for each in (asked("weather", city="A"), asked("time", zone="CET"), ANSWER)]
    table = pyarrow.Table.from_pylist(rows)
    assert "null" in json.dumps(table.to_pylist()[0])
    for path in tables(tmp_path, table):
        examples = read_examples(path, chat=True)
        assert [each.messages[1] for each in examples] == [row["messages"][1] for row in rows]


@pytest.mark.parametrize("places", ["messages", "all"])
def test_columns_of_the_type_json(tmp_path, places):
    """`datasets` makes them of objects with different fields; there a null is one."""
    row = {"messages": [USER, asked("weather", city=None)], "tools": [WEATHER]}
    features = {"messages": datasets.List(datasets.Json()), "tools": datasets.Json()}
    if places == "all":
        features["messages"] = datasets.Json()
    data = datasets.Dataset.from_list([row], features=datasets.Features(features))
    data.save_to_disk(tmp_path / "x")
    data.to_parquet(tmp_path / "x.parquet")
    for path in (tmp_path / "x", tmp_path / "x.parquet"):
        [example] = read_examples(path, chat=True)
        assert example.messages == row["messages"]
        assert example.given == {"tools": [WEATHER]}


def test_the_conversations_of_the_guide(tmp_path):
    page = (ROOT / "docs" / "guides" / "cli.md").read_text(encoding="utf-8")
    found = [each for each in re.findall(r"```json\n(.*?)```", page, re.DOTALL) if "messages" in each]
    (tmp_path / "x.jsonl").write_text("\n".join(" ".join(each.split("\n")) for each in found))
    plain, tools = read_examples(tmp_path / "x.jsonl", chat=True)
    made = tokenizer(HERMES)
    assert said(made, plain.to_ids(made, None)) == ["4<|im_end|>"]
    assert len(said(made, tools.to_ids(made, None))) == 2


def test_prompt_and_completion_of_messages(tmp_path):
    """TRL's: of the completion's turns the assistant's are learnt, of the prompt's none."""
    first = {"role": "assistant", "content": "Where?"}
    example = read(tmp_path, {"prompt": [{**USER, "content": "Cold?"}, first, USER], "completion": ASKED[1:]})
    made = tokenizer(HERMES)
    calls = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    assert said(made, example.to_ids(made, None)) == [calls, "Yes.<|im_end|>"]
    plain = read(tmp_path, {"prompt": [USER], "completion": [ANSWER]})
    messages = read(tmp_path, {"messages": [USER, ANSWER]})
    assert (plain.prompt, plain.completion) == (messages.prompt, messages.completion)
    other = read(tmp_path, {"prompt": [{**USER, "content": "Cold?"}], "completion": [first]})
    assert other.prompt == example.prompt  # one conversation's turns stay on one side of a split


def test_sharegpt(tmp_path):
    made = tokenizer(HERMES)
    asked = {"name": "weather", "arguments": {"city": "Oslo"}}
    turns = [
        {"from": "system", "value": "Be brief."}, {"from": "human", "value": USER["content"]},
        {"from": "function_call", "value": json.dumps(asked)}, {"from": "observation", "value": "-3 C"},
        {"from": "gpt", "value": "Yes."},
    ]  # fmt: skip
    found = read(tmp_path, {"conversations": turns, "tools": json.dumps([WEATHER])})
    expected = read(tmp_path, {"messages": [{"role": "system", "content": "Be brief."}, *ASKED], "tools": [WEATHER]})
    assert found.to_ids(made, None) == expected.to_ids(made, None)
    beside = read(tmp_path, {"conversations": turns[1:], "system": "Be brief.", "tools": [WEATHER]})
    for messages in (ASKED, [{"role": "system", "content": "Be brief."}, *ASKED]):
        assert read(tmp_path, {"messages": messages, "system": "Be brief.", "tools": [WEATHER]}) == expected
    assert (beside.prompt, beside.completion) == (found.prompt, found.completion)
    several = [*turns[:2], {"from": "function_call", "value": json.dumps([asked, asked])}]
    assert len(read(tmp_path, {"conversations": several}).messages[-1]["tool_calls"]) == 2
    kept = read(
        tmp_path, {"conversations": [*turns[1:2], {"from": "gpt", "value": "No", "weight": 0}, *turns[1:2], turns[-1]]}
    )
    assert said(made, kept.to_ids(made, None)) == ["Yes.<|im_end|>"]
    roles = read(tmp_path, {"conversations": [USER, ANSWER]})
    assert roles.messages == [USER, ANSWER]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER, ANSWER], "tools": "nothing"}, "the field 'tools': not valid JSON"),
        (
            {"messages": [USER, ANSWER], "tools": {"type": "function"}},
            "the field 'tools' must be a list of JSON schemas",
        ),
        ({"messages": [USER, ANSWER], "tools": ["weather"]}, "'tools': number 1 must be the JSON schema of a function"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": [1]}, "'chat_template_kwargs' must be an object"),
        (
            {"messages": [USER, ANSWER], "chat_template_kwargs": {"tokenize": True}},
            "has 'tokenize', which is no variable",
        ),
        ({"messages": [USER, ANSWER], "images": ["x.png"]}, "the field 'images' holds images; only texts are learnt"),
        ({"prompt": "a", "completion": "b"}, "read as conversations where they are lists of messages, and as texts"),
        ({"prompt": [USER], "completion": [USER]}, "'completion': no turn of the role 'assistant'"),
        ({"prompt": [], "completion": [ANSWER]}, "'completion': the first turn is the assistant's"),
        ({"prompt": [USER], "completion": "b"}, "'messages' is missing (found: prompt, completion)"),
        (
            {"conversations": [{"from": "bot", "value": "a"}]},
            "message 1: is from 'bot'; expected one of human, user, gpt",
        ),
        ({"conversations": [{"from": "function_call", "value": "f("}]}, "message 1: the call: not valid JSON"),
        ({"conversations": [{"from": "human"}]}, "message 1 has no text 'content'"),
        ({"conversations": "a"}, "'conversations': not valid JSON"),
        (
            {"conversations": [{"from": "human", "value": "a"}], "system": 1},
            "system message beside it must be a string",
        ),
        (
            {"conversations": [{"from": "system", "value": "a"}], "system": "b"},
            "begins with a system message, and has another one beside it",
        ),
    ],
)
def test_rows_that_are_none(tmp_path, row, message):
    with pytest.raises(DataError) as error:
        read(tmp_path, row)
    assert str(error.value).startswith(f"{tmp_path / 'data.jsonl'}, line 1: the field ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "row", [{"messages": "[]"}, {"messages": [USER]}, {"conversations": []}, {"prompt": [USER], "completion": [ANSWER]}]
)
def test_conversations_without_the_option(tmp_path, row):
    with pytest.raises(DataError, match="; conversations are read with --chat"):
        read_examples(write(tmp_path, ".jsonl", [row]))


def test_images_beside_texts_are_seen_in_a_table(tmp_path):
    row = {"messages": [USER, ANSWER], "images": ["x.png"]}
    with pytest.raises(DataError, match="row 1: the column 'images' holds images"):
        read(tmp_path, row, ".parquet")
    assert read(tmp_path, {**row, "images": []}, ".parquet").messages == [USER, ANSWER]


def test_rows_of_one_conversation_stay_on_one_side(tmp_path):
    rows = [{"prompt": ASKED[: end - 1], "completion": ASKED[end - 1 : end]} for end in (2, 4)]
    rows.append({"prompt": [{**USER, "content": "And Rome?"}], "completion": [ANSWER]})
    examples = read_examples(write(tmp_path, ".jsonl", rows), chat=True)
    for seed in range(4):
        training, held_out = split(examples, 0.5, seed)
        assert sorted((len(training), len(held_out))) == [1, 2]
