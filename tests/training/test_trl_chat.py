"""TRL's reading of conversations with tools: its templates, its masks and its trainer's labels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from prefixcore.training.chat import Conversation
from prefixcore.training.data import IGNORED
from prefixcore.training.messages import check_messages
from tests import tiny

from .templates import HERMES, WEATHER, call, tokenizer

if sys.version_info < (3, 11):
    pytest.skip("TRL needs Python 3.11", allow_module_level=True)

import trl

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TURNS = [
    {"role": "user", "content": "Is it cold in Oslo?"},
    call("Oslo"),
    {"role": "tool", "name": "weather", "tool_call_id": "call_1", "content": "-3 C"},
    {"role": "assistant", "content": "Yes."},
]
THOUGHT = [{**each, "reasoning_content": "I see"} if each["role"] == "assistant" else each for each in TURNS]
PLAIN = [*TURNS[:1], TURNS[3], {"role": "user", "content": "In Rome?"}, {"role": "assistant", "content": "No."}]


def ours(made: Any, messages: list[dict[str, Any]], tools: list[Any] | None) -> tuple[list[int], list[int]]:
    ids = Conversation.of(check_messages(messages, "here"), "here", tools=tools).to_ids(made, None)
    return ids.prompt_ids + ids.completion_ids, [int(label != IGNORED) for label in ids.labels]


@pytest.mark.parametrize(
    ("name", "messages", "tools"),
    [
        ("llama3", PLAIN, None),
        ("gemma3", PLAIN, None),
        ("glm4moe", TURNS, [WEATHER]),
        ("glm4moe", THOUGHT, [WEATHER]),
        ("lfm2_v2", TURNS, [WEATHER]),
        ("qwen2_5", PLAIN, None),
        ("qwen2_5", TURNS, [WEATHER]),
        ("qwen3", TURNS, [WEATHER]),
        ("qwen3", THOUGHT, [WEATHER]),
        ("qwen3_instruct_2507", TURNS, [WEATHER]),
        ("qwen3_5_think", THOUGHT, [WEATHER]),
        ("nemotron_3_nano", THOUGHT, [WEATHER]),
    ],
)
def test_the_masks_of_trls_own_templates(name: str, messages: list[dict[str, Any]], tools: list[Any] | None) -> None:
    """The same ids. What TRL learns besides is what the model is asked with, or comes after the end of its turn."""
    made = tokenizer((TEMPLATES / f"{name}_training.jinja").read_text(), "<|im_end|>" if name[0] == "q" else "<end>")
    ids, learnt = ours(made, messages, tools)
    theirs = made.apply_chat_template(
        check_messages(messages, "here"), tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    assert theirs["input_ids"][: len(ids)] == ids
    mask = theirs["assistant_masks"][: len(ids)]
    assert all(mask[place] for place, is_learnt in enumerate(learnt) if is_learnt)
    more = [place for place, is_masked in enumerate(mask) if is_masked and not learnt[place]]
    begins = made.apply_chat_template(messages[:1], tools=tools, tokenize=False, add_generation_prompt=True)
    text = made.decode([ids[place] for place in more])
    if name[:4] not in ("qwen", "nemo"):
        assert more == []
    for piece in text.split("\n"):
        assert piece in ("", "<think>")
        assert f"{piece}\n" in begins


def test_the_labels_of_its_trainer(tmp_path: Path) -> None:
    """`messages` with `tools` and `chat_template_kwargs`, on the assistant's turns alone."""
    before, after = HERMES.split("{%- elif message.role == 'assistant' %}\n        {{- '<|im_start|>assistant\\n' }}")
    marked = after.replace(
        "        {{- '<|im_end|>\\n' }}", "        {{- '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}", 1
    )
    template = before + "{%- elif message.role == 'assistant' %}\n        {{- '<|im_start|>assistant\\n' }}"
    template += "{%- generation %}" + marked
    made = tokenizer(template)
    messages = check_messages(TURNS, "here")
    row = {"messages": messages, "tools": [WEATHER], "chat_template_kwargs": {"unread": True}}
    trainer = trl.SFTTrainer(
        tiny.model(),
        trl.SFTConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", assistant_only_loss=True, max_length=None
        ),
        train_dataset=Dataset.from_list([row]),
        processing_class=made,
    )
    [found] = list(trainer.train_dataset)
    ids, learnt = ours(made, messages, [WEATHER])
    assert found["input_ids"][: len(ids)] == ids
    labels = [token if is_learnt else IGNORED for token, is_learnt in zip(ids, learnt, strict=True)]
    assert found["labels"][: len(ids)] == labels
    assert set(found["labels"][len(ids) :]) == {IGNORED}  # the line break after the last turn
    assert ours(tokenizer(HERMES), TURNS, [WEATHER]) == (ids, learnt)  # the marks change nothing for us
