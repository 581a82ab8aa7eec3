"""Encoders beside real PEFT: the same logits, loss and gradients, and each reads what the other has written."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig

from .encoders import MOVING, TEXT, P, inputs, make

HEADS = {
    "SEQ_CLS": ("ForSequenceClassification", ["classifier"]),
    "TOKEN_CLS": ("ForTokenClassification", ["classifier"]),
    "QUESTION_ANS": ("ForQuestionAnswering", ["qa_outputs"]),
    "FEATURE_EXTRACTION": ("Model", []),
}

pytestmark = pytest.mark.filterwarnings("ignore")


def labels_of(task: str) -> dict[str, Tensor]:
    if task == "SEQ_CLS":
        return {"labels": torch.tensor([0, 1, 2])}
    if task == "TOKEN_CLS":
        return {"labels": torch.arange(27).view(3, 9) % 3}
    if task == "QUESTION_ANS":
        return {"start_positions": torch.tensor([1, 2, 0]), "end_positions": torch.tensor([3, 4, 1])}
    return {}


def make_for(family: str, task: str) -> Any:
    """PEFT makes soft prompts as wide as the layers, which ELECTRA's and ALBERT's embeddings need not be."""
    return make(family, HEADS[task][0], num_labels=2 if task == "QUESTION_ANS" else 3, embedding_size=32)


def peft_model(family: str, task: str, config: type, **options: Any) -> Any:
    torch.manual_seed(7)
    if family == "distilbert":  # whose configuration has names that PEFT does not know
        options |= {"token_dim": 32, "num_layers": 3, "num_attention_heads": 4}
    return peft.get_peft_model(make_for(family, task), config(task_type=task, num_virtual_tokens=P, **options)).eval()


def first(output: Any) -> Tensor:
    return output.start_logits if "start_logits" in output else output.get("logits", output[0])


def head_gradients(named: Any, end: str) -> list[Tensor]:
    return [p.grad for n, p in named if end and end in n and "original" not in n and p.grad is not None]


@pytest.mark.parametrize("side", ["none", "right"])
@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("family", MOVING)
def test_a_prefix(family: str, task: str, side: str, tmp_path: Any) -> None:
    theirs = peft_model(family, task, peft.PrefixTuningConfig)
    theirs.save_pretrained(tmp_path)
    model = make_for(family, task)
    handle = prefixcore.load(model, tmp_path, trainable=True)
    batch = {**inputs(family, side), **labels_of(task)}
    seen = batch["attention_mask"].bool()
    expected, got = theirs(**batch), model(**batch)
    pick = (lambda x: x) if task == "SEQ_CLS" else (lambda x: x[seen])
    torch.testing.assert_close(pick(first(got)), pick(first(expected)), rtol=1e-4, atol=1e-5)
    if task == "FEATURE_EXTRACTION":
        return
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-6)
    got.loss.backward()
    expected.loss.backward()
    gradient = theirs.prompt_encoder["default"].embedding.weight.grad
    ours = torch.stack([x.grad for pair in handle.module.layers for x in (pair.key, pair.value)])  # [2L, Hkv, P, D]
    torch.testing.assert_close(ours.permute(2, 0, 1, 3).reshape(P, -1), gradient, rtol=1e-3, atol=1e-6)
    name = HEADS[task][1][0]
    for one, other in zip(
        head_gradients(handle.named_parameters(), name), head_gradients(theirs.named_parameters(), name), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("side", ["none", "right"])
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("family", TEXT)
def test_a_soft_prompt(family: str, task: str, side: str, tmp_path: Any) -> None:
    """Before the embeddings: a head that reads the first token reads a virtual one, as in PEFT."""
    theirs = peft_model(family, task, peft.PromptTuningConfig)
    theirs.save_pretrained(tmp_path)
    model = make_for(family, task)
    handle = prefixcore.load(model, tmp_path, trainable=True)
    batch = inputs(family, side)
    seen = batch["attention_mask"].bool()
    expected, got = first(theirs(**batch)), first(model(**batch))
    if task != "SEQ_CLS":
        expected, got = expected[:, P:][seen], got[seen]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(0))
    (got * direction).sum().backward()
    (expected * direction).sum().backward()
    gradient = theirs.prompt_encoder["default"].embedding.weight.grad
    torch.testing.assert_close(next(handle.module.parameters()).grad, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
def test_peft_reads_ours(config: Any, tmp_path: Any) -> None:
    model = make_for("bert", "SEQ_CLS")
    with prefixcore.attach(model, config(P, seed=3, task_type="SEQ_CLS")) as handle:
        expected = model(**inputs("bert", "right")).logits
        handle.save(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(make_for("bert", "SEQ_CLS"), tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(**inputs("bert", "right")).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("config", [peft.PrefixTuningConfig, peft.PromptTuningConfig])
def test_a_peft_model_accelerated(family: str, task: str, config: Any) -> None:
    theirs, batch = peft_model(family, task, config), inputs(family, "right")
    expected = first(theirs(**batch)).detach()
    accelerated = prefixcore.accelerate(theirs)
    got = first(theirs(**batch))
    if task != "SEQ_CLS":
        seen = batch["attention_mask"].bool()
        expected, got = expected[:, -9:][seen], got[:, -9:][seen]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    got.sum().backward()
    accelerated.undo()


@pytest.mark.parametrize("side", ["none", "left"])
def test_question_answering_moves_the_answer_along(side: str) -> None:
    """The loss is that of the answer's tokens; PEFT, which adds P tokens, leaves start and end where they were."""
    model, batch = make_for("bert", "QUESTION_ANS"), inputs("bert", side)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    places = torch.tensor([[1, 3], [4, 6], [7, 8]])
    with prefixcore.attach(model, PromptTuningConfig(P, seed=0, modules_to_save=[])) as handle:
        out = model(**batch, start_positions=places[:, 0], end_positions=places[:, 1])
        assert out.start_logits.shape == out.end_logits.shape == (3, 9)
        prompt = handle.bake()
    leads = [int((row == 0).sum()) for row in mask]
    embeds = model.get_input_embeddings()(ids)
    longer = torch.stack([torch.cat((e[:lead], prompt, e[lead:])) for e, lead in zip(embeds, leads, strict=True)])
    longer_mask = torch.cat((mask, torch.ones(3, P, dtype=torch.long)), 1).sort(1).values
    expected = model(
        inputs_embeds=longer,
        attention_mask=longer_mask,
        position_ids=(longer_mask.cumsum(1) - 1).clamp(min=0),
        start_positions=places[:, 0] + P,
        end_positions=places[:, 1] + P,
    )
    torch.testing.assert_close(out.loss, expected.loss)
    for row, lead in enumerate(leads):
        torch.testing.assert_close(out.start_logits[row, lead:], expected.start_logits[row, lead + P :])


