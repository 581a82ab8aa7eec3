"""Context-aware prompt tuning by `attach`: PEFT's loss and gradients, Trainer, going on from its files and PEFT's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

import prefixcore
from prefixcore import AdapterError, PromptBank
from prefixcore.nn import CPTConfig

from .models import make, padded, tokens

EXAMPLES: dict[str, Any] = {
    "cpt_token_ids": [11, 22, 33, 44, 12, 23, 34, 45],
    "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 7, 8],
    "opt_weighted_loss_type": "decay",
    "opt_loss_decay_factor": 0.9,
}
P = len(EXAMPLES["cpt_token_ids"])


def theirs(family: str = "llama") -> Any:
    config = peft.CPTConfig(task_type="CAUSAL_LM", cpt_mask=[1] * P, **EXAMPLES)
    return peft.get_peft_model(make(family), config)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_trains_as_peft_does(family: str) -> None:
    peft_model, model, batch = theirs(family), make(family), padded("right")
    handle = prefixcore.attach(model, CPTConfig(**EXAMPLES))
    learned = peft_model.prompt_encoder["default"].delta_embedding.weight
    types = torch.randint(1, 5, batch["labels"].shape, generator=torch.Generator().manual_seed(0))
    for step in range(4):
        given = {} if step % 2 else {"input_type_mask": types}
        outputs = [
            each(**{k: v.clone() for k, v in {**batch, **given}.items()})
            for each in (peft_model.train(), model.train())
        ]
        assert outputs[1].logits.shape[1] == outputs[0].logits.shape[1] - P == batch["labels"].shape[1]
        torch.testing.assert_close(outputs[1].loss, outputs[0].loss, rtol=1e-5, atol=1e-5)
        for output in outputs:
            output.loss.backward()
        torch.testing.assert_close(handle.module.delta_embedding.grad, learned.grad, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            for p in (handle.module.delta_embedding, learned):
                p -= 5.0 * p.grad
                p.grad = None
    assert handle.bake().sub(handle.module.embedding).norm() > 0


def test_left_padding_is_right_padding() -> None:
    model = make("llama")
    prefixcore.attach(model, CPTConfig(**EXAMPLES))
    right, left = model(**padded("right")), model(**padded("left"))
    ids = torch.stack([row.roll(9 - n) for row, n in zip(padded("right")["input_ids"], (9, 6, 2), strict=True)])
    mask = (ids != 0).long()
    moved = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    torch.testing.assert_close(moved.loss, right.loss, rtol=1e-5, atol=1e-5)
    assert left.loss.isfinite()
    loss, logits, *_ = model(**padded("right"), return_dict=False)
    torch.testing.assert_close((loss, logits), (right.loss, right.logits))


def test_a_call_without_the_head_is_refused() -> None:
    """Its loss weighs answers, which only the model with its head can do."""
    model = make("llama")
    prefixcore.attach(model, CPTConfig(**EXAMPLES))
    with pytest.raises(RuntimeError, match="LlamaModel was called without the soft prompt"):
        model.model(padded("right")["input_ids"])


def test_trainer_resumes_and_accumulates(tmp_path: Path) -> None:
    rows = tokens(8, 8)
    types = [[1, 2, 2, 3, 4, 4, 4, 4]] * 8
    data = [
        {"input_ids": r.tolist(), "labels": r.tolist(), "input_type_mask": t} for r, t in zip(rows, types, strict=True)
    ]

    def run(folder: str, resume: bool = False, **changes: Any) -> torch.Tensor:
        model = make("llama")
        handle = prefixcore.attach(model, CPTConfig(**EXAMPLES))
        options: dict[str, Any] = {
            "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.01, "save_strategy": "steps",
            "save_steps": 2, "lr_scheduler_type": "constant", "report_to": [], "disable_tqdm": True, "use_cpu": True,
            "max_grad_norm": 0.0, "optim": "sgd",
        }  # fmt: skip
        arguments = TrainingArguments(output_dir=str(tmp_path / folder), **{**options, **changes})
        Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=resume)
        assert handle.module.delta_embedding.abs().max() > 0
        return handle.bake()

    whole = run("whole")
    halves = run("halves", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    torch.testing.assert_close(halves, whole, rtol=1e-4, atol=1e-6)
    run("half", max_steps=2)
    torch.testing.assert_close(run("half", resume=True), whole, rtol=1e-5, atol=1e-6)


def test_saved_loaded_and_resumed(tmp_path: Path) -> None:
    model, batch = make("llama"), padded("right")
    handle = prefixcore.attach(model, CPTConfig(**EXAMPLES))
    model(**batch).loss.backward()
    with torch.no_grad():
        handle.module.delta_embedding -= handle.module.delta_embedding.grad
    expected = model(**batch)
    handle.save(tmp_path / "a")
    for trainable in (False, True):
        again = make("llama")
        loaded = prefixcore.load(again, tmp_path / "a", trainable=trainable)
        got = again(**batch)
        torch.testing.assert_close((got.loss, got.logits), (expected.loss, expected.logits), rtol=1e-5, atol=1e-5)
        assert (loaded.num_trainable > 0) is trainable
    peft_model = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "a").eval()
    torch.testing.assert_close(peft_model(**batch).logits[:, P:], expected.logits, rtol=1e-4, atol=1e-5)


def test_training_goes_on_from_what_peft_wrote(tmp_path: Path) -> None:
    """PEFT's file holds the sum of the examples' embeddings and of what was learned, whose length is bounded."""
    peft_model = theirs()
    with torch.no_grad():
        peft_model.prompt_encoder["default"].delta_embedding.weight.normal_(std=0.001)
    peft_model.save_pretrained(tmp_path)
    handle = prefixcore.load(make("llama"), tmp_path, trainable=True)
    learned = peft_model.prompt_encoder["default"].get_projection()
    kept = [i for i, kind in enumerate(EXAMPLES["cpt_tokens_type_mask"]) if kind % 4]
    torch.testing.assert_close(handle.module.delta_embedding[kept], learned[kept], rtol=1e-4, atol=1e-6)
    with pytest.raises(AdapterError, match="further from the embedding of token 11.*another model"):
        prefixcore.load(make("llama", seed=1), tmp_path, trainable=True)


def test_what_it_cannot_do_is_said() -> None:
    model, ids = make("llama"), tokens(2, 5)
    with pytest.raises(NotImplementedError, match="train it by itself"):
        PromptBank(copy.deepcopy(model)).attach("a", CPTConfig(**EXAMPLES))
    with pytest.raises(ValueError, match="cpt_token_ids has the token id 97, but the model's vocabulary has 97"):
        prefixcore.attach(model, CPTConfig(cpt_token_ids=[97]))
    handle = prefixcore.attach(model, CPTConfig(**EXAMPLES))
    assert not handle.can_pack
    with pytest.raises(ValueError, match="leave logits_to_keep out"):
        model(ids, labels=ids, logits_to_keep=1)
    with pytest.raises(ValueError, match=r"input_type_mask: expected \[B, T\]"):
        model(ids, labels=ids, input_type_mask=ids[:, :2])
    with pytest.raises(NotImplementedError, match="packed batch"):
        model(**prefixcore.PackedCollator()([{"input_ids": ids[0], "labels": ids[0]}]))
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 8)
    torch.testing.assert_close(model(ids, input_type_mask=ids).logits, model(ids).logits)
