"""Training an accelerated `PeftModelForSeq2SeqLM`: adapters, files, checkpointing, Trainer, and how it is undone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import prefixcore

from .accelerated import METHODS, PREFIXES, P, pickled, step
from .accelerated_seq2seq import PROMPTS, inputs, with_peft
from .encoder_decoders import GREEDY, make

pytestmark = pytest.mark.filterwarnings("ignore")

EACH = [*((method, "bart") for method in PREFIXES), *((method, "t5") for method in PROMPTS)]
each = pytest.mark.parametrize(("method", "family"), EACH)


def assert_close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def longer(method: str) -> Any:
    config = METHODS[method](task_type="SEQ_2_SEQ_LM", **({"num_layers": 3} if method in PREFIXES else {}))
    config.num_virtual_tokens = P + 2
    return config


@each
def test_adapters_are_added_switched_and_deleted(method: str, family: str) -> None:
    batch = inputs(method, family)

    def run(model: Any) -> list[Any]:
        model.add_adapter("other", longer(method))
        for parameter in model.prompt_encoder["other"].parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        found = [step(model, batch)]
        for name in ("other", "default"):
            model.set_adapter(name)
            found.append(step(model, batch))
        model.delete_adapter("default")
        with torch.no_grad():
            return [*found, model(**batch).logits, model.generate(**inputs(method, family, target=False), **GREEDY)]

    expected, model = run(with_peft(method, family)), with_peft(method, family)
    prefixcore.accelerate(model)
    assert_close(run(model), expected)
    assert not torch.equal(expected[0][1], expected[1][1])


@each
def test_disabled_and_undone_the_model_is_what_it_was(method: str, family: str) -> None:
    model, batch = with_peft(method, family), inputs(method, family)
    before, base = set(model.__dict__), set(vars(model.base_model))
    attention = model.base_model.config._attn_implementation
    text = {name: value for name, value in batch.items() if name != "task_ids"}
    bare, expected = model.base_model(**text).logits, step(model, batch)
    with prefixcore.accelerate(model) as accelerated:
        step(model, batch)
        with model.disable_adapter():
            assert torch.equal(model(**text).logits, bare)
        assert torch.equal(model.base_model(**text).logits, bare)
        assert_close(step(model, batch), expected)
        assert repr(accelerated).startswith(f"Accelerated({model.peft_type.value} on {type(model.base_model).__name__}")
    left_by_peft = {"forward", "prepare_inputs_for_generation"}  # its disable_adapter puts methods back on the instance
    assert set(model.__dict__) - left_by_peft == before
    assert set(vars(model.base_model)) == base
    assert "forward" not in {**vars(model.base_model.get_encoder()), **vars(model.base_model.get_decoder())}
    assert model.base_model.config._attn_implementation == attention
    assert_close(step(model, batch), expected)


@each
def test_files_are_the_same_and_training_goes_on_from_them(method: str, family: str, tmp_path: Path) -> None:
    model, batch = with_peft(method, family, torch.float32), inputs(method, family)
    model.save_pretrained(tmp_path / "peft")
    prefixcore.accelerate(model)
    expected = model(**batch).loss.detach()
    model.save_pretrained(tmp_path / "accelerated")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "accelerated" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    base = make(family)
    resumed = prefixcore.accelerate(base, tmp_path / "accelerated", is_trainable=True).model.eval()
    loss = resumed(**batch).loss
    assert_close(loss.detach(), expected)
    optimizer = torch.optim.SGD([p for p in resumed.parameters() if p.requires_grad], lr=0.05)
    loss.backward()
    optimizer.step()
    trained = resumed(**batch).loss.detach()
    assert trained < expected
    resumed.save_pretrained(tmp_path / "again")
    loaded = peft.PeftModel.from_pretrained(make(family), tmp_path / "again").eval()
    assert_close(loaded(**batch).loss.detach(), trained)


@each
@pytest.mark.parametrize("how", [{"use_reentrant": False}, {}], ids=["as asked", "as prepare_model_for_kbit_training"])
def test_gradient_checkpointing(method: str, family: str, how: dict[str, Any]) -> None:
    without, batch = with_peft(method, family, torch.float32).train(), inputs(method, family)
    expected, base = step(without, batch), make(family)
    base.enable_input_require_grads()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    model = prefixcore.accelerate(base, without.peft_config["default"]).model.train()
    model.prompt_encoder.load_state_dict(without.prompt_encoder.state_dict())
    recomputed = []
    decoder = base.get_decoder()
    attention = decoder.block[0].layer[0] if family == "t5" else decoder.layers[0].self_attn
    attention.register_forward_pre_hook(lambda *_: recomputed.append(1))
    torch.testing.assert_close(step(model, batch), expected, rtol=1e-4, atol=1e-4)
    assert len(recomputed) == 2


@each
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_is_accelerated_and_independent(method: str, family: str, duplicate: Any) -> None:
    model, batch = with_peft(method, family), inputs(method, family)
    prefixcore.accelerate(model)
    with torch.no_grad():
        expected, other = model(**batch).logits, duplicate(model)
        assert torch.equal(other(**batch).logits, expected)
        for parameter in other.prompt_encoder.parameters():
            parameter.add_(1.0)
        assert not torch.allclose(other(**batch).logits, expected)
        assert torch.equal(model(**batch).logits, expected)


class _Rows(torch.utils.data.Dataset):
    """The two rows of a batch, one by one."""

    def __init__(self, batch: dict[str, Any]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {name: values[i] for name, values in self.batch.items()}


@each
def test_seq2seq_trainer_predicts_with_generate(method: str, family: str, tmp_path: Path) -> None:
    rows = _Rows(inputs(method, family))
    options = transformers.Seq2SeqTrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=3,
        learning_rate=1e-2,
        predict_with_generate=True,
        generation_max_length=7,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        seed=1,
        optim="adamw_torch",
    )

    def run(model: Any) -> Any:
        trainer = transformers.Seq2SeqTrainer(model, options, train_dataset=rows, eval_dataset=rows)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        predicted = trainer.predict(rows)
        assert predicted.metrics["test_loss"] < before
        return torch.tensor([before, predicted.metrics["test_loss"]]), torch.tensor(predicted.predictions)

    expected, model = run(with_peft(method, family, torch.float32)), with_peft(method, family, torch.float32)
    prefixcore.accelerate(model)
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
