"""Conversations: only the assistant's turns are learnt, each to the token that ends it."""

from __future__ import annotations

import json

import pytest

from prefixcore.training import DataError, Example, evaluate, read_examples, split, tokenize
from prefixcore.training.chat import Conversation
from prefixcore.training.data import IGNORED
from prefixcore.training.messages import check_messages
from tests import tiny

from .templates import said

CHATML = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ '<end>' if m.role == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chat_tokenizer(template=CHATML):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def conversation(*turns):
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return Conversation.of(check_messages(messages, "messages"), "here")


def test_the_assistants_turns_are_learnt_and_nothing_else():
    tokenizer = chat_tokenizer()
    [ids] = tokenize(tokenizer, [conversation("2 + 2?", "four", "and 3?", "seven", "thanks")])
    assert said(tokenizer, ids) == ["four<end>", "seven<end>"]
    whole = tokenizer.decode(ids.prompt_ids + ids.completion_ids)
    assert whole == "[user]2 + 2?\n[assistant]four<end>\n[user]and 3?\n[assistant]seven<end>"
    assert tokenizer.decode(ids.question_ids) == whole.removesuffix("seven<end>")
    assert tokenizer.decode(ids.answer_ids) == "seven<end>"


def test_the_ids_are_those_of_transformers_own_mask():
    """Of a template that marks the assistant's turns, by `return_assistant_tokens_mask`."""
    marked = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = chat_tokenizer(marked)
    example = conversation("2 + 2?", "four", "and 3?", "seven")
    [ids] = tokenize(tokenizer, [example])
    theirs = tokenizer.apply_chat_template(
        example.messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    ours = ids.prompt_ids + ids.completion_ids
    assert theirs["input_ids"][: len(ours)] == ours
    assert [int(label != IGNORED) for label in ids.labels] == theirs["assistant_masks"][: len(ours)]
    assert sum(theirs["assistant_masks"][len(ours) :]) == 0  # the template's line break after the last turn


def test_read_split_and_evaluated(tmp_path):
    rows = [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!", "thought": "ignored"}]
        for n in range(10)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    examples = read_examples(path, chat=True)
    training, held_out = split(examples, 0.2, 0)
    assert (len(training), len(held_out)) == (8, 2)
    tokenizer = chat_tokenizer()
    result = evaluate(tiny.model(), tokenizer, held_out, tokenize(tokenizer, held_out))
    assert result.loss > 4
    assert held_out[0].answer in {f"{n}!" for n in range(10)}


def test_conversations_that_begin_alike_stay_on_one_side():
    examples = [conversation("a", "b"), conversation("a", "b", "c", "d"), conversation("e", "f")]
    for seed in range(5):
        training, held_out = split(examples, 0.5, seed)
        assert {e.prompt for e in training}.isdisjoint(e.prompt for e in held_out)
        assert sorted((len(training), len(held_out))) == [1, 2]


def test_a_model_without_a_template():
    with pytest.raises(DataError, match="no chat template"):
        tokenize(tiny.tokenizer(), [conversation("a", "b")])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "chat template refuses the messages: roles must alternate"),
        ("{% for m in messages %}{{ m.content }}", "chat template refuses the messages"),
        (
            "{{ messages[-1].content }}",
            "message 2: the model's chat template asks for it with 'ab' and then writes 'cd'",
        ),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "does not write the content of mes"),
    ],
)
def test_templates_that_do_not_fit(template, message):
    with pytest.raises(DataError) as error:
        tokenize(chat_tokenizer(template), [conversation("ab", "cd")])
    assert str(error.value).startswith("here: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "not valid JSON"),
        ({"role": "user"}, "must be a list"),
        (["a"], "message 1 must be an object"),
        ([{"role": "user"}], "message 1 has no text 'content'"),
        (
            [{"role": "user", "content": "a"}],
            "no turn of the role 'assistant', which is what is learnt (found: 'user')",
        ),
        ([{"role": "assistant", "content": "a"}], "the first turn is the assistant's"),
        ([], "(found: none)"),
    ],
)
def test_messages_that_are_none(tmp_path, messages, message):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    with pytest.raises(DataError) as error:
        read_examples(path, chat=True)
    assert str(error.value).startswith(f"{path}, line 1: the field 'messages'")
    assert message in str(error.value)


def test_the_other_kind_of_data_is_told_apart(tmp_path):
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    with pytest.raises(DataError, match="'prompt' is missing .found: messages.; conversations are read with --chat"):
        read_examples(tmp_path / "chat.jsonl")
    (tmp_path / "plain.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    with pytest.raises(DataError, match="'messages' is missing .found: prompt, completion"):
        read_examples(tmp_path / "plain.jsonl", chat=True)
    assert isinstance(read_examples(tmp_path / "plain.jsonl")[0], Example)
