"""An accelerated `PeftModelForSeq2SeqLM` computes what PEFT does: logits, loss, gradients."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import prefixcore

from .accelerated import METHODS, PREFIXES, P, count_ops, gradients, step
from .accelerated_seq2seq import CASES, PROMPTS, inputs, with_peft
from .encoder_decoders import VOCABULARY, labels, make
from .tiny_models import make as make_any

pytestmark = pytest.mark.filterwarnings("ignore")

DECODER_IDS = torch.tensor([[2, 11, 23, 42, 7], [2, 31, 9, 2, 0]])
DECODER_MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0]])
"""Its first token is always seen: what sees nothing is not a number in T5 before transformers 5.15."""


def assert_equal(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_logits_loss_gradients(family: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = with_peft(method, family), inputs(method, family)
    keys, expected = list(model.state_dict()), step(model, batch)
    calls = count_ops(monkeypatch)
    prefixcore.accelerate(model)
    assert_equal(step(model, batch), expected)
    assert expected[2], "nothing is trained"
    prompt_op = {"soft_embedding"} if type(model.word_embeddings) is torch.nn.Embedding else set()  # BART's scales
    assert set(calls) == ({"prefix_attention"} if method in PREFIXES else prompt_op)
    assert list(model.state_dict()) == keys
    assert expected[0].shape[1] == (5 + P if method == "multitask" else 5)


@pytest.mark.parametrize("method", PROMPTS)
def test_a_prompt_of_the_encoder_alone(method: str) -> None:
    model, batch = with_peft(method, "t5", num_transformer_submodules=1), inputs(method, "t5")
    expected = step(model, batch)
    prefixcore.accelerate(model)
    assert_equal(step(model, batch), expected)
    assert expected[0].shape[1] == 5


def _left(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, **{name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}}


_CALLS = {
    "decoder's ids and labels": lambda batch: {**batch, "decoder_input_ids": DECODER_IDS},
    "decoder's ids alone": lambda batch: {**batch, "decoder_input_ids": DECODER_IDS, "labels": None},
    "decoder's padding": lambda batch: {**batch, "decoder_attention_mask": DECODER_MASK},
    "padding on the left": _left,
    "no padding": lambda batch: {**batch, "attention_mask": None},
    "no return_dict": lambda batch: {**batch, "return_dict": False},
}


@pytest.mark.parametrize("call", _CALLS)
@pytest.mark.parametrize(("family", "method"), [("bart", "prefix"), ("marian", "p-tuning"), ("t5", "prompt")])
def test_what_a_call_is_given(family: str, method: str, call: str) -> None:
    model, batch = with_peft(method, family), _CALLS[call](inputs(method, family))

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        out = model(**batch)
        logits = out[1 if batch["labels"] is not None else 0]
        logits.square().mean().backward()
        return logits.detach(), gradients(model)

    expected = run()
    prefixcore.accelerate(model)
    assert_equal(run(), expected)


@pytest.mark.parametrize("method", ["prefix", "prompt", "multitask"])
def test_embeddings_and_arguments_by_place(method: str) -> None:
    model, batch = with_peft(method), inputs(method)
    embed = model.get_input_embeddings()
    rest = (None, DECODER_MASK, embed(DECODER_IDS), batch["labels"], None, None, None, batch.get("task_ids"))

    def run() -> Any:
        embeds = embed(batch["input_ids"])
        out = model(None, batch["attention_mask"], embeds, *rest)
        return out.loss.detach(), out.logits.detach()

    expected = run()
    prefixcore.accelerate(model)
    assert_equal(run(), expected)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_multitask_where_peft_fails(family: str) -> None:
    """It reads the labels and no `decoder_input_ids`, as a collator makes them of the labels."""
    model, batch = with_peft("multitask", family), inputs("multitask", family)
    shifted = torch.tensor([[0, 11, 23, 42, 7], [0, 31, 9, 2, 0]])
    shifted[:, 0] = model.config.decoder_start_token_id
    with pytest.raises(TypeError, match="NoneType"):
        model(**batch, decoder_input_ids=shifted)
    expected = step(model, batch)
    prefixcore.accelerate(model)
    assert_equal(step(model, {**batch, "decoder_input_ids": shifted}), expected)
    del batch["labels"]
    assert_equal(model(**batch, decoder_input_ids=shifted).logits.detach(), expected[0])
    with pytest.raises(ValueError, match="needs either decoder_input_ids or decoder_inputs_embeds, or labels"):
        model(**batch)
    with pytest.raises(ValueError, match="task_ids cannot be None"):
        model(**inputs("prompt", family))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(labels=labels(), task_ids=batch["task_ids"])


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_multitask_on_the_encoder_alone_reads_what_the_decoder_is_given(family: str) -> None:
    """Where PEFT leaves `decoder_input_ids` out, and puts the decoder's mask P tokens from its place."""
    model = with_peft("multitask", family, num_transformer_submodules=1)
    batch = inputs("multitask", family)
    prompt = model.get_prompt(2, batch["task_ids"]).detach()
    prefixcore.accelerate(model)
    decoder = {"decoder_input_ids": DECODER_IDS.flip(1), "decoder_attention_mask": DECODER_MASK}
    got = model(**batch, **decoder)
    expected = model.base_model(
        inputs_embeds=torch.cat([prompt, model.get_input_embeddings()(batch["input_ids"])], 1),
        attention_mask=torch.cat([torch.ones(2, P).long(), batch["attention_mask"]], 1),
        labels=batch["labels"],
        **decoder,
    )
    assert_equal(got.logits, expected.logits)
    assert_equal(got.loss, expected.loss)


