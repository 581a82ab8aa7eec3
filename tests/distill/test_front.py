"""The text before prompts: written as the model reads it, and its keys and values in its place."""

from __future__ import annotations

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import MistralConfig, MistralForCausalLM

from prefixcore.distill import DistillError, DistillOptions, Prompt, distill
from prefixcore.distill.front import Front, Reader
from prefixcore.distill.running import answer, answer_logits, cut
from prefixcore.distill.writing import writer
from prefixcore.training import DataError
from tests.distill.conftest import TEXT

CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ROWS = [([10, 11, 12], [13, 14]), ([20], [21, 22, 23]), ([30, 31], [32])]


def test_keys_and_values_stand_for_the_text(model, tokenizer):
    ids = writer(tokenizer, TEXT, chat=False).front
    expected = answer_logits(Reader(model, ids, packed=False), ROWS, 0)
    front = Front.of(model, ids)
    with front.before(model) as reader:
        assert reader.packed
        packed = answer_logits(reader, ROWS, 0)
        padded = answer_logits(Reader(model, [], packed=False), ROWS, 0)
        prompts = [prompt for prompt, _ in ROWS]
        answers = answer(reader, tokenizer, prompts, max_new_tokens=5, padding=0)
    assert packed.shape == (6, 98)
    torch.testing.assert_close(packed, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(padded, expected, atol=1e-4, rtol=1e-4)
    bare = Reader(model, ids, packed=False)
    assert answers == answer(bare, tokenizer, prompts, max_new_tokens=5, padding=0)
    assert not hasattr(model, "prefixcore")


def test_where_no_prefix_is_equal_the_tokens_stand_before_each_prompt(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=98, num_key_value_heads=2, max_position_embeddings=128, sliding_window=8, **sizes)
    model = MistralForCausalLM(config).eval()
    front = Front.of(model, [5, 6, 7])
    assert front.pairs is None
    with front.before(model) as reader:
        assert (reader.before, reader.packed) == ([5, 6, 7], False)
    options = DistillOptions(num_virtual_tokens=3, questions=0, max_answer_tokens=3, steps=2, start="mass")
    distilled = distill(model, tokenizer, TEXT, options=options, prompts=[Prompt(each) for each in "abcdef"])
    assert distilled.report.start["kind"] == "spread"
    assert not distilled.report.is_prefix_exact
    assert distilled.report.scores["the full text"].divergence == 0


def test_a_token_that_begins_texts_stands_before_the_text_and_before_a_request(tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    start = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", start)])
    written = writer(tokenizer, "abc", chat=False)
    asked = written.ask(Prompt("de"))
    assert written.front[0] == start
    assert len(written.front) == 4
    assert start not in asked.behind
    assert asked.alone == [start, *asked.behind]


def test_a_conversation_has_the_text_as_its_system_message(tokenizer):
    tokenizer.chat_template = CHAT
    written = writer(tokenizer, "Be brief.", chat=True)
    asked = written.ask(Prompt("Hi"))
    assert tokenizer.decode(written.front) == "[system]Be brief.<end>[user]"
    assert tokenizer.decode(asked.behind) == "Hi<end>[assistant]"
    assert tokenizer.decode(asked.alone) == "[user]Hi<end>[assistant]"


def test_what_a_template_cannot_write_is_an_error(tokenizer):
    with pytest.raises(DataError, match="has no chat template"):
        writer(tokenizer, "Be brief.", chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(DistillError, match="does not write the system message"):
        writer(tokenizer, "Be brief.", chat=True)
    with pytest.raises(DistillError, match="the text has no token"):
        writer(tokenizer, " \n", chat=False)


def test_an_answer_goes_up_to_what_ends_it(tokenizer):
    ids = tokenizer("ab\ncd")["input_ids"]
    assert tokenizer.decode(cut(ids, tokenizer, {0}, "\n")) == "ab\n"
    assert cut([5, 6, 0, 0], tokenizer, {0}, None) == [5, 6, 0]
    assert cut([5, 6], tokenizer, {0}, None) == [5, 6]


def test_sampling_is_seeded_and_leaves_the_generator_as_it_was(model, tokenizer):
    reader = Reader(model, [], packed=False)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one, again, other = (
        answer(reader, tokenizer, [[5, 6]] * 4, max_new_tokens=6, padding=0, temperature=1.0, seed=seed)
        for seed in (0, 0, 1)
    )
    assert one == again != other
    assert torch.equal(torch.random.get_rng_state(), before)
