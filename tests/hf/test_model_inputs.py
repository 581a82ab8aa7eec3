"""Soft prompts on models that want more of a token than its embedding: where images stand, its type, its id."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import prefixcore
from prefixcore import PromptTuningConfig, PTuningConfig

from .models import make, padded
from .vision_language import gemma3, image_batch, paligemma, qwen, qwen_batch

P = 3
TEXT = torch.tensor([17, 40, 63])
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}

pytestmark = pytest.mark.filterwarnings("ignore:.*not among the families")


def prompt_of(model: Any, ids: Tensor) -> Tensor:
    """The embeddings of a text."""
    return model.get_input_embeddings()(ids).detach()


def attach(model: Any, ids: Tensor = TEXT) -> Any:
    return prefixcore.attach(model, PromptTuningConfig(init=prompt_of(model, ids)))


@pytest.mark.parametrize("version", ["Qwen2VL", "Qwen2_5_VL"])
@pytest.mark.parametrize("images", [True, False], ids=["images", "text"])
@pytest.mark.parametrize("padding", [0, 2])
def test_positions_of_three_axes(version: str, images: bool, padding: int) -> None:
    """In a forward, with and without a cache, and in generate: as the model reads the text itself."""
    model = qwen(version)
    longer, batch = qwen_batch(padding, images, TEXT), qwen_batch(padding, images)
    generated = model.generate(**longer, **GREEDY)[:, -4:]
    beams = model.generate(**longer, **GREEDY, num_beams=2)[:, -4:]
    expected = model(**longer).logits
    handle = attach(model)
    got = model(**batch).logits  # after a generate, which leaves positions behind in the model
    seen = batch["attention_mask"].bool()
    for row in range(2):
        first = int((batch["attention_mask"][row] == 0).sum())
        torch.testing.assert_close(got[row, first:], expected[row, first + P :], rtol=1e-4, atol=1e-4)
    assert seen.any()
    assert torch.equal(model.generate(**batch, **GREEDY)[:, -4:], generated)
    assert torch.equal(model.generate(**batch, **GREEDY, num_beams=2)[:, -4:], beams)
    handle.detach()


def test_a_backward_through_positions_of_three_axes() -> None:
    """After a step of training, too, when the embeddings belong to no token: as the embeddings put in by hand."""
    model = qwen("Qwen2_5_VL")
    handle = attach(model)
    batch, longer = qwen_batch(), qwen_batch(text=TEXT)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    prompt, got = handle.bake(), model(**batch).logits
    assert not torch.allclose(prompt, prompt_of(model, TEXT), atol=0.05)
    handle.detach()
    model.get_input_embeddings().weight.data[TEXT] = prompt  # ids of the text that now mean the prompt
    longer["input_ids"][:, P:][torch.isin(longer["input_ids"][:, P:], TEXT)] = 5
    assert not torch.isin(batch["input_ids"], TEXT).any()
    torch.testing.assert_close(got, model(**longer).logits[:, P:], rtol=1e-4, atol=1e-4)


def test_positions_from_one() -> None:
    model = paligemma()
    longer, batch = image_batch(TEXT), image_batch()
    expected, generated = model(**longer).logits[:, P:], model.generate(**longer, **GREEDY)[:, -4:]
    attach(model)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(**batch, **GREEDY)[:, -4:], generated)


@pytest.mark.parametrize("image_first", [False, True])
def test_virtual_tokens_are_of_the_type_of_text(image_first: bool) -> None:
    """Also where an image begins the row: else they would see what the image does."""
    model = gemma3()
    longer, batch = image_batch(TEXT, image_first), image_batch(None, image_first)
    for each in longer, batch:
        each["token_type_ids"] = (each["input_ids"] == 90).long()
    expected = model(**longer).logits[:, P:]
    as_image = longer["token_type_ids"].clone()
    as_image[:, :P] = 1
    assert not torch.allclose(model(**{**longer, "token_type_ids": as_image}).logits[:, P:], expected, atol=1e-3)
    generated = model.generate(**longer, **GREEDY)[:, -4:]
    attach(model)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(**batch, **GREEDY)[:, -4:], generated)


def _gemma4() -> Any:
    torch.manual_seed(0)
    config = transformers.Gemma4TextConfig(
        vocab_size=97,
        vocab_size_per_layer_input=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=64,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return transformers.Gemma4ForCausalLM(config).eval()


def test_embeddings_of_each_layer() -> None:
    """Virtual tokens have those of the padding token, and nothing is looked up backwards."""
    model = _gemma4()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    values = torch.randn(P, 32, generator=torch.Generator().manual_seed(5))
    whole = torch.cat((torch.zeros(2, P, dtype=torch.long), ids), 1)
    embeds = torch.cat((values.expand(2, -1, -1), prompt_of(model, ids)), 1)
    layers = model.model.get_per_layer_inputs(whole, None)
    expected = model(inputs_embeds=embeds, per_layer_inputs=layers).logits[:, P:]

    def look_up(ids: Tensor | None, embeds: Tensor | None = None) -> Tensor:
        assert ids is not None, "looked up backwards"
        return original(ids, embeds)

    original, model.model.get_per_layer_inputs = model.model.get_per_layer_inputs, look_up
    handle = prefixcore.attach(model, PromptTuningConfig(init=values))
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert model.generate(ids, **GREEDY).shape == (2, 8)
    with pytest.raises(NotImplementedError, match="needs input_ids"):
        model(inputs_embeds=prompt_of(model, ids))


def _with_head(kind: str) -> Any:
    config = make("llama").config
    config.num_labels = 12  # as many as a row of nine tokens has with the prompt
    torch.manual_seed(0)
    model = getattr(transformers, f"LlamaFor{kind}Classification")(config).eval()
    return model


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("config", [PromptTuningConfig, PTuningConfig])
def test_a_sequence_classification_head(side: str, config: Any) -> None:
    """It reads the last token of the text, wherever padding is, behind the prompt: each row as by itself."""
    model, batch = _with_head("Sequence"), padded(side)
    del batch["labels"]
    handle = prefixcore.attach(model, config(num_virtual_tokens=P, seed=0, task_type="SEQ_CLS"))
    labels = torch.tensor([0, 1, 2])
    out = model(**batch, labels=labels)
    prompt = handle.bake()
    expected = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        embeds = torch.cat((prompt, model.get_input_embeddings()(ids[mask.bool()])))[None]
        expected.append(model.score(_hidden(model, handle, embeds))[0, -1])
    torch.testing.assert_close(out.logits, torch.stack(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(torch.stack(expected), labels))
    out.loss.backward()
    assert any(p.grad.abs().max() > 0 for p in handle.parameters())  # a new encoder begins at zero


def _hidden(model: Any, handle: Any, embeds: Tensor) -> Tensor:
    with handle.disabled():
        return model.model(inputs_embeds=embeds).last_hidden_state


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_a_head_for_question_answering(side: str) -> None:
    """Scores are those of the text, and the answer's places are counted in the text."""
    torch.manual_seed(0)
    model, batch = transformers.LlamaForQuestionAnswering(make("llama").config).eval(), padded(side)
    seen, places = batch["attention_mask"].bool(), torch.tensor([[1, 4], [3, 5], [1, 1]])
    del batch["labels"]
    if side == "left":
        places = places + (seen == 0).sum(1, keepdim=True)
    handle = prefixcore.attach(model, PromptTuningConfig(num_virtual_tokens=P, seed=0, modules_to_save=[]))
    out = model(**batch, start_positions=places[:, 0], end_positions=places[:, 1])
    prompt = handle.bake()
    with handle.disabled():
        for row, (ids, mask) in enumerate(zip(batch["input_ids"], seen, strict=True)):
            embeds = torch.cat((prompt, model.get_input_embeddings()(ids[mask])))[None]
            alone = model(inputs_embeds=embeds)
            torch.testing.assert_close(out.start_logits[row][mask], alone.start_logits[0, P:], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(out.end_logits[row][mask], alone.end_logits[0, P:], rtol=1e-4, atol=1e-5)
    if side == "none":
        rows = torch.cat((prompt.expand(3, -1, -1), model.get_input_embeddings()(batch["input_ids"])), 1)
        with handle.disabled():
            moved = {"start_positions": places[:, 0] + P, "end_positions": places[:, 1] + P}
            torch.testing.assert_close(out.loss, model(inputs_embeds=rows, **moved).loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_a_token_classification_head(side: str) -> None:
    model, batch = _with_head("Token"), padded(side)
    batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"] % 12, -100)
    handle = prefixcore.attach(model, PromptTuningConfig(num_virtual_tokens=P, seed=0, task_type="TOKEN_CLS"))
    out = model(**batch)
    assert out.logits.shape == (3, 9, 12)
    seen = batch["attention_mask"].bool()
    expected = []
    for ids, mask in zip(batch["input_ids"], seen, strict=True):
        embeds = torch.cat((handle.bake(), model.get_input_embeddings()(ids[mask])))[None]
        expected.append(model.score(_hidden(model, handle, embeds))[0, P:])
    torch.testing.assert_close(out.logits[seen], torch.cat(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(torch.cat(expected), batch["labels"][seen]))
    out.loss.backward()