@pytest.mark.parametrize("decoder_layers", [1, 2, 3])
@pytest.mark.parametrize("num_layers", [3, 4, 5])
def test_a_prefix_of_more_layers_than_the_decoder_has(decoder_layers: int, num_layers: int) -> None:
    """PEFT cuts it in two, counted around: which pairs a layer has depends on both numbers."""
    torch.manual_seed(3)
    config = METHODS["prefix"](task_type="SEQ_2_SEQ_LM", num_layers=num_layers)
    model = peft.get_peft_model(make("bart", decoder_layers=decoder_layers), config).double().eval()
    expected = step(model, inputs("prefix"))
    prefixcore.accelerate(model)
    assert_equal(step(model, inputs("prefix")), expected)


@pytest.mark.parametrize("name", ["PLBart", "Blenderbot"])
def test_families_that_are_not_known(name: str) -> None:
    """They are compared with PEFT on the spot."""
    base = make_any(f"{name}ForConditionalGeneration", name.lower(), decoder_start_token_id=1)
    bare, batch = base(**inputs("prefix")).logits, inputs("prefix")
    torch.manual_seed(3)
    model = peft.get_peft_model(base, METHODS["prefix"](task_type="SEQ_2_SEQ_LM")).eval()
    expected = step(model, batch)
    prefixcore.accelerate(model)
    torch.testing.assert_close(step(model, batch), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(base(**batch).logits, bare)


@pytest.mark.parametrize(("family", "method"), [("bart", "prefix"), ("t5", "prompt")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family: str, method: str, dtype: torch.dtype) -> None:
    model, batch = with_peft(method, family, torch.float32), inputs(method, family)
    model.base_model.to(dtype)
    expected = step(model, batch)
    prefixcore.accelerate(model)
    got = step(model, batch)
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.1)
    assert got[0].dtype == dtype


@pytest.mark.parametrize(("family", "method"), [("bart", "prefix"), ("t5", "prompt"), ("t5", "multitask")])
def test_compiled(family: str, method: str) -> None:
    model, batch = with_peft(method, family), inputs(method, family)
    expected = step(model, batch)
    prefixcore.accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        out = compiled(**batch)
        out.loss.backward()
        assert_equal((out.logits.detach(), out.loss.detach(), gradients(model)), expected)


def test_ids_out_of_range() -> None:
    model = with_peft("prompt", "t5")
    prefixcore.accelerate(model)
    with pytest.raises(IndexError, match=f"0 to {VOCABULARY - 1}"):
        model(input_ids=torch.tensor([[1, VOCABULARY]]), labels=torch.tensor([[1]]))
