"""Tools, what the assistant thinks, weights and parts: what is learnt is what the template writes of them by hand."""

from __future__ import annotations

import json

import pytest
import torch

from prefixcore.training import DataError, Example, describe_data, evaluate, split, starting_text, tokenize, unroll
from prefixcore.training.chat import Conversation
from prefixcore.training.messages import check_messages
from tests import tiny

from .templates import HERMES, IGNORES, LLAMA, PARTS, REFUSES, THINKING, WEATHER, call, said, tokenizer

USER = {"role": "user", "content": "Is it cold in Oslo?"}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "call_1", "content": "-3 C"}
ANSWER = {"role": "assistant", "content": "Yes."}
ASKED = [USER, call("Oslo"), RESULT, ANSWER]
FIRST_CALL = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content + '' }}{{ m.tool_calls[0].function if m.tool_calls }}"
    "{{ '<|im_end|>' if m.role == 'assistant' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""Reads every content, also where there is none, and one call of a turn."""


def conversation(messages, tools=None, **template_kwargs):
    checked = check_messages(messages, "messages")
    return Conversation.of(checked, "here", tools=tools, template_kwargs=template_kwargs)


def two_calls(*cities, **others):
    return {**call("", **others), "tool_calls": [each for city in cities for each in call(city)["tool_calls"]]}


def whole(made, ids):
    return made.decode(ids.prompt_ids + ids.completion_ids)


def test_tools_in_the_system_turn():
    made = tokenizer(HERMES)
    [ids] = tokenize(made, [conversation([{"role": "system", "content": "Be brief."}, *ASKED], [WEATHER])])
    calls = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    assert said(made, ids) == [calls, "Yes.<|im_end|>"]
    assert whole(made, ids) == (
        f"<|im_start|>system\nBe brief.\n\n# Tools\n<tools>\n{json.dumps(WEATHER)}\n</tools><|im_end|>\n"
        f"<|im_start|>user\nIs it cold in Oslo?<|im_end|>\n<|im_start|>assistant\n{calls}\n"
        "<|im_start|>user\n<tool_response>\n-3 C\n</tool_response><|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>"
    )
    assert made.decode(ids.question_ids).endswith("</tool_response><|im_end|>\n<|im_start|>assistant\n")


def test_tools_in_the_users_turn():
    made = tokenizer(LLAMA, eos="<|eot_id|>")
    [ids] = tokenize(made, [conversation(ASKED, [WEATHER])])
    calls = '{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>'
    assert said(made, ids) == [calls, "Yes.<|eot_id|>"]
    head = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    assert whole(made, ids) == (
        f"<|begin|>{head('user')}{json.dumps(WEATHER)}\n\nIs it cold in Oslo?<|eot_id|>{head('assistant')}{calls}"
        f"{head('ipython')}-3 C<|eot_id|>{head('assistant')}Yes.<|eot_id|>"
    )


def test_two_calls_with_a_text_beside_them():
    made = tokenizer(HERMES)
    both = call("Oslo", content="I look.")
    both["tool_calls"] = both["tool_calls"] + call("Rome")["tool_calls"]
    results = [RESULT, {**RESULT, "content": "20 C"}]
    [ids] = tokenize(made, [conversation([USER, both, *results, ANSWER], [WEATHER])])
    first, _ = said(made, ids)
    written = '<tool_call>\n{{"name": "weather", "arguments": {{"city": "{}"}}}}\n</tool_call>'.format
    assert first == f"I look.\n{written('Oslo')}\n{written('Rome')}<|im_end|>"


