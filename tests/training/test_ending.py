"""Where an answer ends, when it is the right one, and completions that are no whole answers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken, normalizers

from prefixcore.training import DataError, Example, Question, evaluate, predict, tokenize
from prefixcore.training.chat_rows import conversation
from prefixcore.training.ending import as_ids, end_ids, turn_end
from tests import tiny
from tests.training import templates

END = "</s>"


def model_that_says(tokenizer, said):
    """The tiny model, which answers each prompt with the same ids, whatever comes behind the one it stops at."""
    model = tiny.model()
    model.resize_token_embeddings(len(tokenizer))

    def generate(input_ids, max_new_tokens, pad_token_id, eos_token_id=(), **options):
        ids = said[:max_new_tokens]
        stop = next((place + 1 for place, token in enumerate(ids) if token in as_ids(eos_token_id)), len(ids))
        ids = ids[:stop] + [pad_token_id] * (3 if stop < len(said) else 0)  # as where another row is longer
        return torch.cat([input_ids, torch.tensor([ids] * len(input_ids))], 1)

    model.generate = generate
    return model


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_answers_end_with_the_tokenizers_token_where_the_model_names_another():
    """As completions do that `tokenize` makes."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(AddedToken(END, special=True))
    tokenizer.eos_token = END
    model = model_that_says(tokenizer, [*ids_of(tokenizer, " Lima"), tokenizer.eos_token_id, *ids_of(tokenizer, "x")])
    assert model.generation_config.eos_token_id == 0 != tokenizer.eos_token_id
    assert end_ids(model, tokenizer, chat=False) == {0, tokenizer.eos_token_id}
    assert predict(model, tokenizer, ["Peru ->"], max_new_tokens=9) == [" Lima"]
    examples = [Example("Peru ->", " Lima"), Example("Chile ->", " Santiago")]
    assert evaluate(model, tokenizer, examples, tokenize(tokenizer, examples)).exact_match == 0.5


def test_an_end_that_only_the_model_names_is_no_text():
    """Nor is what fills the row behind it."""
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    stop = ids_of(tokenizer, "!")[0]
    model = model_that_says(tokenizer, [*ids_of(tokenizer, " Lima"), stop])
    model.generation_config.eos_token_id = [stop]
    assert predict(model, tokenizer, ["Peru ->"], max_new_tokens=9) == [" Lima"]


def test_an_end_may_be_a_special_token():
    """Texts leave it out, and where no id ends answers, what comes behind it in a batch is no padding."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(AddedToken("<stop>", special=True))
    tokenizer.pad_token = tokenizer.eos_token = None
    model = model_that_says(tokenizer, ids_of(tokenizer, " Lima<stop> and on"))
    model.generation_config.eos_token_id = None
    examples = [Example("Peru ->", " Lima"), Example("Chile ->", " Santiago")]
    assert predict(model, tokenizer, ["Peru ->"], max_new_tokens=20, end="<stop>") == [" Lima"]
    rows = tokenize(tokenizer, examples, end="<stop>")
    assert evaluate(model, tokenizer, examples, rows, end="<stop>").exact_match == 0.5


def test_what_the_caller_gives_holds():
    tokenizer = tiny.tokenizer()
    ids = [*ids_of(tokenizer, "ab"), 0, *ids_of(tokenizer, "c")]
    model = model_that_says(tokenizer, ids)
    (b,) = ids_of(tokenizer, "b")
    assert predict(model, tokenizer, ["x"], max_new_tokens=9, eos_token_id=b) == ["a"]
    assert end_ids(model, tokenizer, chat=False, configuration=SimpleNamespace(eos_token_id=[b])) == {0, b}


def base_with_chats():
    """A base model's tokenizer: its chat template ends turns with a token that is not the end of its texts."""
    tokenizer = templates.tokenizer(templates.HERMES)
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in ("<|im_start|>", "<|im_end|>")])
    tokenizer.eos_token = "<end>"
    return tokenizer


