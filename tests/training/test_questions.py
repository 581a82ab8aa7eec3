"""Questions: prompts and conversations of a file, the ids that a model is asked with, and the right answers."""

from __future__ import annotations

import json

import pytest

from prefixcore.training import DataError, predict, read_questions, tokenize
from prefixcore.training.chat import Conversation
from tests import tiny
from tests.training import templates

USER = {"role": "user", "content": "Oslo?"}
SAID = {"role": "assistant", "content": "Cold."}


def read(path, *rows, name="asked.jsonl"):
    path = path / name
    path.write_text("\n".join(map(json.dumps, rows)))
    return read_questions(path)


def test_prompts_with_and_without_an_answer(tmp_path):
    first, second = read(tmp_path, {"prompt": "Peru ->", "completion": " Lima\n"}, {"prompt": "Chad ->"})
    tokenizer = tiny.tokenizer()
    assert (first.prompt, first.expected(tokenizer), first.expected(tokenizer, "\n")) == ("Peru ->", " Lima\n", " Lima")
    assert second.expected(tokenizer) is None
    assert second.source.endswith("asked.jsonl, line 2")
    assert second.ids(tokenizer) == tokenizer("Chad ->")["input_ids"]
    (tmp_path / "plain").write_text("a\n\nb\n")
    assert [each.prompt for each in read_questions(tmp_path / "plain")] == ["a", "b"]
    (tmp_path / "table.csv").write_text("prompt,completion,other\na,b,c\nd,,\n")
    assert [each.expected(tokenizer) for each in read_questions(tmp_path / "table.csv")] == ["b", None]


def test_prompts_of_other_names(tmp_path):
    (tmp_path / "x.csv").write_text("prompt;question;answer\nno;Peru ->; Lima\n")
    [question] = read_questions(tmp_path / "x.csv", columns=("question", "answer"))
    assert (question.prompt, question.expected(tiny.tokenizer())) == ("Peru ->", " Lima")
    with pytest.raises(DataError, match=r"the field 'what' must be .* \(found: question, answer\); what it is called"):
        read_questions(tmp_path / "x.csv", columns=("what", "answer"))


def test_a_text_is_what_a_user_says(tmp_path):
    tokenizer = templates.tokenizer(templates.HERMES)
    [text] = read(tmp_path, {"prompt": "Oslo?"})
    [messages] = read(tmp_path, {"messages": [USER]})
    assert text.ids(tokenizer, chat=True) == messages.ids(tokenizer) != text.ids(tokenizer)


@pytest.mark.parametrize("template", [templates.HERMES, templates.LLAMA], ids=["hermes", "llama"])
def test_a_conversation_is_asked_as_it_is_learnt(tmp_path, template):
    """What stands before the last turn to learn, tools and all; and that turn is the right answer."""
    messages = [USER, templates.call("Oslo"), {"role": "tool", "name": "weather", "content": "-3 C"}, SAID]
    row = {"messages": messages, "tools": [templates.WEATHER]}
    tokenizer = templates.tokenizer(template)
    [question] = read(tmp_path, row)
    [learnt] = tokenize(tokenizer, [Conversation.of(question.example.messages, "here", tools=[templates.WEATHER])])
    assert question.ids(tokenizer) == learnt.question_ids
    assert question.expected(tokenizer) == tokenizer.decode(learnt.answer_ids, skip_special_tokens=True)
    assert "Cold." in question.expected(tokenizer)
    [asked] = read(tmp_path, {**row, "messages": messages[:-1]})
    assert asked.ids(tokenizer) == question.ids(tokenizer)
    assert asked.expected(tokenizer) is None
    [trl] = read(tmp_path, {"prompt": messages[:-1], "completion": [SAID], "tools": [templates.WEATHER]})
    assert trl.ids(tokenizer) == question.ids(tokenizer)
    [alone] = read(tmp_path, {"prompt": messages[:-1], "tools": json.dumps([templates.WEATHER])})
    assert alone.ids(tokenizer) == question.ids(tokenizer)


def test_a_template_that_writes_earlier_turns_otherwise(tmp_path):
    """There the whole conversation is no one text, and its last question is."""
    tokenizer = templates.tokenizer(templates.THINKING)
    [question] = read(tmp_path, {"messages": [USER, {**SAID, "reasoning_content": "Far north."}, USER, SAID]})
    assert question.expected(tokenizer)
    text = tokenizer.decode(question.ids(tokenizer))
    assert "Far north." not in text


def test_what_a_template_leaves_out_of_earlier_turns_is_nobodys_question(tmp_path):
    """It is not learnt here: a server's template leaves it out of what it asks, too."""
    tokenizer = templates.tokenizer(templates.HERMES)
    [question] = read(tmp_path, {"messages": [USER, {**SAID, "reasoning_content": "Far north."}, USER, SAID]})
    assert "Cold." in question.expected(tokenizer)
    assert "Far north." not in tokenizer.decode(question.ids(tokenizer))


def test_conversations_in_a_table(tmp_path):
    (tmp_path / "asked.csv").write_text('messages,tools\n"[{""role"": ""user"", ""content"": ""Oslo?""}]",\n')
    assert [(each.prompt, each.given) for each in read_questions(tmp_path / "asked.csv")] == [([USER], {})]


def test_a_turn_of_no_weight_is_no_right_answer(tmp_path):
    [question] = read(tmp_path, {"messages": [USER, {**SAID, "weight": 0}]})
    assert question.expected(templates.tokenizer(templates.HERMES)) is None
    assert question.prompt == [USER]


def test_predict_takes_them(tmp_path):
    model, tokenizer = tiny.model(), templates.tokenizer(templates.HERMES)
    model.resize_token_embeddings(len(tokenizer))
    questions = read(tmp_path, {"prompt": "a"}, {"messages": [USER]})
    both = predict(model, tokenizer, questions, max_new_tokens=4)
    assert both[0] == predict(model, tokenizer, ["a"], max_new_tokens=4)[0]
    assert both[1] == predict(model, tokenizer, ["Oslo?"], max_new_tokens=4, chat=True)[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "line 1: the field 'prompt' must be a text that is not empty, or a list of messages"),
        ({"prompt": ""}, "must be a text that is not empty"),
        ({"prompt": "a", "completion": 3}, "'completion' must be a text"),
        ({"messages": []}, "nothing is asked"),
        ({"messages": [SAID]}, "nothing is asked: no message of another than 'assistant'"),
        ({"messages": [{"role": "user"}]}, "message 1 has no text 'content'"),
        ({"messages": [USER], "tools": 3}, "'tools' must be a list"),
        ({"messages": [USER], "images": ["x"]}, "holds images"),
    ],
)
def test_what_asks_nothing_is_named(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, row)


def test_what_a_template_leaves_out_is_named(tmp_path):
    tokenizer = templates.tokenizer(templates.IGNORES)
    [question] = read(tmp_path, {"messages": [USER], "tools": [templates.WEATHER]})
    with pytest.raises(DataError, match="does not write the tools"):
        question.ids(tokenizer)
    with pytest.raises(DataError, match="no chat template"):
        read(tmp_path, {"messages": [USER]})[0].ids(tiny.tokenizer())
