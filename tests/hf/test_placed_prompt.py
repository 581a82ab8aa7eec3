"""Virtual tokens anywhere in the text: special ids stand for them, and nothing is inserted."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import prefixcore
from prefixcore import PromptBank, PromptTuningConfig, PTuningConfig
from prefixcore.__main__ import main
from prefixcore.adapters import AdapterError, read_adapter
from prefixcore.adapters.files import MANIFEST_FILE, MODEL_FILE, PEFT_FILE
from tests import tiny

from .models import FAMILIES, VOCABULARY, make, padded, tokens

WORDS = [11, 22, 33]
"""Ids whose embeddings the prompt has, so that the text with them in place says what to expect."""


def prompt(model: Any) -> torch.Tensor:
    return model.get_input_embeddings()(torch.tensor(WORDS)).detach().float()


def template(special: Any, ids: torch.Tensor) -> torch.Tensor:
    """[B, T] with the virtual tokens at the places 1, 2 and 5."""
    each = [special] * 3 if isinstance(special, int) else special
    out = ids.clone()
    for place, word in zip((1, 2, 5), each, strict=True):
        out[:, place] = word
    return out


SPECIALS = [VOCABULARY + 5, [VOCABULARY, VOCABULARY + 1, 4], 4]


@pytest.mark.parametrize("special", SPECIALS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_text_with_the_words_in_place(family: str, special: Any) -> None:
    model, ids = make(family), tokens(2, 8).clamp(min=5)
    whole = template(WORDS, ids)
    labels = whole.clone()
    labels[:, [1, 2, 5]] = -100
    expected = model(whole, labels=labels)
    generated = model.generate(whole, max_new_tokens=6, do_sample=False, eos_token_id=None)
    handle = prefixcore.attach(model, PromptTuningConfig(init=prompt(model), virtual_token_ids=special))
    batch = template(special, ids)
    out = model(batch, labels=batch.clamp(max=VOCABULARY - 1))
    assert out.logits.shape == expected.logits.shape
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-5)
    out.loss.backward()
    assert all(row.abs().max() > 0 for row in handle.module.embedding.grad)
    for way in ({}, {"cache_implementation": "static"}, {"num_beams": 2}, {"use_cache": False}):
        got = model.generate(batch, max_new_tokens=6, do_sample=False, eos_token_id=None, **way)
        if way != {"num_beams": 2}:
            assert torch.equal(got[:, 8:], generated[:, 8:])


def test_padding_a_bank_and_a_cache() -> None:
    model = make("llama")
    batch = padded("left")
    bank = PromptBank(model)
    bank.attach("placed", PromptTuningConfig(init=prompt(model), virtual_token_ids=[97, 98, 99]))
    bank.attach("before", PromptTuningConfig(4, init="random", seed=1))
    bank.attach("prefix", prefixcore.PrefixTuningConfig(4, init="random", seed=1))
    names = ["placed", "before", "prefix"]
    batch["input_ids"][0, [1, 4, 5]] = torch.tensor([98, 97, 99])  # in any order
    with torch.no_grad():
        out = model(batch["input_ids"], attention_mask=batch["attention_mask"], task_ids=names, use_cache=True)
        for row, name in enumerate(names):
            seen = batch["attention_mask"][row].bool()
            alone = model(batch["input_ids"][row : row + 1, seen], task_ids=[name]).logits[0]
            torch.testing.assert_close(out.logits[row, seen], alone, rtol=2e-5, atol=2e-5)
        got = model.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], task_ids=names, max_new_tokens=4,
            do_sample=False, eos_token_id=None,
        )  # fmt: skip
        for row, name in enumerate(names):
            text = batch["input_ids"][row : row + 1, batch["attention_mask"][row].bool()]
            alone = model.generate(text, task_ids=[name], max_new_tokens=4, do_sample=False, eos_token_id=None)
            assert torch.equal(got[row, 9:], alone[0, text.shape[1] :])
        with pytest.raises(ValueError, match="behind other virtual tokens"):
            model(tokens(3, 1), past_key_values=copy.deepcopy(out.past_key_values), task_ids="placed")


def test_no_files_are_written_that_peft_would_read_as_a_prompt_before_the_text(tmp_path: Any, capsys: Any) -> None:
    model, ids = make("llama"), tokens(2, 8).clamp(min=5)
    config = PromptTuningConfig(init=prompt(model), virtual_token_ids=[97, 98, 99])
    with prefixcore.attach(model, config) as handle:
        expected = model(template([97, 98, 99], ids)).logits
        folder = handle.save(tmp_path / "adapter")
    assert {path.name for path in folder.iterdir()} == {MODEL_FILE, MANIFEST_FILE}
    assert load_file(folder / MODEL_FILE)["prompt_embeddings"].shape == (3, 32)
    with pytest.raises(ValueError, match=PEFT_FILE):
        PeftModel.from_pretrained(copy.deepcopy(model), folder)
    adapter = read_adapter(folder)
    assert adapter.peft_config is None
    assert isinstance(adapter.tensors, torch.Tensor)
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "in the text, in place of virtual_token_ids, hidden size 32" in shown
    assert "PEFT cannot hold it" in shown
    with prefixcore.load(model, folder, trainable=True) as handle:
        assert torch.equal(model(template([97, 98, 99], ids)).logits, expected)
        again = handle.save(tmp_path / "again")
    assert not (again / PEFT_FILE).exists()
    with prefixcore.attach(model, PromptTuningConfig(init=prompt(model))) as handle:
        assert "hidden_size" not in json.loads((handle.save(tmp_path / "before") / MANIFEST_FILE).read_text())


@pytest.mark.parametrize("size", [0, -1, True, "32", None, 2**63, 31, "missing"], ids=str)
def test_the_width_that_a_manifest_states_is_checked(tmp_path: Any, size: Any) -> None:
    model = make("llama")
    with prefixcore.attach(model, PromptTuningConfig(init=prompt(model), virtual_token_ids=4)) as handle:
        folder = handle.save(tmp_path / "adapter")
    fields = json.loads((folder / MANIFEST_FILE).read_text())
    fields["hidden_size"] = size
    if size == "missing":
        del fields["hidden_size"]
    (folder / MANIFEST_FILE).write_text(json.dumps(fields))
    with pytest.raises(AdapterError, match="prompt_embeddings: .*31" if size == 31 else "hidden_size: expected"):
        prefixcore.load(model, folder)


def test_a_manifest_that_lets_peft_read_it_is_refused(tmp_path: Any) -> None:
    model = make("llama")
    with prefixcore.attach(model, PromptTuningConfig(init=prompt(model))) as handle:
        folder = handle.save(tmp_path / "adapter")
    plain = json.loads((folder / MANIFEST_FILE).read_text())
    placed = {**plain, "config": {**plain["config"], "virtual_token_ids": [97, 98, 99]}}
    for fields, message in (
        (placed, "peft_type: expected none, got 'PROMPT_TUNING'.*virtual_token_ids"),
        ({**plain, "hidden_size": 32}, "hidden_size: expected none"),
    ):
        (folder / MANIFEST_FILE).write_text(json.dumps(fields))
        with pytest.raises(AdapterError, match=message):
            prefixcore.load(model, folder)


def test_one_of_another_width_is_another_models(tmp_path: Any) -> None:
    model = make("llama")
    with prefixcore.attach(model, PromptTuningConfig(init=prompt(model), virtual_token_ids=4)) as handle:
        folder = handle.save(tmp_path / "adapter")
    other = make("llama", hidden_size=64)
    with (
        pytest.warns(UserWarning, match="all the same"),
        pytest.raises(AdapterError, match="have 32 numbers, but .* have 64"),
    ):
        prefixcore.load(other, folder, strict=False)


@pytest.mark.parametrize("cls", [PromptTuningConfig, PTuningConfig])
def test_a_tokenizers_own_special_tokens(tmp_path: Any, cls: Any) -> None:
    tokenizer, model = tiny.tokenizer(), tiny.model()
    names = [f"<v{i}>" for i in range(3)]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    special = tokenizer.convert_tokens_to_ids(names)
    assert min(special) >= model.config.vocab_size  # they need no row in the model's table
    ids = torch.tensor([tokenizer("The <v0><v1> of France is <v2> ")["input_ids"]])
    assert all(int((ids == each).sum()) == 1 for each in special)
    with prefixcore.attach(
        model, cls(3, init="vocab", seed=0, virtual_token_ids=special), tokenizer=tokenizer
    ) as handle:
        expected = model(ids).logits
        assert expected.shape[1] == ids.shape[1]
        folder = handle.save(tmp_path / "adapter")
    with prefixcore.load(tiny.model(), folder) as handle:
        torch.testing.assert_close(handle.model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_save_and_load(tmp_path: Any) -> None:
    model, ids = make("llama"), tokens(2, 8).clamp(min=5)
    batch = template([97, 98, 99], ids)
    config = PTuningConfig(3, init="random", virtual_token_ids=[97, 98, 99], seed=0)
    with prefixcore.attach(model, config) as handle:
        expected = model(batch).logits
        handle.save(tmp_path / "adapter")
    for trainable in (False, True):
        with prefixcore.load(model, tmp_path / "adapter", trainable=trainable) as handle:
            assert handle.config.virtual_token_ids == [97, 98, 99]
            torch.testing.assert_close(model(batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_what_is_refused() -> None:
    model, ids = make("llama"), tokens(2, 8).clamp(min=5)
    for config, message in (
        ({"virtual_token_ids": [1, 2]}, "holds 2 ids for 3 virtual tokens"),
        ({"virtual_token_ids": [1, 1, 2]}, "a list of different ones"),
        ({"virtual_token_ids": -1}, "must be a token id"),
        ({"virtual_token_ids": "x"}, "must be a token id"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptTuningConfig(3, **config)
    prefixcore.attach(model, PromptTuningConfig(3, virtual_token_ids=4))
    with pytest.raises(ValueError, match="row 0 must hold the id 4 of its virtual tokens 3 times, got 0"):
        model(ids)
    batch = template(4, ids)
    batch[1, 5] = 7
    with pytest.raises(ValueError, match="row 1 must hold the id 4 .* got 2"):
        model(batch)
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    cache = model(template(4, ids), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="in a later part of a sequence"):
        model(torch.full((2, 1), 4), past_key_values=cache)
    batch = template(4, ids)
    batch[0, 0] = VOCABULARY
    with pytest.raises(IndexError, match=f"0 to {VOCABULARY - 1}"):
        model(batch)
