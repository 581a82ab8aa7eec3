"""The text that virtual tokens start from, made of training examples."""

from __future__ import annotations

import pytest
import torch

from prefixcore import PrefixTuningConfig, attach
from prefixcore.training import DataError, Example, best_start, starting_text, tokenize
from prefixcore.training.chat import Conversation
from prefixcore.training.evaluate import held_out_loss
from prefixcore.training.starting import MOST_CHARACTERS, beginning, most_tokens
from tests import tiny

PAIRS = [Example(f"{a}{b} ->", f" {b}{a}") for a in "abcde" for b in "vwxyz"]
LABELLED = [Example(f"{a}{b}?", " yes" if a < "c" else " no") for a in "abcde" for b in "vwxyz"]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def whole(text: str, end: str = "\n") -> list[str]:
    return [line + end for line in text.split(end) if line]


def test_whole_examples_are_put_one_after_the_other():
    text = starting_text(PAIRS, tiny.tokenizer(), end="\n")
    known = {each.prompt + each.completion + "\n" for each in PAIRS}
    assert set(whole(text)) <= known
    assert len(whole(text)) == 7  # of nine tokens each, of 64
    assert len(whole(starting_text(PAIRS, tiny.tokenizer(), end="\n", most=32))) == 3
    assert text.endswith("\n")


def test_it_fills_as_many_tokens_as_are_asked_for_and_ends_with_a_whole_example():
    tokenizer = tiny.tokenizer()
    for count in (1, 5, 9, 20, 27, 40):
        text = starting_text(PAIRS, tokenizer, count, end="\n")
        assert len(tokenizer(text)["input_ids"]) == count
        if count >= 9:
            assert whole(text)[-1] in {each.prompt + each.completion + "\n" for each in PAIRS}


def test_classes_take_turns():
    text = starting_text(LABELLED, tiny.tokenizer(), 15, end="\n")
    answers = [line.split("?")[1].strip() for line in whole(text)]
    assert sorted(answers) == ["no", "yes"]


def test_the_seed_decides():
    tokenizer = tiny.tokenizer()
    texts = {starting_text(PAIRS, tokenizer, end="\n", seed=seed) for seed in range(5)}
    assert len(texts) > 1
    assert starting_text(PAIRS, tokenizer, end="\n", seed=3) == starting_text(PAIRS, tokenizer, end="\n", seed=3)


def test_without_an_end_the_end_of_the_sequence_closes_each_example():
    text = starting_text(PAIRS, tiny.tokenizer())
    assert text.count("<end>") >= 2
    assert text.endswith("<end>")


def test_an_example_longer_than_the_room_gives_its_end():
    text = starting_text([Example("a" * 100, "bcd")], tiny.tokenizer(), 8, end="\n")
    assert text == "aaaabcd\n"
    assert starting_text([Example("a" * 100, "bcd")], tiny.tokenizer(), end="\n") == "a" * 60 + "bcd\n"


def test_a_conversation_is_written_by_the_template():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}]
    example = Conversation.of(turns, "one")
    assert starting_text([example], tokenizer, end=None).startswith("<user>ab<assistant>ba")
    assert beginning(example, example.to_ids(tokenizer, None), tokenizer) == "<user>ab<assistant>"


def test_a_text_leaves_room_for_the_longest_example():
    assert most_tokens(2048, [10, 300]) == 64
    assert most_tokens(128, [10, 100]) == 28
    assert most_tokens(128, []) == 64
    assert most_tokens(96, [10]) == 48  # half of them
    assert most_tokens(128, [112]) == 16
    assert most_tokens(128, [113, 10]) == 64  # too little is left by it, so that it is refused
    assert most_tokens(1, []) == 1


def test_no_example_is_refused():
    with pytest.raises(DataError, match="no examples to start from"):
        starting_text([], tiny.tokenizer())


def test_a_prefix_of_it_acts_as_the_text_before_the_question():
    model, tokenizer = tiny.model(), tiny.tokenizer()
    text = starting_text(PAIRS[:10], tokenizer, end="\n")
    asked = [Example(text + each.prompt, each.completion) for each in PAIRS[10:14]]
    expected = held_out_loss(model, tokenize(tokenizer, asked, end="\n"), 0)
    with attach(model, PrefixTuningConfig(init_text=text), tokenizer=tokenizer):
        found = held_out_loss(model, tokenize(tokenizer, PAIRS[10:14], end="\n"), 0)
    assert found == pytest.approx(expected, abs=1e-4)


def test_the_best_start_is_the_one_with_the_least_loss_and_leaves_the_model_alone():
    model, tokenizer = tiny.model(), tiny.tokenizer()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    probes = tokenize(tokenizer, PAIRS[10:14], end="\n")
    configs = [PrefixTuningConfig(init_text=starting_text(PAIRS[:10], tokenizer, seed=seed)) for seed in range(4)]
    losses = []
    for config in configs:
        with attach(model, config, tokenizer=tokenizer):
            losses.append(held_out_loss(model, probes, 0))
    assert len(set(losses)) > 1
    assert best_start(model, tokenizer, configs, probes) is configs[losses.index(min(losses))]
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_where_there_is_nothing_to_choose_from_the_first_start_is_taken():
    configs = [PrefixTuningConfig(init_text="ab"), PrefixTuningConfig(init_text="cd")]
    assert best_start(None, None, configs[:1], tokenize(tiny.tokenizer(), PAIRS)) is configs[0]
    assert best_start(None, None, configs, []) is configs[0]


def test_an_example_of_a_whole_book_is_not_read_for_it():
    tokenizer, short = tiny.tokenizer(), PAIRS[:3]
    book = Example("a" * (MOST_CHARACTERS + 1), " b")
    assert starting_text([*short, book], tokenizer, 40) == starting_text(short, tokenizer, 40)
    assert starting_text([book], tokenizer, 40) == ""