def test_the_first_token_stays_first_where_virtual_tokens_stand_in_the_text() -> None:
    """`virtual_token_ids` after [CLS]: the head reads [CLS], as P-tuning v2's code has it."""
    model = make_for("bert", "SEQ_CLS")
    ids = torch.tensor([[1, 90, 91, 11, 12, 2], [1, 90, 91, 13, 2, 0]])
    mask = (ids != 0).long()
    config = PromptTuningConfig(2, seed=0, virtual_token_ids=[90, 91], task_type="SEQ_CLS", modules_to_save=[])
    with prefixcore.attach(model, config) as handle:
        got, prompt = model(input_ids=ids, attention_mask=mask).logits, handle.bake()
    embeds = model.get_input_embeddings()(ids).clone()
    embeds[:, 1:3] = prompt
    torch.testing.assert_close(got, model(inputs_embeds=embeds, attention_mask=mask).logits)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_rows_with_soft_prompts_of_different_lengths(family: str) -> None:
    model = make(family, "ForTokenClassification")
    bank = prefixcore.PromptBank(model)
    for name, length in (("long", 5), ("short", 2)):
        bank.attach(name, PromptTuningConfig(length, seed=length, modules_to_save=[]))
    batch = inputs(family, "right")
    got = model(**batch, task_ids=["long", None, "short"]).logits
    for row, name in enumerate(["long", None, "short"]):
        alone = model(**{key: x[row : row + 1] for key, x in batch.items()}, task_ids=[name]).logits
        seen = batch["attention_mask"][row].bool()
        torch.testing.assert_close(got[row][seen], alone[0][seen], rtol=1e-4, atol=1e-5)


def test_a_soft_prompt_on_an_encoder_is_not_baked(tmp_path: Any) -> None:
    """Each text changes what the prompt before it is, so no keys and values hold for every text."""
    model = make("bert")
    with prefixcore.attach(model, PromptTuningConfig(P, seed=0)) as handle:
        handle.save(tmp_path / "prompt")
    with pytest.raises(NotImplementedError, match="is an encoder: the text changes what stands before it"):
        prefixcore.bake(model, tmp_path / "prompt", tmp_path / "baked")


def test_a_mask_that_counts_the_virtual_tokens() -> None:
    """The mask is of the text alone; a longer one is refused wherever its zeros stand."""
    model, batch = make_for("bert", "TOKEN_CLS"), inputs("bert", "left")
    with prefixcore.attach(model, PromptTuningConfig(P, seed=0, modules_to_save=[])):
        longer = torch.cat((batch["attention_mask"], torch.ones(3, P, dtype=torch.long)), 1)
        with pytest.raises(ValueError, match="a padding mask of all 9 tokens, got .3, 13."):
            model(input_ids=batch["input_ids"], attention_mask=longer)
