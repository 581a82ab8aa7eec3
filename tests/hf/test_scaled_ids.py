"""Soft prompts before stacks that multiply the embeddings of ids alone (`scale_embedding`)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import prefixcore
from prefixcore import AdapterError, MultitaskPromptTuningConfig, PromptTuningConfig, PTuningConfig
from prefixcore.adapters.scaled_ids import reads_scaled_ids

from .encoder_decoders import GREEDY, inputs, labels, make

P = 3
ALONE = ["marian", "pegasus"]
BY_TABLE = ["bart", "mbart", "m2m_100"]

pytestmark = pytest.mark.filterwarnings("ignore")


def scaled(family: str) -> Any:
    return make(family, scale_embedding=True)


def small(name: str) -> Any:
    """A model of BART's kin with `scale_embedding`."""
    config = getattr(transformers, re.sub("(For|MTModel|Model).*", "Config", name))
    torch.manual_seed(0)
    return getattr(transformers, name)(
        config(
            vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=64,
            scale_embedding=True, init_std=0.2, pad_token_id=0, decoder_start_token_id=0,
        )
    ).eval()  # fmt: skip


def of_text(model: Any, ids: Tensor) -> Any:
    """A handle on a soft prompt of the embeddings that a text has."""
    with torch.no_grad():
        rows = model.get_input_embeddings()(ids)
    return prefixcore.attach(model, PromptTuningConfig(num_virtual_tokens=len(ids), init=rows))


@pytest.mark.parametrize("family", ALONE + BY_TABLE)
def test_it_acts_as_the_text(family: str) -> None:
    model, batch, text = scaled(family), inputs(family), torch.tensor([5, 9, 13])
    longer = {
        "input_ids": torch.cat((text.expand(2, -1), batch["input_ids"]), 1),
        "attention_mask": torch.cat((torch.ones(2, P, dtype=torch.long), batch["attention_mask"]), 1),
    }
    expected, written = model(**longer, labels=labels()), model.generate(**longer, **GREEDY, num_beams=2)
    bare = model(**batch, labels=labels())
    of_text(model, text)
    got = model(**batch, labels=labels())
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(got.loss, expected.loss)
    assert not torch.allclose(got.logits, bare.logits, atol=1e-2)
    assert torch.equal(model.generate(**batch, **GREEDY, num_beams=2), written)


@pytest.mark.parametrize("family", ALONE)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(family: str, checkpointing: bool) -> None:
    """In float64, beside embeddings that are multiplied by hand."""
    model = scaled(family).double()
    batch, factor = inputs(family), model.get_encoder().embed_scale
    handle = prefixcore.attach(model, PTuningConfig(num_virtual_tokens=P, encoder_hidden_size=16))
    handle.module.double()
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch, labels=labels()).loss.backward()
    got = [parameter.grad.clone() for parameter in handle.parameters()]
    handle.module.zero_grad()
    virtual = handle.module().expand(2, -1, -1)
    text = model.get_input_embeddings()(batch["input_ids"])
    mask = torch.cat((torch.ones(2, P, dtype=torch.long), batch["attention_mask"]), 1)
    handle.detach()
    model(inputs_embeds=torch.cat((virtual, text), 1) * factor, attention_mask=mask, labels=labels()).loss.backward()
    for mine, parameter in zip(got, handle.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)


@pytest.mark.parametrize("family", ALONE)
def test_files_are_ours_alone(family: str, tmp_path: Path) -> None:
    """PEFT would put the prompt before another text."""
    model, batch = scaled(family), inputs(family)
    handle = prefixcore.attach(model, PromptTuningConfig(num_virtual_tokens=P, init="random", seed=3))
    expected = model(**batch, labels=labels()).logits
    handle.save(tmp_path / "prompt")
    handle.detach()
    assert not (tmp_path / "prompt" / "adapter_config.json").exists()
    for trainable in (False, True):
        with prefixcore.load(model, tmp_path / "prompt", trainable=trainable):
            assert torch.equal(model(**batch, labels=labels()).logits, expected)
    # The same weights without the factor: the files are good for it, and are PEFT's too once they are saved.
    plain = make(family)
    with prefixcore.load(plain, tmp_path / "prompt") as loaded:
        loaded.save(tmp_path / "plain")
    assert (tmp_path / "plain" / "adapter_config.json").exists()


def test_what_peft_has_trained_is_refused_and_accelerated(tmp_path: Path) -> None:
    import peft

    model, batch = scaled("marian"), inputs("marian")
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    peft_model = peft.get_peft_model(model, config)
    expected = peft_model(**batch, labels=labels()).logits
    peft_model.save_pretrained(tmp_path / "peft")
    with prefixcore.accelerate(peft_model):
        assert torch.allclose(peft_model(**batch, labels=labels()).logits, expected, atol=1e-5)
    with pytest.raises(AdapterError, match=r"without the factor .*prefixcore\.accelerate"):
        prefixcore.load(scaled("marian"), tmp_path / "peft")
    with prefixcore.load(make("marian"), tmp_path / "peft"):
        pass


