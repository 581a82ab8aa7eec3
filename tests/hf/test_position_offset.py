"""A prefix that leaves the text at position 0, as in the adapters library, and what turns it into one that does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import prefixcore
from prefixcore import PackedCollator, PrefixTuningConfig
from prefixcore.adapters import AdapterError, read_adapter
from prefixcore.adapters.files import PEFT_FILE
from prefixcore.hf.families import ROTARY
from prefixcore.hf.positions.rotary import turn

from .models import FAMILIES, KNOWN, Tokenizer, make, tokens, window_of

P = 5
ROTARY_FAMILIES = [family for family in FAMILIES if KNOWN[family].positions == ROTARY]
close = {"rtol": 1e-5, "atol": 1e-5}


def attach(model: Any, *, position_offset: bool, seed: int = 0, count: int = P) -> prefixcore.Handle:
    config = PrefixTuningConfig(num_virtual_tokens=count, init="random", seed=seed, position_offset=position_offset)
    return prefixcore.attach(model, config)


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **options).logits


def behind_cache(model: Any, pairs: list[tuple[Tensor, Tensor]], ids: Tensor) -> Tensor:
    """What the bare model computes at positions 0, 1, ... with the prefix in its cache."""
    cache = DynamicCache()
    for layer, (key, value) in enumerate(pairs):
        cache.update(key.expand(len(ids), -1, -1, -1), value.expand(len(ids), -1, -1, -1), layer)
    with torch.no_grad():
        positions = torch.arange(ids.shape[1])[None]
        mask = torch.ones(len(ids), pairs[0][0].shape[1] + ids.shape[1], dtype=torch.long)
        return model(input_ids=ids, past_key_values=cache, position_ids=positions, attention_mask=mask).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_begins_at_position_0(family: str) -> None:
    model, ids = make(family, **window_of(family, 256)), tokens(2, 9)
    with attach(model, position_offset=False) as handle:
        pairs = handle.module.bake()
        got = logits(model, ids)
    torch.testing.assert_close(got, behind_cache(model, pairs, ids), **close)
    with attach(model, position_offset=True):
        assert not torch.allclose(got, logits(model, ids), **close)


class ExactAngles(torch.nn.Module):
    """A rotary embedding whose angles are not rounded to float32, as those of transformers are in any dtype."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.inv_freq, self.scaling = rotary.inv_freq, rotary.attention_scaling
        self.halves = 1 if hasattr(rotary, "inv_freq") and "GptOss" in type(rotary).__name__ else 2

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * self.inv_freq.double()
        angles = torch.cat([angles] * self.halves, -1)
        return (angles.cos() * self.scaling).to(x.dtype), (angles.sin() * self.scaling).to(x.dtype)


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_one_convention_is_the_other_after_a_turn_in_float64(family: str) -> None:
    model = make(family, **window_of(family, 6)).double()
    model.config._experts_implementation = "eager"  # others of gpt-oss have no float64
    model.model.rotary_emb = ExactAngles(model.model.rotary_emb)
    ids, found = tokens(2, 9), []
    pairs = attach(model, position_offset=False)
    prefix = [(key.double(), value.double()) for key, value in pairs.module.bake()]
    pairs.detach()
    for position_offset, values in ((False, prefix), (True, turn(model, prefix, P)), (True, prefix)):
        with attach(model, position_offset=position_offset) as handle:
            handle.module.double()
            with torch.no_grad():
                for layer, (key, value) in zip(handle.module.layers, values, strict=True):
                    layer.key.copy_(key)
                    layer.value.copy_(value)
            found.append(logits(model, ids))
    torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-11)
    assert not torch.allclose(found[2], found[0], rtol=1e-3, atol=1e-3), "without the turn it is another prefix"


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_a_start_from_a_text_has_the_effect_of_the_text(family: str) -> None:
    text, rest = "hello", tokens(2, 7)
    model = make(family)
    ids = torch.tensor([Tokenizer()(text)["input_ids"]])
    expected = logits(model, torch.cat((ids.expand(2, -1), rest), 1))[:, len(text) :]
    with prefixcore.attach(model, PrefixTuningConfig(init_text=text, position_offset=False), tokenizer=Tokenizer()):
        torch.testing.assert_close(logits(model, rest), expected, **close)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_packing_and_generate(family: str) -> None:
    model = make(family)
    rows = [tokens(1, length, seed=length)[0].tolist() for length in (3, 6)]
    with attach(model, position_offset=False):
        alone = [logits(model, torch.tensor([row]))[0] for row in rows]
        written = [_greedy(model, torch.tensor([row])) for row in rows]
        ids = torch.tensor([[0, 0, 0, *rows[0]], rows[1]])
        mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
        padded = logits(model, ids, attention_mask=mask)
        torch.testing.assert_close(padded[0, 3:], alone[0], **close)
        torch.testing.assert_close(padded[1], alone[1], **close)
        both = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert [row[6:] for row in both.tolist()] == written
        batch = PackedCollator()([{"input_ids": row, "labels": row} for row in rows])
        batch.pop("labels")
        batch.pop("logits_to_keep", None)
        torch.testing.assert_close(
            logits(model, **{"ids": batch.pop("input_ids"), **batch})[0], torch.cat(alone), **close
        )


