"""Prompts: read from a file, and shared out among training, validation and what is held out."""

from __future__ import annotations

import json

import pytest

from prefixcore.distill import DistillError, DistillOptions, Prompt, read_prompts
from prefixcore.distill.prompts import parts, split_off


def test_json_lines_and_plain_lines(tmp_path):
    path = tmp_path / "prompts"
    path.write_text('{"prompt": "Peru ->", "completion": " Lima", "more": 1}\n\n{"prompt": "Chad ->"}\n')
    found = read_prompts(path)
    assert [(p.text, p.completion) for p in found] == [("Peru ->", " Lima"), ("Chad ->", None)]
    assert found[1].source.endswith("prompts, line 3")
    path.write_text("How old?\n  \nHow far?\n")
    assert [p.text for p in read_prompts(path)] == ["How old?", "How far?"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_ends_at_a_line_break_alone(tmp_path, end):
    """JSON leaves U+2028 and the like as they are in a text, and so may a plain line."""
    path = tmp_path / "prompts"
    text = "one\u2028two\u2029three\x85four\x0bfive"
    line = json.dumps({"prompt": text.replace("\x0b", "")}, ensure_ascii=False)
    path.write_bytes((line + end + '{"prompt": "b"}' + end).encode())
    assert [p.text for p in read_prompts(path)] == [text.replace("\x0b", ""), "b"]
    path.write_bytes((text + end + "b").encode())
    found = read_prompts(path)
    assert [p.text for p in found] == [text, "b"]
    assert found[1].source.endswith("line 2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no prompts; expected lines like"),
        (b"\xff\n", "not UTF-8 text"),
        (b'{"prompt": "a"}\nplain\n', "line 2: not valid JSON"),
        (b'{"text": "a"}\n', "line 1: the field 'prompt' must be a text"),
        (
            b'{"prompt": [{"role": "user", "content": "a"}]}\n',
            "line 1: holds a list of messages, and prompts are single",
        ),
        (b'{"messages": [{"role": "user", "content": "a"}]}\n', "line 1: holds a list of messages"),
        (b'{"prompt": "a", "completion": 3}\n', "'completion' must be a text"),
        (b'{"prompt": "a"}\n[1]\n', "line 2: expected a JSON object"),
        (b'[\n {"prompt": "a"},\n 3\n]\n', "item 2: expected a JSON object, got a number"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, message):
    path = tmp_path / "prompts"
    path.write_bytes(content)
    with pytest.raises(DistillError, match=message):
        read_prompts(path)


def test_a_list_of_objects_has_a_prompt_an_item(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_bytes(b'[\n {"prompt": "a"},\n {"prompt": "[b]"}\n]\n')
    assert [p.text for p in read_prompts(path)] == ["a", "[b]"]
    path.write_bytes(b'[\n "a"]\n')  # two plain lines, whatever they look like
    assert [p.text for p in read_prompts(path)] == ["[", ' "a"]']


def test_a_table_has_a_prompt_a_row(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,completion\r\nPeru ->, Lima\r\n"a, b",\r\n')
    assert [(p.text, p.completion) for p in read_prompts(path)] == [("Peru ->", " Lima"), ("a, b", None)]
    for content, message in (
        (b"text\na\n", "line 2: the field 'prompt' must be a text"),
        (b"prompt\n", "no prompts; expected rows"),
        (b"prompt\n\xff\n", "not UTF-8 text"),
        (b"prompt\na,b\n", "line 2: 2 values"),
    ):
        path.write_bytes(content)
        with pytest.raises(DistillError, match=message):
            read_prompts(path)


def test_a_line_that_begins_like_an_array_is_a_prompt(tmp_path):
    path = tmp_path / "prompts"
    path.write_text("[1, 2] ->\n[3] ->\n")
    assert [p.text for p in read_prompts(path)] == ["[1, 2] ->", "[3] ->"]


def test_no_file(tmp_path):
    with pytest.raises(DistillError, match="no such file"):
        read_prompts(tmp_path / "nowhere")
    with pytest.raises(DistillError, match="not a regular file"):
        read_prompts(tmp_path)


def texts(prompts):
    return {prompt.text for prompt in prompts}


def test_parts_have_no_prompt_in_common(prompts):
    options = DistillOptions(num_virtual_tokens=4)
    questions = [Prompt(f"q{i}") for i in range(30)] + [Prompt("as ->")]
    training, validation, held = parts(prompts, questions, [], options)
    assert len(held) == 8
    assert len(validation) == 6
    assert texts(held) <= texts(prompts)  # what is measured on is like what will be asked
    assert not texts(training) & texts([*validation, *held])
    assert len(training) + len(validation) + len(held) == 70
    training, validation, held = parts(prompts, [], [Prompt("as ->"), Prompt("new")], options)
    assert texts(held) == {"as ->", "new"}
    assert not texts([*training, *validation]) & texts(held)
    training, validation, held = parts([], questions, [], options)
    assert len(training) + len(validation) + len(held) == 31


def test_too_few_prompts():
    options = DistillOptions(num_virtual_tokens=4)
    with pytest.raises(DistillError, match="no prompt to learn from"):
        parts([], [], [], options)
    with pytest.raises(DistillError, match="one prompt is too few.*: give more of them$"):
        split_off([Prompt("a"), Prompt("a")], 0.5, 0, "give more of them")


def test_the_advice_is_one_that_helps(prompts):
    """More questions give nothing to hold out where there are prompts of one's own, and something to choose by."""
    options = DistillOptions(num_virtual_tokens=4)
    questions = [Prompt("q")]
    with pytest.raises(DistillError, match="give more prompts of your own, or held-out prompts"):
        parts(prompts[:1], [Prompt("q1"), Prompt("q2")], [], options)
    with pytest.raises(DistillError, match="ask for more questions, or held-out prompts"):
        parts([], questions, [], options)
    with pytest.raises(DistillError, match="give more prompts, or ask for more questions"):
        parts(prompts[:1], [], [Prompt("held out")], options)
    assert len(parts(prompts[:1], questions, [Prompt("held out")], options)[0]) == 1