def test_a_bank_gives_each_row_its_own() -> None:
    model, batch = scaled("marian"), inputs("marian")
    bank = prefixcore.PromptBank(model)
    for name, tokens in (("one", 3), ("other", 3)):
        bank.attach(name, PromptTuningConfig(num_virtual_tokens=tokens, init="random", seed=len(name)))
    got = model(**batch, labels=labels(), task_ids=["one", "other"]).logits
    for row, name in enumerate(("one", "other")):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        expected = model(**alone, labels=labels()[row : row + 1], task_ids=[name]).logits
        torch.testing.assert_close(got[row : row + 1], expected, atol=1e-4, rtol=1e-4)


def test_refused() -> None:
    model, batch = scaled("marian"), inputs("marian")
    with pytest.raises(NotImplementedError, match="train a soft prompt for each task"):
        prefixcore.attach(model, MultitaskPromptTuningConfig(num_virtual_tokens=P, num_tasks=2))
    prefixcore.attach(model, PromptTuningConfig(num_virtual_tokens=P))
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(NotImplementedError, match="needs input_ids, but was given inputs_embeds alone"):
        model(inputs_embeds=embeds, labels=labels())


@pytest.mark.parametrize(
    "name", ["BlenderbotSmallForConditionalGeneration", "MvpForConditionalGeneration"]
)  # which are compared with the text when a prompt is attached
def test_other_families(name: str) -> None:
    prefixcore.attach(small(name), PromptTuningConfig(num_virtual_tokens=P)).detach()


def test_an_encoder_that_multiplies_all_embeddings_is_none_of_these(tmp_path: Path) -> None:
    """FSMT's: what PEFT trains there is right, and is refused for the reason that there is."""
    import peft

    sizes = {f"{stack}_{name}": size for stack in ("encoder", "decoder")
             for name, size in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 40))}  # fmt: skip
    config = transformers.FSMTConfig(
        langs=["en", "de"], src_vocab_size=97, tgt_vocab_size=97, d_model=32, scale_embedding=True, **sizes
    )
    model = transformers.FSMTForConditionalGeneration(config).eval()
    assert model.get_encoder().embed_scale > 1
    prompt = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    peft_model = peft.get_peft_model(model, prompt)
    peft_model.save_pretrained(tmp_path)
    assert "scales_ids" not in prefixcore.adapters.fingerprint(peft_model.base_model)
    with pytest.raises(NotImplementedError, match="does not say which two models inside it encode and decode"):
        prefixcore.load(peft_model.base_model, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        *(f"{kind}ForCausalLM" for kind in ("Bart", "BlenderbotSmall", "Marian", "Mvp", "Pegasus")),
        *(f"{kind}Model" for kind in ("Bart", "BlenderbotSmall", "Marian", "Mvp", "Pegasus", "PegasusX")),
    ],
)
def test_it_is_seen_from_what_the_model_does(name: str) -> None:
    """Given embeddings of ids, a model answers as to the ids, unless it multiplies those of ids alone."""
    model, ids = small(name), torch.tensor([[5, 9, 13]])
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        by_ids = model(input_ids=ids, **more)[0]
        by_embeddings = model(inputs_embeds=model.get_input_embeddings()(ids), **more)[0]
    assert reads_scaled_ids(model) is not torch.allclose(by_ids, by_embeddings, atol=1e-4)


def test_a_decoder_that_multiplies_ids_alone(tmp_path: Path) -> None:
    import peft

    model, ids, text = small("MvpForCausalLM"), torch.tensor([[5, 9, 13]]), torch.tensor([7, 4, 21])
    expected = model(input_ids=torch.cat((text[None], ids), 1)).logits[:, P:]
    handle = of_text(model, text)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    handle.save(tmp_path / "prompt")
    handle.detach()
    assert not (tmp_path / "prompt" / "adapter_config.json").exists()
    with prefixcore.load(small("MvpForCausalLM"), tmp_path / "prompt") as loaded:
        torch.testing.assert_close(loaded.model(input_ids=ids).logits, expected)
    peft_model = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    peft_model.save_pretrained(tmp_path / "peft")
    with pytest.raises(AdapterError, match="without the factor"):
        prefixcore.load(small("MvpForCausalLM"), tmp_path / "peft")
    expected = peft_model(input_ids=ids, labels=ids).logits
    with prefixcore.accelerate(peft_model):
        torch.testing.assert_close(peft_model(input_ids=ids, labels=ids).logits, expected)