def test_a_turn_ends_as_the_template_ends_it():
    tokenizer = base_with_chats()
    (mark,) = ids_of(tokenizer, "<|im_end|>")
    assert turn_end(tokenizer) == mark != tokenizer.eos_token_id
    model = model_that_says(tokenizer, ids_of(tokenizer, "Cold.<|im_end|>\n<|im_start|>user\nWhy?"))
    asked = [{"role": "user", "content": "Oslo?"}]
    assert predict(model, tokenizer, [Question(asked)], max_new_tokens=30) == ["Cold."]
    assert predict(model, tokenizer, ["Oslo?"], max_new_tokens=30, chat=True) == ["Cold."]
    assert "Why?" in predict(model, tokenizer, ["Oslo?"], max_new_tokens=30)[0]
    rows = [conversation({"messages": [*asked, {"role": "assistant", "content": said}]}, "here", "field")
            for said in ("Cold.", "Warm, and this is longer than what the model says.")]  # fmt: skip
    assert evaluate(model, tokenizer, rows, tokenize(tokenizer, rows)).exact_match == 0.5


def test_a_tokenizer_without_a_template_or_marks_has_no_turn_end():
    assert turn_end(tiny.tokenizer()) is None
    assert turn_end(templates.tokenizer("{% for m in messages %}{{ m.content }}\n{% endfor %}")) is None


def test_the_end_of_a_sequence_that_is_written_out_closes_a_completion_once():
    tokenizer = tiny.tokenizer()
    plain, written = tokenize(tokenizer, [Example("ab", "cd"), Example("ab", "cd<end>")])
    assert written.completion_ids == plain.completion_ids
    example = Example("ab", "cd<end>")
    model = model_that_says(tokenizer, written.completion_ids)
    assert evaluate(model, tokenizer, [example], [written]).exact_match == 1.0


@pytest.mark.parametrize("end", [None, "\n"])
def test_a_completion_that_goes_on_where_the_model_stops_is_refused(end):
    with pytest.raises(DataError, match=r"line 4: the completion goes on behind '<end>', where the model stops"):
        tokenize(tiny.tokenizer(), [Example("ab", "c<end>d", "line 4")], end=end)


@pytest.mark.parametrize("completion", ["Lima\nPeru", "\nLima", "\n\nLima\n"])
def test_a_completion_that_goes_on_where_answers_are_cut_is_refused(completion):
    """The model would learn all of it and be held against the first piece."""
    with pytest.raises(DataError, match=r"line 4: the completion goes on behind '\\n', where an answer ends"):
        tokenize(tiny.tokenizer(), [Example("ab", completion, "line 4")], end="\n")
    question = Question("ab", example=Example("ab", completion, "line 4"))
    with pytest.raises(DataError, match="where an answer ends"):
        question.expected(tiny.tokenizer(), "\n")
    assert question.expected(tiny.tokenizer()) == completion


def test_a_completion_may_be_closed_more_than_once():
    tokenizer = tiny.tokenizer()
    (row,) = tokenize(tokenizer, [Example("ab", "c\n\n")], end="\n")
    assert row.completion_ids == ids_of(tokenizer, "c\n\n")
    (row,) = tokenize(tokenizer, [Example("ab", "c\nd")], end="")
    assert row.completion_ids == ids_of(tokenizer, "c\nd")


def test_an_answer_is_right_as_the_tokenizer_writes_it():
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    example = Example("Peru ->", " LIMA")
    (row,) = tokenize(tokenizer, [example])
    assert evaluate(model_that_says(tokenizer, row.completion_ids), tokenizer, [example], [row]).exact_match == 1.0
    other = model_that_says(tokenizer, ids_of(tokenizer, " oslo") + [0])
    assert evaluate(other, tokenizer, [example], [row]).exact_match == 0.0


@pytest.mark.parametrize("completion", ["caf\u00e9", "<mark>"])
def test_what_a_tokenizer_cannot_say_is_not_right(completion):
    """Of a character without a token, and of special tokens alone, nothing is left in an answer."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(AddedToken("<mark>", special=True))
    example = Example("Peru ->", completion)
    (row,) = tokenize(tokenizer, [example])
    for said in (row.completion_ids, [0], ids_of(tokenizer, "caf")):
        assert evaluate(model_that_says(tokenizer, said), tokenizer, [example], [row]).exact_match == 0.0
