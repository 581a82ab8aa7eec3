"""`bake` of a text: its prefix acts as the text does before the input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import prefixcore
from prefixcore.adapters import AdapterError, read_record
from tests import tiny
from tests.formats.outputs import with_adapter

from .baked import wide
from .models import make


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_a_text(family: str, tmp_path: Path) -> None:
    """Its prefix acts as the text before the input does."""
    model, tokenizer = make(family, vocab_size=len(tiny.tokenizer()), **wide(family)), tiny.tokenizer()
    text = "Say it: "
    baked = prefixcore.bake(model, None, tmp_path / "baked", text=text, tokenizer=tokenizer, inputs=["a ->", "b"])
    assert (baked.num_virtual_tokens, baked.method, baked.comparison.num_inputs) == (len(text), "text", 2)
    both = tokenizer(text + "what now", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=both).logits[:, len(text) :]
    got = with_adapter(model, tmp_path / "baked", both[:, len(text) :])
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    facts = read_record(tmp_path / "baked")["baked_from"]
    assert (facts["method"], facts["text"], facts["bos"]) == ("text", text, False)


def test_the_token_that_begins_a_text_is_asked_for(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = tiny.model(), tiny.tokenizer()
    tokenizer.bos_token = "<end>"
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    assert tokenizer("a")["input_ids"][0] == 0
    with pytest.raises(AdapterError, match=r"begins every text with '<end>': say whether .* --bos: requests must then"):
        prefixcore.bake(model, None, tmp_path / "baked", text="ab", tokenizer=tokenizer)
    assert not (tmp_path / "baked").exists()
    plain = tokenizer("cd", add_special_tokens=False, return_tensors="pt")["input_ids"]
    for bos, begin in ((True, tokenizer("ab")["input_ids"]), (False, tokenizer("ab")["input_ids"][1:])):
        prefixcore.bake(model, None, tmp_path / "baked", text="ab", tokenizer=tokenizer, bos=bos)
        both = torch.cat((torch.tensor([begin]), plain), 1)
        with torch.no_grad():
            expected = model(input_ids=both).logits[:, len(begin) :]
        torch.testing.assert_close(with_adapter(model, tmp_path / "baked", plain), expected, atol=2e-5, rtol=0)


def test_a_tokenizer_that_merges_text_and_request_is_named(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.BPE(vocab={"<end>": 0, "a": 1, "b": 2, "ab": 3, "c": 4}, merges=[("a", "b")]))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    with pytest.warns(UserWarning, match="merges the end of the text with the beginning of 'bc'"):
        prefixcore.bake(tiny.model(), None, tmp_path / "x", text="ca", tokenizer=tokenizer, inputs=["cb", "bc"])


def test_a_tokenizer_without_such_a_token(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no token that begins a text"):
        prefixcore.bake(tiny.model(), None, tmp_path / "x", text="ab", tokenizer=tiny.tokenizer(), bos=True)
    with pytest.raises(AdapterError, match="expected one with tokens"):
        prefixcore.bake(tiny.model(), None, tmp_path / "x", text="", tokenizer=tiny.tokenizer())
    with pytest.raises(AdapterError, match="another model's tokenizer"):
        prefixcore.bake(make("llama", vocab_size=50), None, tmp_path / "x", text="zz", tokenizer=tiny.tokenizer())
