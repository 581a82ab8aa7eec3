"""Training on an attached model: with a loop of one's own and with Trainer, checkpointed and in half precision."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig, PTuningConfig

from .models import FAMILIES, Tokenizer, make, padded, tokens

CONFIGS = [
    PrefixTuningConfig(init_text="abcd"),
    PrefixTuningConfig(init_text="abcd", reparameterization="mlp", num_frozen_tokens=1),
    PromptTuningConfig(init_text="abcd"),
    PTuningConfig(num_virtual_tokens=4, init_text="abcd", encoder_reparameterization_type="LSTM"),
]


def weights_hash(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not name.startswith("prefixcore."):
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def gradients(handle: prefixcore.Handle) -> list[torch.Tensor]:
    return [p.grad.clone() for p in handle.parameters()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_few_steps_lower_the_loss_and_touch_no_weight(family: str, config: Any) -> None:
    model, batch = make(family), padded("left")
    before = weights_hash(model)
    handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
    optimizer = torch.optim.AdamW(handle.parameters(), lr=2e-2)
    losses = []
    model.train()
    for _ in range(8):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert weights_hash(model) == before
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("prefixcore."))
    handle.detach()
    assert weights_hash(model) == before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", CONFIGS)
def test_gradient_checkpointing(family: str, config: Any) -> None:
    model, batch = make(family), padded("left")
    handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
    model.train()
    model(**batch).loss.backward()
    expected = gradients(handle)
    model.zero_grad()

    model.gradient_checkpointing_enable()
    loss = model(**batch).loss
    with torch.no_grad():
        model(**batch)  # between a forward and its backward, as when a callback evaluates
    loss.backward()
    for got, reference in zip(gradients(handle), expected, strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-6)


def test_reentrant_checkpointing_is_refused_for_a_prefix_and_works_for_a_prompt() -> None:
    reentrant = {"use_reentrant": True}
    model, batch = make("llama"), padded("left")
    handle = prefixcore.attach(model, CONFIGS[1], tokenizer=Tokenizer())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=reentrant)
    model.train()
    with pytest.raises(RuntimeError, match="'use_reentrant': False"):
        model(**batch)
    model.eval()
    model(**batch)
    handle.detach()

    model = make("llama").train()
    handle = prefixcore.attach(model, CONFIGS[2], tokenizer=Tokenizer())
    model(**batch).loss.backward()
    expected = gradients(handle)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=reentrant)
    model(**batch).loss.backward()
    torch.testing.assert_close(gradients(handle), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", CONFIGS)
def test_autocast(family: str, config: Any) -> None:
    """Near the fp32 gradient, in fp32, and the virtual tokens themselves are not rounded."""
    model, batch = make(family), padded("left")
    handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
    model(**batch).loss.backward()
    expected = torch.cat([g.flatten() for g in gradients(handle)])
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**batch)
    assert out.logits.dtype == torch.bfloat16 or family == "gpt_oss"
    out.loss.backward()
    got = torch.cat([g.flatten() for g in gradients(handle)])
    assert got.dtype == torch.float32
    assert (got - expected).norm() < 0.1 * expected.norm()


def test_autocast_does_not_round_a_reparameterized_prefix() -> None:
    model, ids = make("llama"), tokens(2, 6)
    handle = prefixcore.attach(model, CONFIGS[1], tokenizer=Tokenizer())
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_()
    seen = []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["prefixcore_prefixes"].pairs[0][0]), with_kwargs=True
    )
    model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids)
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_with_fp32_virtual_tokens(family: str, config: Any, dtype: torch.dtype) -> None:
    reference, batch = make(family), padded("left")
    model = make(family).to(dtype)
    for m in (reference, model):
        handle = prefixcore.attach(m, config, tokenizer=Tokenizer())
        assert all(p.dtype == torch.float32 for p in handle.parameters())
        out = m(**batch)
        out.loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in handle.parameters())
    assert out.logits.dtype == dtype
    difference = (out.logits.float() - reference(**batch).logits).norm() / out.logits.float().norm()
    assert difference < (0.15 if dtype == torch.bfloat16 else 0.02)


def _dataset(rows: int) -> list[dict[str, torch.Tensor]]:
    ids = tokens(rows, 8)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def _arguments(path: Path, **changes: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 2e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 1,
    }
    return TrainingArguments(output_dir=str(path), **{**options, **changes})


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_trainer(config: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    """Trains, evaluates and predicts; lengths of predictions and labels agree; no weight moves."""
    model, data = make("llama"), _dataset(8)
    before = weights_hash(model)
    handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
    start = [p.detach().clone() for p in handle.parameters()]
    trainer = Trainer(model, _arguments(tmp_path, **changes), train_dataset=data, eval_dataset=data[:4])
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first
    prediction = trainer.predict(data[:4])
    assert prediction.predictions.shape[:2] == prediction.label_ids.shape == (4, 8)
    assert weights_hash(model) == before
    assert any(not torch.equal(a, b) for a, b in zip(start, handle.parameters(), strict=True))


@pytest.mark.parametrize("config", CONFIGS)
def test_trainer_resumes_from_its_checkpoint(config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two and two steps are four steps: Trainer's checkpoint holds the virtual tokens, and no weight is missed."""
    data = _dataset(8)
    options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = make("llama")
    handle = prefixcore.attach(whole, config, tokenizer=Tokenizer())
    Trainer(whole, _arguments(tmp_path / "whole", **options), train_dataset=data).train()
    expected = [p.detach().clone() for p in handle.parameters()]

    half = make("llama")
    prefixcore.attach(half, config, tokenizer=Tokenizer())
    Trainer(half, _arguments(tmp_path / "half", **options, max_steps=2), train_dataset=data).train()
    resumed = make("llama")
    handle = prefixcore.attach(resumed, config, tokenizer=Tokenizer())
    trainer = Trainer(resumed, _arguments(tmp_path / "half", **options), train_dataset=data)
    with _heard(caplog):
        trainer.train(resume_from_checkpoint=True)
    assert "missing keys" not in caplog.text
    for got, reference in zip(handle.parameters(), expected, strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-5, atol=1e-6)


