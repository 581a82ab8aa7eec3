"""Messages that are none, and JSON that was written to do harm, are named in words."""

from __future__ import annotations

import json

import pytest

from prefixcore.training import DataError, read_examples
from prefixcore.training.messages import check_messages

USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


def called(**function):
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", **function}}]}


def nested(levels):
    value = "x"
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"content": "a"}], "message 1 has no text 'role'"),
        ([{"role": 1, "content": "a"}], "message 1 has no text 'role'"),
        ([USER, {"role": "assistant", "content": None}], "message 2 has no text 'content' (found: null)"),
        ([USER, {"role": "assistant", "content": []}], "message 2 has no text 'content' (found: a list)"),
        ([USER, {"role": "assistant", "content": {"a": 1}}], "message 2 has no text 'content' (found: an object)"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "message 1: its content has a part without the text 'text'",
        ),
        ([{"role": "user", "content": ["a"]}], "has a part that is a string without a type"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "message 1: its content has a part of the type 'image_url'; only texts are learnt, no images and no sounds",
        ),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "of the type 'input_audio'"),
        ([USER, {**ANSWER, "audio": {"id": "x"}}], "message 2 has audio"),
        ([USER, {**ANSWER, "function_call": {"name": "f"}}], "has a function_call; give it as tool_calls"),
        ([{**USER, "tool_calls": [{"name": "f"}]}, ANSWER], "has tool_calls, but the role 'user'"),
        ([USER, {"role": "assistant", "tool_calls": {"name": "f"}}], "tool_calls must be a list, got an object"),
        ([USER, {"role": "assistant", "tool_calls": ["f"]}], "tool call 1 must be an object, got a string"),
        ([USER, {"role": "assistant", "tool_calls": [{"id": 1}]}], "tool call 1 has no name"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": "f"}]}], "tool call 1 has no name"),
        ([USER, called(arguments="{")], "tool call 1: its arguments: not valid JSON"),
        ([USER, called(arguments="[1]")], "its arguments must be an object, or the JSON text of one, got a list"),
        ([USER, called(arguments='{"a": NaN}')], "its arguments: holds nan, which is no number of JSON's"),
        ([USER, called(arguments='{"a": "\\ud800"}')], "its arguments: a text holds half of a character"),
        ([USER, called(arguments="[" * 100_000)], "its arguments: nested too deep for JSON"),
        ([USER, called(arguments=f'{{"a": {"[" * 70}{"]" * 70}}}')], "its arguments: nested more than 64 levels deep"),
        ([USER, called(arguments='{"a": ' + "9" * 5000 + "}")], "its arguments: not valid JSON"),
        ([USER, {**ANSWER, "weight": 0.5}], "message 2: the weight must be 0 (read) or 1 (learnt), got 0.5"),
        ([USER, {**ANSWER, "weight": True}], "got True"),
        ([{**USER, "weight": 1}, ANSWER], "message 1: the weight is 1, but only turns of the role 'assistant'"),
        ([USER, {**ANSWER, "weight": 0}], "no turn of the role 'assistant' is to be learnt: each has the weight 0"),
        ([{**ANSWER, "weight": 0}, ANSWER], "the first turn is the assistant's"),
        ([USER, {**ANSWER, "note": float("inf")}], "message 2: holds inf, which is no number"),
        ([USER, {**ANSWER, "note": {"\ud800": 1}}], "message 2: a text holds half of a character"),
        ([USER, {**ANSWER, "note": nested(70)}], "message 2: nested more than 64 levels deep"),
    ],
)
def test_messages_that_are_none(messages, message):
    with pytest.raises(DataError) as error:
        check_messages(messages, "here")
    assert str(error.value).startswith("here")
    assert message in str(error.value)


def test_values_that_json_does_not_have():
    """From a table, or a program."""
    for value in (b"x", object(), {1: 2}, {"a", "b"}):
        with pytest.raises(DataError, match="message 1"):
            check_messages([{**USER, "note": value}, ANSWER], "here")


def test_a_long_value_is_shown_by_its_beginning():
    with pytest.raises(DataError) as error:
        check_messages([{"role": "user", "content": [{"type": "x" * 100_000}]}], "here")
    assert len(str(error.value)) < 400


def test_the_one_form():
    given = [{"weight": 0, "z": 1, "content": "b", "a": "x", "role": "assistant"}, USER, {**called(), "content": None}]
    assert check_messages(given, "here") == [
        {"role": "assistant", "content": "b", "a": "x", "weight": 0, "z": 1},
        USER,
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
    ]
    assert list(check_messages(given, "here")[0]) == ["role", "content", "a", "weight", "z"]
    assert check_messages(json.dumps(given), "here") == check_messages(given, "here")
    assert check_messages([USER, called(arguments="")], "here") == check_messages([USER, called(arguments={})], "here")


@pytest.mark.parametrize(
    "line",
    [
        '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"messages": ' + '{"a":' * 900 + "1" + "}" * 900 + "}",
        '{"messages": [{"role": "user", "content": ' + "[" * 500 + "]" * 500 + "}]}",
        '{"messages": [{"role": "user", "content": NaN}]}',
        '{"messages": [{"role": "\\ud800", "content": "a"}, {"role": "assistant", "content": "a"}]}',
        '{"messages": [{"role": "user", "content": "a\\udfff"}, {"role": "assistant", "content": "a"}]}',
        '{"messages": [{"role": "user", "content": 1' + "0" * 10_000 + "}]}",
        '{"messages": [1e999]}',
        '{"messages": {"role": "user"}}',
        '{"messages": [], "tools": ' + "[" * 200 + "]" * 200 + "}",
    ],
)
def test_hostile_lines(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(line)
    with pytest.raises(DataError) as error:
        read_examples(tmp_path / "x.jsonl", chat=True)
    assert str(error.value).startswith(f"{tmp_path / 'x.jsonl'}, line 1: ")
    assert len(str(error.value)) < 400
