"""Conversations with images: a loop of one's own, Trainer with a collator of one's own, and TRL's SFTTrainer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import Trainer, TrainingArguments

import prefixcore
from prefixcore.training import weights_digest
from tests.hf.vision_language import FAMILIES, IMAGE, processor

CONFIGS = {
    "prefix": prefixcore.PrefixTuningConfig(num_virtual_tokens=4, seed=0),
    "prompt": prefixcore.PromptTuningConfig(num_virtual_tokens=4, seed=0),
}
COMMON: dict[str, Any] = {
    "max_steps": 4, "report_to": "none", "bf16": False, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
    "per_device_train_batch_size": 2, "learning_rate": 0.01, "gradient_checkpointing": False, "logging_steps": 1,
    "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "remove_unused_columns": False,
}  # fmt: skip
WORDS = ["red", "a dog", "green", "no cat"]

pytestmark = pytest.mark.filterwarnings("ignore:.*not among the families")


def rows() -> list[dict[str, Any]]:
    """Four images, each with a question and an answer."""
    pixels = np.random.default_rng(0).integers(0, 255, (len(WORDS), 16, 16, 3), dtype=np.uint8)
    return [
        {
            "images": [Image.fromarray(each)],
            "prompt": [{"role": "user", "content": "what is it?"}],
            "completion": [{"role": "assistant", "content": word}],
        }
        for each, word in zip(pixels, WORDS, strict=True)
    ]


def collator(made: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """What one writes by hand: the processor's tensors, and labels of text that is no padding."""

    def collate(given: list[dict[str, Any]]) -> dict[str, Any]:
        texts = []
        for row in given:
            question, answer = row["prompt"][0]["content"], row["completion"][0]["content"]
            asked = [{"type": "image"}, {"type": "text", "text": question}]
            answered = [{"type": "text", "text": answer}]
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            texts.append(made.apply_chat_template(messages))
        batch = made(text=texts, images=[row["images"] for row in given], padding=True, return_tensors="pt")
        unlearnt = (batch["attention_mask"] == 0) | (batch["input_ids"] == IMAGE)
        unlearnt[:, 0] = True  # which Trainer does not count, whatever comes before it
        return {**batch, "labels": batch["input_ids"].masked_fill(unlearnt, -100)}

    return collate


def by_hand(handle: Any, batches: Iterable[dict[str, Any]]) -> list[float]:
    """The losses of a bare loop with the steps of `COMMON`."""
    optimizer = torch.optim.SGD(handle.parameters(), lr=COMMON["learning_rate"])
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = handle.model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_as_by_hand(trainer: Any, handle: Any, other: Any, batches: list[dict[str, Any]]) -> None:
    before = weights_digest(handle.model)
    trainer.train()
    assert weights_digest(handle.model) == before
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert by_hand(other, batches) == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(list(handle.parameters()), list(other.parameters()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", ["gemma3", "llava"])
def test_trainer_with_a_collator_of_ones_own(family: str, config: str, tmp_path: Path) -> None:
    handle, other = (prefixcore.attach(FAMILIES[family]().train(), CONFIGS[config]) for _ in range(2))
    data, collate = rows(), collator(processor(family))
    arguments = TrainingArguments(str(tmp_path), train_sampling_strategy="sequential", **COMMON)
    trainer = Trainer(handle.model, arguments, train_dataset=data, data_collator=collate)
    assert_as_by_hand(trainer, handle, other, [collate(data[:2]), collate(data[2:])] * 2)
    handle.save(tmp_path / "adapter")
    other.detach()
    prefixcore.load(other.model, tmp_path / "adapter")
    batch = collate(data)
    with torch.no_grad():
        got, wanted = (model.eval()(**batch).logits for model in (other.model, handle.model))
        assert torch.equal(got, wanted)
        blank = {**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}
        assert not torch.allclose(handle.model(**blank).logits, wanted, atol=1e-2)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL needs Python 3.11")
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", ["gemma3", "llava"])
def test_trls_trainer(family: str, config: str, tmp_path: Path) -> None:
    """A dataset with images, as TRL's own collator reads it."""
    from trl import SFTConfig, SFTTrainer

    handle, other = (prefixcore.attach(FAMILIES[family]().train(), CONFIGS[config]) for _ in range(2))
    arguments = SFTConfig(str(tmp_path), max_length=None, train_sampling_strategy="sequential", **COMMON)
    trainer = SFTTrainer(
        handle.model, arguments, train_dataset=Dataset.from_list(rows()), processing_class=processor(family)
    )
    given = list(trainer.get_train_dataloader())
    assert all(batch["pixel_values"].shape == (2, 3, 16, 16) for batch in given)
    assert_as_by_hand(trainer, handle, other, given * 2)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL needs Python 3.11")
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", ["gemma3", "llava"])
def test_answers_about_images_that_the_model_writes(family: str, config: str, tmp_path: Path) -> None:
    """TRL's GRPOTrainer has the attached model write them; each is rewarded with its own image at hand."""
    from trl import GRPOConfig, GRPOTrainer

    handle = prefixcore.attach(FAMILIES[family]().train(), CONFIGS[config])
    made, given, judged = processor(family), rows(), []
    made.tokenizer.padding_side = "left"

    def reward(prompts: Any, completions: Any, images: Any, **other: Any) -> list[float]:
        judged.extend(zip(images, completions, strict=True))
        return [float(len(answer[0]["content"])) for answer in completions]

    options = {**COMMON, "per_device_train_batch_size": 4, "max_steps": 2}
    arguments = GRPOConfig(str(tmp_path), num_generations=2, max_completion_length=6, **options)
    data = Dataset.from_list([{"images": row["images"], "prompt": row["prompt"]} for row in given])
    trainer = GRPOTrainer(handle.model, reward, args=arguments, train_dataset=data, processing_class=made)
    before, weights = [parameter.clone() for parameter in handle.parameters()], weights_digest(handle.model)
    trainer.train()
    assert len(judged) == 8
    pictures = {images[0].tobytes() for images, _ in judged}
    assert pictures == {row["images"][0].tobytes() for row in given}
    assert weights_digest(handle.model) == weights
    assert any((one != other).any() for one, other in zip(handle.parameters(), before, strict=True))