def _greedy(model: Any, ids: Tensor) -> list[int]:
    found = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    return found[0, ids.shape[1] :].tolist()


def test_rows_of_a_bank_may_be_of_either_convention(tmp_path: Path) -> None:
    model, ids = make("llama"), tokens(3, 6)
    expected = []
    for name, position_offset in (("p", True), ("zero", False)):
        with attach(model, position_offset=position_offset, seed=len(name), count=len(name) + 2) as handle:
            handle.save(tmp_path / name)
            expected.append((logits(model, ids), _greedy(model, ids[:1])))
    bank = prefixcore.PromptBank(model)
    for name in ("p", "zero"):
        bank.load(name, tmp_path / name)
    got = logits(model, ids, task_ids=["p", "zero", None])
    torch.testing.assert_close(got[:2], torch.stack((expected[0][0][0], expected[1][0][1])), **close)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    written = model.generate(ids[:1].expand(2, -1), task_ids=["p", "zero"], **options)[:, 6:]
    assert written.tolist() == [expected[0][1], expected[1][1]]


def test_learned_positions_are_all_left_to_the_text(tmp_path: Path) -> None:
    gpt2, ids = make("gpt2"), tokens(1, 60)  # which has 64
    with attach(gpt2, position_offset=True), pytest.raises(ValueError, match="64 positions, but this input needs 65"):
        logits(gpt2, ids)
    with attach(gpt2, position_offset=False, count=80) as handle:
        pairs, expected = handle.module.bake(), logits(gpt2, ids)
        handle.save(tmp_path / "gpt2")
    torch.testing.assert_close(expected, behind_cache(gpt2, pairs, ids), **close)
    bank = prefixcore.PromptBank(gpt2)
    bank.load("gpt2", tmp_path / "gpt2")
    torch.testing.assert_close(logits(gpt2, ids, task_ids="gpt2"), expected, **close)
    bank.detach()
    with pytest.raises(AdapterError, match="GPT2LMHeadModel has learned positions: keys cannot be moved"):
        prefixcore.bake(gpt2, tmp_path / "gpt2", tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


def test_an_adapter_keeps_its_convention_and_peft_cannot_hold_it(tmp_path: Path) -> None:
    model, ids = make("llama"), tokens(2, 6)
    with attach(model, position_offset=False) as handle:
        folder, expected = handle.save(tmp_path / "zero"), logits(model, ids)
    adapter = read_adapter(folder)
    assert adapter.config.position_offset is False
    assert adapter.peft_config is None
    assert not (folder / PEFT_FILE).exists()
    with prefixcore.load(model, folder) as handle:
        assert handle.config.position_offset is False
        torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=0)
    with pytest.raises(AdapterError, match="with position_offset=False"):
        prefixcore.export_adapter(folder, "peft", tmp_path / "peft")
    with pytest.raises(AdapterError, match="begins at position 0, where the format has it at P: give the model"):
        prefixcore.export_adapter(folder, "cartridges", tmp_path / "c.pt")
    prefixcore.export_adapter(folder, "cartridges", tmp_path / "c.pt", model=model)
    prefixcore.import_adapter(tmp_path / "c.pt", "cartridges", tmp_path / "back", model=model)
    with prefixcore.load(model, tmp_path / "back"):
        torch.testing.assert_close(logits(model, ids), expected, **close)


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_bake_turns_an_adapter_to_either_convention(family: str, tmp_path: Path) -> None:
    model, ids = make(family, **window_of(family, 256)), tokens(2, 6)
    with attach(model, position_offset=False) as handle:
        handle.save(tmp_path / "zero")
        expected = logits(model, ids)
    prefixcore.bake(model, tmp_path / "zero", tmp_path / "p")
    prefixcore.bake(model, tmp_path / "p", tmp_path / "again", position_offset=False)
    assert read_adapter(tmp_path / "p").peft_config is not None
    assert read_adapter(tmp_path / "again").config.position_offset is False
    for name in ("p", "again"):
        with prefixcore.load(model, tmp_path / name):
            torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
    before, after = (read_adapter(tmp_path / name).tensors for name in ("zero", "again"))
    for pair, other in zip(before, after, strict=True):
        torch.testing.assert_close(other, pair, atol=1e-6, rtol=0)


def test_it_is_true_or_false() -> None:
    with pytest.raises(ValueError, match="position_offset must be True or False, got 0"):
        PrefixTuningConfig(num_virtual_tokens=2, position_offset=0)


def test_virtual_tokens_that_take_no_position_are_not_to_blame_for_a_long_text() -> None:
    model = make("gpt2")
    attach(model, position_offset=False, count=70)
    assert logits(model, tokens(1, 64)).shape[1] == 64
    with pytest.raises(ValueError, match="shorten the input to at most 64 tokens$"):
        logits(model, tokens(1, 65))