@pytest.mark.parametrize(
    "calls",
    [
        [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
        [{"function": {"name": "weather", "arguments": '{ "city" : "Oslo" }'}}],
        [{"name": "weather", "arguments": {"city": "Oslo"}}],
        '[{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}]',
    ],
)
def test_every_way_of_writing_a_call_is_one(calls):
    """TRL's objects, OpenAI's text, transformers' short form, and JSON text of a column."""
    [expected] = [conversation([USER, call("Oslo")], [WEATHER])]
    found = conversation([USER, {"role": "assistant", "tool_calls": calls}], [WEATHER])
    for template in (HERMES, LLAMA):
        made = tokenizer(template)
        assert found.to_ids(made, None) == expected.to_ids(made, None)
    plain = [{**each, "tool_calls": [{**each["tool_calls"][0], "id": "call_1"}]} for each in found.messages[1:]]
    assert plain == expected.messages[1:]


def test_a_template_that_adds_the_arguments_to_a_text():
    """As DeepSeek-V3's, which takes them as OpenAI gives them."""
    template = HERMES.replace("{{- call.function.arguments | tojson }}", "{{- '' + call.function.arguments }}")
    assert template != HERMES
    other, same = tokenizer(template), tokenizer(HERMES)
    example = conversation(ASKED, [WEATHER])
    assert example.to_ids(other, None) == example.to_ids(same, None)


def test_a_template_that_reads_every_content():
    made = tokenizer(FIRST_CALL)
    [first, _] = said(made, conversation(ASKED).to_ids(made, None))
    assert first == "{'name': 'weather', 'arguments': {'city': 'Oslo'}}<|im_end|>"


@pytest.mark.parametrize(
    ("template", "messages", "tools", "message"),
    [
        (HERMES, [USER, {**ANSWER, "content": "a<|im_end|>b"}], None, "its content goes on behind '<|im_end|>'"),
        (HERMES, [USER, call("<|im_end|>")], None, "its tool_calls goes on behind '<|im_end|>'"),
        (
            THINKING, [USER, {**ANSWER, "reasoning_content": "<|im_end|> ends it"}], None,
            "its reasoning_content goes on behind '<|im_end|>'",
        ),
        (REFUSES, [USER, ANSWER], [WEATHER], "chat template refuses the messages: no tools, please"),
        (IGNORES, [USER, ANSWER], [WEATHER], "chat template does not write the tools"),
        (IGNORES, ASKED, None, "does not write the tool_calls of message 2, so it would not be learnt"),
        (LLAMA, [USER, call("Oslo", content="I look.")], None, "the content of message 2 beside its tool_calls"),
        (LLAMA, [USER, call("Oslo", content="Oslo")], None, "the content of message 2 beside its tool_calls"),
        (
            IGNORES.replace("messages %}", "messages if m.role != 'tool' %}"),
            [USER, ANSWER, {**RESULT, "content": "cold"}, ANSWER], None, "does not write message 3, of the role 'tool'",
        ),
        (FIRST_CALL, [USER, two_calls("Oslo", "Rome")], None, "does not write the tool_calls of message 2"),
        (HERMES, [USER, {**ANSWER, "reasoning_content": "cold"}], None, "the reasoning_content of message 2"),
        (HERMES, [USER, {**ANSWER, "reasoning_content": "Yes"}], None, "the reasoning_content of message 2"),
        (HERMES, [USER, {**ANSWER, "thinking": "cold"}], None, "the thinking of message 2"),
        (HERMES, [{"role": "developer", "content": "Briefly!"}, USER, ANSWER], None, "does not write message 1"),
        (
            HERMES.replace("{{- call.function.arguments | tojson }}", ""),
            ASKED, None, "the arguments of the tool_calls of message 2",
        ),
        (LLAMA, [USER, {**call("Oslo"), "tool_calls": call("Oslo")["tool_calls"] * 2}], None, "one tool call"),
    ],
)  # fmt: skip
def test_nothing_is_left_out_in_silence(template, messages, tools, message):
    with pytest.raises(DataError) as error:
        tokenize(tokenizer(template), [conversation(messages, tools)])
    assert str(error.value).startswith("here: ")
    assert message in str(error.value)


def test_what_a_template_does_not_know_is_no_fault():
    """Fields that say nothing, and reasoning that is not there, are handed on."""
    made = tokenizer(HERMES)
    told = [{**USER, "name": "Ann"}, {**ANSWER, "id": 7, "reasoning_content": "", "refusal": None}]
    assert conversation(told).to_ids(made, None) == conversation([USER, ANSWER]).to_ids(made, None)


def test_weights():
    """OpenAI's: 0 is read and not learnt; 1 is what holds without it."""
    made = tokenizer(HERMES)
    turns = [
        USER,
        {**ANSWER, "weight": 0},
        {**USER, "content": "And in Rome?"},
        {"role": "assistant", "content": "No."},
    ]
    example = conversation(turns)
    ids = example.to_ids(made, None)
    assert said(made, ids) == ["No.<|im_end|>"]
    reads = tokenizer(IGNORES.replace("{{ m.content }}", "{{ m.content }}{{ m.weight }}"))
    assert whole(reads, example.to_ids(reads, None)).startswith("[user]Is it cold in Oslo?[assistant]Yes.<end>")
    plain = conversation([{k: v for k, v in each.items() if k != "weight"} for each in turns])
    assert whole(made, ids) == whole(made, plain.to_ids(made, None))
    assert describe_data([example]) != describe_data([plain])
    assert (
        conversation([{**each, "weight": 1} if each["role"] == "assistant" else each for each in plain.messages])
        == plain
    )
    cut = conversation([USER, ANSWER, USER, {**ANSWER, "weight": 0}])
    assert cut == conversation([USER, ANSWER])
    greeted = conversation([{"role": "assistant", "content": "Hello!", "weight": 0}, USER, ANSWER])
    assert said(made, greeted.to_ids(made, None)) == ["Yes.<|im_end|>"]
    assert json.loads(greeted.prompt)[1:] == [USER]


def test_parts():
    several = [{"type": "text", "text": "Is it cold"}, {"type": "text", "text": "in Oslo?"}]
    one, many = [{"type": "text", "text": USER["content"]}], conversation([{**USER, "content": several}, ANSWER])
    assert conversation([{**USER, "content": one}, ANSWER]) == conversation([USER, ANSWER])
    hermes, parts = tokenizer(HERMES), tokenizer(PARTS, eos="<end>")
    assert "user\nIs it cold\nin Oslo?<|im_end|>" in whole(hermes, many.to_ids(hermes, None))
    assert whole(parts, many.to_ids(parts, None)) == "[user]Is it cold|in Oslo?|[assistant]Yes.|<end>"
    assert whole(parts, conversation([USER, ANSWER]).to_ids(parts, None)) == (
        "[user]Is it cold in Oslo?|[assistant]Yes.|<end>"
    )
    prints = tokenizer(IGNORES, eos="<end>")  # would write the list as Python does
    assert "type" not in whole(prints, many.to_ids(prints, None))


def test_arguments_of_the_template():
    made = tokenizer(THINKING)
    ids = conversation([USER, ANSWER], enable_thinking=False).to_ids(made, None)
    assert said(made, ids) == ["Yes.<|im_end|>"]
    assert said(made, conversation([USER, ANSWER]).to_ids(made, None)) == ["<think>\n\n</think>\n\nYes.<|im_end|>"]
    thought = {**ANSWER, "reasoning_content": "-3 is cold"}
    assert said(made, conversation([USER, thought]).to_ids(made, None)) == [
        "<think>\n-3 is cold\n</think>\n\nYes.<|im_end|>"
    ]
    with pytest.raises(DataError, match=r"message 2: .* asks for it with .* and then writes '-3 is cold"):
        conversation([USER, thought], enable_thinking=False).to_ids(made, None)


def test_an_end_that_the_content_has_already():
    made = tokenizer(HERMES)
    assert said(made, conversation([USER, {**ANSWER, "content": "Yes.<|im_end|>"}]).to_ids(made, None)) == [
        "Yes.<|im_end|>"
    ]


def test_variables_of_a_template_may_have_any_name():
    made = tokenizer(IGNORES.replace("{{ m.content }}", "{{ m.content }}{{ source }}{{ tokenizer }}"))
    ids = conversation([USER, ANSWER], source="one", tokenizer="two").to_ids(made, None)
    assert whole(made, ids).startswith("[user]Is it cold in Oslo?onetwo")


def test_a_template_that_writes_earlier_turns_otherwise():
    """Each turn becomes an example of its own, behind what a server would read before it."""
    made = tokenizer(THINKING)
    first, second = ({**ANSWER, "content": text, "reasoning_content": f"think {text}"} for text in ("Yes.", "No."))
    example = conversation([USER, first, {**USER, "content": "And Rome?"}, second])
    with pytest.raises(DataError, match="before message 4 otherwise once that is there.*prefixcore.training.unroll"):
        tokenize(made, [example])
    one, other = unroll(made, [example])
    for made_of_it, text, before in ((one, "Yes.", 1), (other, "No.", 3)):
        ids = made_of_it.to_ids(made, None)
        assert said(made, ids) == [f"<think>\nthink {text}\n</think>\n\n{text}<|im_end|>"]
        asked = example.messages[:before]
        assert ids.prompt_ids == made.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert one.prompt == other.prompt == example.prompt  # they stay on one side of a split
    assert unroll(made, [one, other, Example("a", "b")]) == [one, other, Example("a", "b")]
    assert unroll(tokenizer(HERMES), [conversation(ASKED, [WEATHER])]) == [conversation(ASKED, [WEATHER])]


def test_the_digest_of_plain_conversations_is_as_ever():
    plain = conversation([USER, ANSWER])
    expected = [Example(json.dumps([USER], separators=(",", ":")), json.dumps([ANSWER], separators=(",", ":")))]
    assert describe_data([plain]) == describe_data(expected)
    others = [conversation([USER, ANSWER], [WEATHER]), conversation([USER, ANSWER], enable_thinking=False)]
    assert len({describe_data([each])["sha256"] for each in (plain, *others)}) == 3


def test_conversations_with_the_same_tools_begin_alike():
    examples = [conversation([{**USER, "content": text}, call("Oslo")], [WEATHER]) for text in "aabbc"]
    training, held_out = split(examples, 0.4, 0)
    assert {each.prompt for each in training}.isdisjoint(each.prompt for each in held_out)
    assert len(training) + len(held_out) == 5


def test_calls_are_answers_too():
    """Exact match is that of what the template writes, not of the text, which there is none of."""
    made = tokenizer(HERMES)
    example = conversation([USER, call("Oslo")], [WEATHER])
    ids = example.to_ids(made, None)
    model = tiny.model()
    model.resize_token_embeddings(len(made))
    for answer, is_right in ((ids.answer_ids, 1), (ids.answer_ids[1:], 0), (ids.answer_ids[-1:], 0)):
        model.generate = lambda input_ids, answer=answer, **_: torch.cat([input_ids, torch.tensor([answer])], dim=1)
        assert evaluate(model, made, [example], [ids]).exact_match == is_right
    assert example.answer == '\n{"name":"weather","arguments":{"city":"Oslo"}}'


def test_examples_with_tools_are_a_start():
    made = tokenizer(HERMES)
    example = conversation(ASKED, [WEATHER])
    text = starting_text([example], made, most=10_000)
    assert text == whole(made, example.to_ids(made, None))
