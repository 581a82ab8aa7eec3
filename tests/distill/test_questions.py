"""Prompts that the model asks itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefixcore.distill import DistillOptions
from prefixcore.distill import questions as module
from prefixcore.distill.questions import SelfStudy, chunks_of, cut_somewhere, listed
from prefixcore.distill.store import Store
from tests.distill.conftest import TEXT
from tests.distill.test_front import CHAT


def study(model, tokenizer, folder=None, **options):
    options = DistillOptions(num_virtual_tokens=4, questions=40, **options)
    return SelfStudy(model, tokenizer, TEXT, "digest", 0, options, Store(folder))


@pytest.mark.parametrize("chat", [False, True])
def test_they_are_different_and_the_same_by_seed(model, tokenizer, chat):
    tokenizer.chat_template = CHAT
    found = study(model, tokenizer, chat=chat).prompts()
    assert len({prompt.text for prompt in found}) == len(found) == 40
    assert all(prompt.text.strip() for prompt in found)
    assert study(model, tokenizer, chat=chat).prompts() == found
    assert study(model, tokenizer, chat=chat, seed=1).prompts() != found


def test_they_are_kept(model, tokenizer, tmp_path: Path, monkeypatch):
    found = study(model, tokenizer, tmp_path).prompts()
    monkeypatch.setattr(module, "answer", lambda *args, **options: pytest.fail("asked again"))
    assert study(model, tokenizer, tmp_path).prompts() == found


def test_parts_of_the_text_end_where_lines_do(tokenizer):
    parts = chunks_of(tokenizer, TEXT, 32)
    assert "".join(parts) == TEXT
    assert parts == ["France -> Paris\nJapan -> Tokyo\n", "Peru -> Lima\n"]


@pytest.mark.parametrize("parts", range(1, 8))
def test_each_part_meets_each_kind(model, tokenizer, monkeypatch, parts: int):
    met = set()
    monkeypatch.setattr(module, "chunks_of", lambda *_: [str(part) for part in range(parts)])
    monkeypatch.setattr(SelfStudy, "_round", lambda self, kind, chunk, seed: met.add((kind.__name__, chunk)) or [])
    options = DistillOptions(num_virtual_tokens=4, questions=32 * parts)
    SelfStudy(model, tokenizer, TEXT, "digest", 0, options, Store(None)).prompts()
    assert met == {(kind, str(part)) for kind in ("_questions", "_lines", "_quotes") for part in range(parts)}


@pytest.mark.parametrize(
    ("said", "questions"),
    [
        (" Who built it?\n2. When was it built?\n3. Where", ["Who built it?", "When was it built?"]),
        ("1) Who? Nobody.\n- Why not ?\n\n* How?", ["Who?", "Why not?", "How?"]),
        ("It has none.\n?\n2. ?", []),
        (" " * 10_000 + "a", []),  # in a time that grows with its length alone
        ("", []),
    ],
    ids=range(5),
)
def test_questions_of_a_list(said: str, questions: list[str]):
    assert listed(said) == questions


def test_questions_are_asked_for_by_the_template_of_the_model(model, tokenizer):
    def asks() -> str:
        return tokenizer.decode(study(model, tokenizer)._list_front("A part.\n"))

    plain = asks()
    assert plain.endswith("A part.\n\nQuestions about this text:\n")
    tokenizer.chat_template = CHAT
    assert asks() == tokenizer.apply_chat_template(
        [{"role": "user", "content": f"A part.\n\n{module.LIST_REQUEST}"}], tokenize=False, add_generation_prompt=True
    )
    tokenizer.chat_template = "{{ raise_exception('tools only') }}"
    assert asks() == plain


def test_lines_are_cut_and_never_whole(tokenizer):
    found = cut_somewhere(tokenizer, ["abcdef", "x", "abc"], seed=0)
    assert len(found) == 2
    assert all("abcdef".startswith(each) and len(each) < 6 for each in found)


def test_questions_of_another_text_with_the_same_part_are_not_taken(model, tokenizer, tmp_path: Path):
    """A question begins with a line break where the text does not end with one, whichever part it is about."""
    options = DistillOptions(num_virtual_tokens=4, questions=40, chunk_tokens=32)
    texts = (TEXT, TEXT.rstrip("\n"))

    def prompts(text, folder):
        return SelfStudy(model, tokenizer, text, "digest", 0, options, Store(folder)).prompts()

    assert chunks_of(tokenizer, texts[0], 32)[0] == chunks_of(tokenizer, texts[1], 32)[0]
    expected = [prompts(text, None) for text in texts]
    assert [prompts(text, tmp_path) for text in texts] == expected