@contextmanager
def _heard(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A block in which what transformers logs is captured."""
    logger = logging.getLogger("transformers")
    before, logger.propagate = logger.propagate, True
    try:
        with caplog.at_level(logging.WARNING, logger="transformers"):
            yield
    finally:
        logger.propagate = before


def test_virtual_tokens_that_a_checkpoint_lacks_are_still_missed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file, save_file

    model = make("llama")
    prefixcore.attach(model, CONFIGS[0], tokenizer=Tokenizer())
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer = Trainer(model, _arguments(tmp_path, **options, max_steps=2), train_dataset=_dataset(4))
    trainer.train()
    path = tmp_path / "checkpoint-2" / "model.safetensors"
    tensors = load_file(path)
    lost = tensors.popitem()[0]
    save_file(tensors, path, {"format": "pt"})
    with _heard(caplog):
        trainer._load_from_checkpoint(str(path.parent))
    assert "missing keys" in caplog.text
    assert lost in caplog.text


@pytest.mark.parametrize("config", CONFIGS)
def test_a_trainer_checkpoint_is_an_adapter_and_no_model(config: Any, tmp_path: Path) -> None:
    model, ids = make("llama"), tokens(2, 6)
    handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
    trainer = Trainer(
        model, _arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1), train_dataset=_dataset(4)
    )
    trainer.train()
    trainer.save_model()  # into the folder that holds the checkpoints
    expected = model.eval()(ids).logits
    for folder in (tmp_path / "checkpoint-2", tmp_path):
        size = (folder / "model.safetensors").stat().st_size
        assert size < 5 * sum(tensor.nbytes for tensor in handle.module.state_dict().values()) + 4096
        for model_class in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
            with pytest.raises(ValueError, match=r"call prefixcore\.load"):
                model_class.from_pretrained(folder)
        again = make("llama")
        with prefixcore.load(again, folder):
            torch.testing.assert_close(again(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    model, data = make("llama"), _dataset(4)
    handle = prefixcore.attach(model, CONFIGS[0], tokenizer=Tokenizer())
    options = {
        "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
    }  # fmt: skip
    trainer = Trainer(model, _arguments(tmp_path, **options), train_dataset=data, eval_dataset=data)
    trainer.train()
    best = prefixcore.adapters.read_adapter(trainer.state.best_model_checkpoint)  # the first: the loss is to be large
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    for (key, value), (best_key, best_value) in zip(handle.bake(), best.tensors, strict=True):
        assert torch.equal(key, best_key)
        assert torch.equal(value, best_value)


def test_data_parallel_is_refused() -> None:
    model = make("llama")
    prefixcore.attach(model, CONFIGS[0], tokenizer=Tokenizer())
    for module in (model, model.model):
        with pytest.raises(RuntimeError, match="one process a device"):
            module._replicate_for_data_parallel()


@pytest.mark.parametrize("config", CONFIGS)
def test_distributed_data_parallel(config: Any, tmp_path: Path) -> None:
    model, batch = make("llama"), padded("left")
    handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
    model(**batch).loss.backward()
    expected = gradients(handle)
    model.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        torch.nn.parallel.DistributedDataParallel(model)(**batch).loss.backward()
        torch.testing.assert_close(gradients(handle), expected, rtol=1e-6, atol=1e-8)
    finally:
        torch.distributed.destroy_process_group()


def test_gradients_accumulate_over_forwards() -> None:
    model, one, two = make("llama"), padded("left"), padded("right")
    for config in CONFIGS[:3]:
        with prefixcore.attach(model, config, tokenizer=Tokenizer()) as handle:
            (model(**one).loss + model(**two).loss).backward()
            together = gradients(handle)
            model.zero_grad()
            model(**one).loss.backward()
            model(**two).loss.backward()
            torch.testing.assert_close(gradients(handle), together, rtol=1e-5, atol=1e-7)


def test_a_prefix_is_evaluated_once_a_sequence() -> None:
    """Once in generate, however many tokens that makes; anew in each other forward, so that no change is missed."""
    model, ids = make("llama"), tokens(1, 5)
    handle = prefixcore.attach(model, CONFIGS[1], tokenizer=Tokenizer())
    calls = []
    handle.module.reparameterization.register_forward_hook(lambda *_: calls.append(1))

    def count(run: Any) -> int:
        calls.clear()
        run()
        return len(calls)

    def generate() -> Any:
        return model.generate(ids, max_new_tokens=6, eos_token_id=None)

    assert count(lambda: model(ids, labels=ids).loss.backward()) == 1
    before = generate()
    assert count(generate) == 1
    handle.module.reparameterization.transform[2].weight.data.add_(5.0)
    assert count(generate) == 1
    assert not torch.equal(before, generate())
    with torch.no_grad():
        assert count(lambda: model(ids)) == 1


CHANGES = {
    "data": lambda ps: [p.data.add_(0.5) for p in ps],
    "foreach": lambda ps: torch._foreach_add_([p.data for p in ps], 0.5),
    "vector": lambda ps: torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(ps) + 0.5, ps),
    "swap": lambda ps: [setattr(p, "data", p.data + 0.5) for p in ps],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["none", "mlp", "low_rank", "random_basis"])
def test_a_change_of_the_parameters_by_any_means_is_seen(kind: str, change: str) -> None:
    """Averages that are swapped in, zeroth-order optimizers: some of these leave no trace in a version counter."""
    model, ids = make("llama"), tokens(2, 5)
    config = PrefixTuningConfig(5, reparameterization=kind, rank=2, num_basis=32, seed=0)
    handle = prefixcore.attach(model, config)
    with torch.no_grad():
        before = model(ids).logits
        CHANGES[change](list(handle.parameters()))
        after = model(ids).logits
    expected = model(ids).logits.detach()
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6)
