"""A soft prompt in all the shapes an input has, and the shapes it refuses."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch

import prefixcore
from prefixcore import PromptTuningConfig

from .models import FAMILIES, VOCABULARY, Tokenizer, make, padded, tokens

TEXT = "abcde"
P = len(TEXT)

pytestmark = pytest.mark.usefixtures("prompts_computed")


def attach(model: Any) -> prefixcore.Handle:
    return prefixcore.attach(model, PromptTuningConfig(init_text=TEXT), tokenizer=Tokenizer())


def text_ids(rows: int) -> torch.Tensor:
    return torch.tensor([Tokenizer()(TEXT)["input_ids"]]).expand(rows, -1)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_loss_and_gradient_are_those_of_the_rows_alone(family: str) -> None:
    model, batch = make(family), padded("left")
    handle = attach(model)
    model(**batch).loss.backward()
    together = handle.module.embedding.grad.clone()
    model.zero_grad()
    total, count = torch.zeros(()), 0
    for row, mask in enumerate(batch["attention_mask"].bool()):
        alone = batch["input_ids"][row : row + 1, mask]
        total = total + model(alone, labels=alone).loss * alone.shape[1]  # every token of its own is predicted
        count += alone.shape[1]
    (total / count).backward()
    torch.testing.assert_close(together, handle.module.embedding.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_every_output_has_the_callers_length(side: str, prompts_computed: str) -> None:
    model, batch = make("llama"), padded(side)
    bare = model(**batch, output_hidden_states=True, use_cache=True)
    attach(model)
    out = model(**batch, output_hidden_states=True, use_cache=True)
    assert out.logits.shape == bare.logits.shape
    assert [h.shape for h in out.hidden_states] == [h.shape for h in bare.hidden_states]
    # Of a prompt that is computed once the last virtual token is in each row: it predicts the first label.
    assert out.past_key_values.get_seq_length() == 9 + (1 if prompts_computed == "once" else P)
    as_tuple = model(**batch, return_dict=False)
    assert torch.equal(as_tuple[1], out.logits)
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)


def test_lengths_that_coincide_are_not_confused() -> None:
    """P + T = V: logits are cut along the sequence, never along the vocabulary."""
    model, ids = make("llama"), tokens(2, VOCABULARY - P)
    expected = model(torch.cat((text_ids(2), ids), 1)).logits[:, P:]
    attach(model)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_attention_weights_keep_what_they_say_about_the_prompt() -> None:
    """P + T = H here: heads are not the sequence."""
    model = make("llama", attn_implementation="eager", num_attention_heads=P + 3, num_key_value_heads=P + 3)
    attach(model)
    for weights in model(tokens(2, 3), output_attentions=True).attentions:
        assert weights.shape == (2, P + 3, P + 3, P + 3)


def test_ids_without_a_batch_are_refused() -> None:
    model = make("llama")
    attach(model)
    with pytest.raises(ValueError, match=r"input_ids \[B, T\].*got \[6\]"):
        model(tokens(1, 6)[0])


def test_hidden_states_are_those_of_the_text() -> None:
    model, ids = make("llama"), tokens(2, 6)
    expected = model(torch.cat((text_ids(2), ids), 1), output_hidden_states=True).hidden_states
    attach(model)
    got = model(ids, output_hidden_states=True).hidden_states
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs[:, P:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [1, 3, 6, 8, 100])
def test_logits_to_keep(keep: int) -> None:
    model, ids = make("llama"), tokens(2, 6)
    attach(model)
    expected = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, expected[:, -keep:])


@pytest.mark.parametrize("family", FAMILIES)
def test_explicit_positions(family: str) -> None:
    """The text moves by P and the prompt stands before its first position, wherever that is."""
    model, ids = make(family), tokens(2, 6)
    start = 3
    shifted = torch.arange(start, start + 6)[None]
    whole = torch.arange(start, start + 6 + P)[None]
    expected = model(torch.cat((text_ids(2), ids), 1), position_ids=whole.expand(2, -1)).logits[:, P:]
    attach(model)
    torch.testing.assert_close(model(ids, position_ids=shifted).logits, expected, rtol=1e-5, atol=1e-5)


def test_positional_arguments() -> None:
    model, batch = make("llama"), padded("left")
    attach(model)
    expected = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(model(batch["input_ids"], batch["attention_mask"]).logits, expected)
    with pytest.raises(TypeError, match="positional arguments"):
        model(*range(30))


def test_token_types_go_on() -> None:
    model, ids = make("gpt2"), tokens(2, 6)
    types = torch.tensor([[4] * 3 + [5] * 3] * 2)
    whole = torch.cat((torch.full((2, P), 4), types), 1)
    expected = model(torch.cat((text_ids(2), ids), 1), token_type_ids=whole).logits[:, P:]
    attach(model)
    torch.testing.assert_close(model(ids, token_type_ids=types).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_row_of_padding_only() -> None:
    model, batch = make("llama"), padded("left")
    batch["attention_mask"][2] = 0
    batch["labels"][2] = -100
    attach(model)
    out = model(**batch)
    assert torch.isfinite(out.loss)
    assert torch.isfinite(out.logits).all()


def test_a_first_chunk_of_padding_only() -> None:
    """The prompt is a prefix to the text, so a row may begin later; where a window forbids that it is refused."""
    batch = padded("left")
    del batch["labels"]
    model = make("llama")
    attach(model)
    expected = model.generate(**batch, max_new_tokens=5, eos_token_id=None, do_sample=False)
    got = model.generate(**batch, max_new_tokens=5, eos_token_id=None, do_sample=False, prefill_chunk_size=3)
    assert torch.equal(got, expected)
    model = make("mistral", sliding_window=64)
    attach(model)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**batch, prefill_chunk_size=3)


@pytest.mark.parametrize("embedding", ["scaled", "hooked", "trained outside"], ids=lambda name: name.replace(" ", "-"))
def test_embeddings_that_are_more_than_a_table(embedding: str) -> None:
    """They are called, and what they return is what the prompt stands among."""
    model, ids = make("llama"), tokens(2, 6)
    table = model.get_input_embeddings()
    if embedding == "scaled":

        class Scaled(torch.nn.Embedding):
            def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
                return super().forward(input_ids) * 3.0

        table = Scaled(*table.weight.shape)
        model.set_input_embeddings(table)
    elif embedding == "hooked":
        table.register_forward_hook(lambda _, __, output: output * 3.0)
    expected = model(torch.cat((text_ids(2), ids), 1)).logits[:, P:]
    handle = attach(model)
    if embedding == "trained outside":
        table.weight.requires_grad_(True)
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.logits, expected, rtol=1e-5, atol=1e-5)
    out.loss.backward()
    assert handle.module.embedding.grad.abs().max() > 0


def test_what_is_refused() -> None:
    """Where a window could leave the prompt behind, so that it is put into each row."""
    model, ids = make("mistral", sliding_window=64), tokens(1, 6)
    attach(model)
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, NotImplementedError, "padding mask"),
        ({"position_ids": torch.arange(6)[None, None].expand(3, 1, -1)}, NotImplementedError, r"position_ids \[B, T\]"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, NotImplementedError, "packed batch"),
        ({"logits_to_keep": torch.tensor([1])}, NotImplementedError, "number of last tokens"),
        ({"weights": torch.ones(1, 6)}, NotImplementedError, "weights has a value a token"),
        ({"inputs_embeds": torch.ones(1, 6, 32)}, ValueError, "either input_ids or inputs_embeds"),
    ]
    for changes, error, message in refused:
        with pytest.raises(error, match=message):
            model(input_ids=ids, **changes)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds|needs input_ids"):
        model(attention_mask=torch.ones(1, 6))


@pytest.mark.parametrize("bad", [-1, VOCABULARY, VOCABULARY + 1])
def test_an_id_out_of_the_vocabulary_is_not_taken_for_a_virtual_token(bad: int) -> None:
    model, ids = make("llama"), tokens(1, 6)
    attach(model)
    ids[0, 2] = bad
    with pytest.raises(IndexError, match=f"0 to {VOCABULARY - 1}|index out of range"):
        model(ids)


def test_a_call_without_the_head_has_the_prompt_too() -> None:
    model, ids = make("llama"), tokens(2, 6)
    attach(model)
    assert torch.equal(model.forward(ids).logits, model(ids).logits)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    expected = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    hidden = model.model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(hidden[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_a_forward_that_is_put_on_the_model_later(side: str) -> None:
    """As Liger's, whose loss is of `view(-1, E)` of the hidden states: of all but each text's first token."""
    model, batch = make("llama").train(), padded(side)
    labels = batch["labels"]
    labels[range(3), (labels != -100).long().argmax(1)] = -100
    attach(model)
    expected = model(**batch).loss

    def forward(self: Any, labels: torch.Tensor, **given: Any) -> torch.Tensor:
        hidden = self.model(**given)[0]
        shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
        return torch.nn.functional.cross_entropy(self.lm_head(hidden.view(-1, hidden.shape[-1])), shifted)

    model.forward = MethodType(forward, model)
    torch.testing.assert_close(model(**batch), expected)


def test_a_mask_that_forgets_the_past() -> None:
    model, ids = make("llama"), tokens(1, 6)
    attach(model)
    out = model(ids, use_cache=True)
    with pytest.raises(ValueError, match="speak of 1 tokens|a padding mask of all 7 tokens"):
        model(tokens(1, 1), past_key_values=out.past_key_values, attention_mask=torch.ones(1, 1))
