"""Packed batches: the same loss and gradients as padded ones, without padding, masks or idle logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainingArguments

import prefixcore
from prefixcore import PackedCollator, PrefixTuningConfig

from . import tiny_models
from .models import FAMILIES, VOCABULARY, make, tokens, window_of

LENGTHS = (5, 9, 1, 2, 7)

close = {"rtol": 1e-5, "atol": 1e-5}


def features(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Any]]:
    """Sequences of these lengths with labels on their last half, or on all of it for every third one."""
    made = []
    for place, length in enumerate(lengths):
        ids = tokens(1, length, seed=place)[0].tolist()
        learnt = 0 if place % 3 == 0 else length // 2
        made.append({"input_ids": ids, "labels": [-100] * learnt + ids[learnt:]})
    return made


def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The padded batch, as most collators make it."""
    longest = max(len(row["input_ids"]) for row in rows)

    def fill(name: str, value: int) -> torch.Tensor:
        return torch.tensor([list(row[name]) + [value] * (longest - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": fill("input_ids", 0), "attention_mask": mask, "labels": fill("labels", -100)}


def attach(family: str = "llama", **changes: Any) -> tuple[Any, prefixcore.Handle]:
    model = make(family, **window_of(family, 3), **changes)
    handle = prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=3, init="random", seed=0))
    return model, handle


def gradients(handle: prefixcore.Handle) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in handle.parameters()]
    handle.model.zero_grad()
    return found


def taught(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The logits [L, V] whose next token has a label."""
    return logits[:, :-1][labels[:, 1:] != -100]


def lose_lengths(layer: torch.nn.Module) -> Any:
    """Lets `layer` pass everything on but the lengths, until the handle returned is removed."""

    def lose(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {name: value for name, value in kwargs.items() if not name.startswith("cu_seq_lens")}

    return layer.register_forward_pre_hook(lose, with_kwargs=True)


def test_what_a_packed_batch_is() -> None:
    batch = PackedCollator()(
        [
            {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
            {"input_ids": torch.tensor([8]), "labels": torch.tensor([8])},
            {"input_ids": [0, 0, 9, 8, 7], "labels": [0, 0, 9, -100, 7], "attention_mask": [0, 0, 1, 1, 1]},
        ]
    )
    assert {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 8, 7]],
        "position_ids": [[0, 1, 2, 0, 0, 1, 2]],
        "cu_seq_lens_q": [0, 3, 4, 7],
        "cu_seq_lens_k": [0, 3, 4, 7],
        "max_length_q": 3,
        "max_length_k": 3,
        "logits_to_keep": [0, 1, 5, 6],
        "labels": [[-100, 6, 7, 7]],
    }
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "position_ids", "labels", "logits_to_keep"))


def test_features_stay_as_they_are() -> None:
    ids = torch.tensor([5, 6, 7])
    batch = PackedCollator()([{"input_ids": ids, "labels": ids}])
    batch["labels"][:] = batch["input_ids"][:] = 0
    assert ids.tolist() == [5, 6, 7]


def test_without_labels_every_logit_is_computed() -> None:
    model, _ = attach()
    rows = [{"input_ids": row["input_ids"]} for row in features()]
    batch = PackedCollator()(rows)
    assert not {"labels", "logits_to_keep"} & set(batch)
    assert model(**batch).logits.shape == (1, sum(LENGTHS), VOCABULARY)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one feature"),
        ([{"input_ids": [1], "labels": [1]}, {"input_ids": [1]}], "feature 1 has no labels, but others have"),
        ([{"labels": [1]}], r"feature 0 has no input_ids \(it has labels\)"),
        ([{"input_ids": [1, 2], "labels": [1]}], "feature 0 has 2 input_ids, but 1 labels"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "feature 0 has 2 input_ids, but an attention_mask of 1"),
        ([{"input_ids": [1]}, {"input_ids": [1, 2], "attention_mask": [0, 0]}], "feature 1 has no token"),
        ([{"input_ids": [1, 2.5]}], r"feature 0: expected input_ids as whole numbers, got \[1, 2\.5\]"),
        ([{"input_ids": [1], "labels": [float("nan")]}], "feature 0: expected labels as whole numbers"),
        ([{"input_ids": [1, 2], "attention_mask": [0.5, 1]}], "expected attention_mask as whole numbers"),
        ([{"input_ids": [1]}, {"input_ids": ["1"]}], r"feature 1: expected input_ids as whole numbers, got \['1'\]"),
        ([{"input_ids": "1"}], "feature 0: expected input_ids as whole numbers, got '1'"),
        ([{"input_ids": [1, None]}], "feature 0: expected input_ids as whole numbers"),
        ([{"input_ids": [2**63]}], "feature 0: expected input_ids as whole numbers"),
        ([{"input_ids": [1]}, {"input_ids": [1, 2], "pixel_values": [[0.5]]}], "feature 1 has pixel_values"),
        ([{"input_ids": [[1, 2]]}], r"feature 0: expected input_ids as one sequence \[T\], got \[1, 2\]"),
    ],
)
def test_features_that_cannot_be_packed(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedCollator()(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_logits_and_gradients_are_those_of_the_padded_batch(family: str) -> None:
    model, handle = attach(family)
    expected = model(**pad(features()))
    expected.loss.backward()
    wanted = gradients(handle)
    batch = PackedCollator()(features())
    got = model(**batch, use_cache=False)
    assert got.logits.shape == batch["labels"].shape + (VOCABULARY,)
    torch.testing.assert_close(got.loss, expected.loss, **close)
    torch.testing.assert_close(
        taught(got.logits, batch["labels"]), taught(expected.logits, pad(features())["labels"]), **close
    )
    got.loss.backward()
    for one, other in zip(gradients(handle), wanted, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_and_cached_and_counted(family: str) -> None:
    """Gradient checkpointing reads the lengths again; a cache that a forward keeps by default changes nothing."""
    model, handle = attach(family)
    batch, count = PackedCollator()(features()), torch.tensor(100)
    expected = model(**pad(features()), num_items_in_batch=count).loss
    expected.backward()
    wanted = gradients(handle)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, num_items_in_batch=count).loss, expected, **close)
    model.train()
    model.gradient_checkpointing_enable()
    loss = model(**batch, num_items_in_batch=count).loss
    torch.testing.assert_close(loss, expected, **close)
    with torch.no_grad():
        model(**pad(features((3, 4))))  # between a forward and its backward
    loss.backward()
    torch.testing.assert_close(gradients(handle), wanted, **close)


def test_learned_positions_are_limited_in_each_sequence_not_in_all() -> None:
    model, _ = attach("gpt2")  # 64 positions
    rows = features((50, 61, 33))
    packed, padded = model(**PackedCollator()(rows)), model(**pad(rows))
    torch.testing.assert_close(packed.loss, padded.loss, **close)
    with pytest.raises(ValueError, match=r"64 positions, but this input needs 65"):
        model(**PackedCollator()(features((5, 62))))


def test_positions_that_are_not_given_restart_too() -> None:
    model, _ = attach()
    batch = PackedCollator()(features())
    expected = model(**batch).logits
    del batch["position_ids"]
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_that_restart_say_where_sequences_meet(family: str) -> None:
    """As `DataCollatorWithFlattening` gives them; transformers' masks heed them without a cache, gpt-oss's never."""
    model, _ = attach(family)
    batch = PackedCollator()(features())
    expected = model(**batch).logits
    alone = {name: batch[name] for name in ("input_ids", "position_ids", "logits_to_keep")}
    torch.testing.assert_close(model(**alone).logits, expected, **close)


def test_positions_that_restart_in_another_family() -> None:
    model = tiny_models.make("SmolLM3ForCausalLM", "smollm3")
    prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=3, init="random", seed=0))
    batch = PackedCollator()(features())
    alone = {name: batch[name] for name in ("input_ids", "position_ids", "logits_to_keep")}
    torch.testing.assert_close(model(**alone).logits, model(**batch).logits, **close)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_grows_with_the_square_of_the_tokens(family: str, checkpointing: bool) -> None:
    """No tensor of a step has T * T elements, nor the T * V of all logits."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if torch.is_tensor(x)]
            self.elements = max([self.elements, *sizes])
            return out

    lengths = (40,) * 60
    model, _ = attach(family, vocab_size=1000)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    rows = [{**row, "labels": [-100] * 38 + row["input_ids"][38:]} for row in features(lengths)]
    batch = PackedCollator()(rows)
    total = batch["input_ids"].shape[1]
    widest = 200  # of a token's activations
    with prefixcore.use_backend("cpu"), Largest() as largest:
        model(**batch, use_cache=False).loss.backward()
    assert batch["labels"].shape[1] == 2 * 60 + 1
    assert total * 32 <= largest.elements <= total * widest < total * 1000 / 4 < total * total / 4


def test_a_model_that_loses_the_lengths_is_refused() -> None:
    model, _ = attach()

    hook = lose_lengths(model.model.layers[1])
    with pytest.raises(NotImplementedError, match="LlamaAttention is called without the cu_seq_lens_q"):
        model(**PackedCollator()(features()))
    hook.remove()
    expected, got = model(**pad(features())), model(**PackedCollator()(features()))  # nothing was left behind
    torch.testing.assert_close(got.loss, expected.loss, **close)


def test_what_contradicts_the_lengths_is_refused() -> None:
    model, _ = attach()
    batch = PackedCollator()(features())
    expected = model(**batch).logits
    ones = torch.ones_like(batch["input_ids"])
    torch.testing.assert_close(model(**batch, attention_mask=ones).logits, expected, rtol=0, atol=0)
    for mask in (ones.index_fill(1, torch.tensor([3]), 0), torch.ones(1, 1, 24, 24, dtype=torch.bool)):
        with pytest.raises(ValueError, match="attention_mask: expected none in a packed batch"):
            model(**batch, attention_mask=mask)
    with pytest.raises(ValueError, match=r"cu_seq_lens_k: expected \[6\] as cu_seq_lens_q, got \[2\]"):
        model(**{**batch, "cu_seq_lens_k": torch.tensor([0, 24])})
    with pytest.raises(ValueError, match="cu_seqlens"):
        model(**{**batch, "cu_seq_lens_q": torch.tensor([0, 9, 7, 24]), "cu_seq_lens_k": None})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_the_prefix_it_is_the_bare_model(family: str) -> None:
    batch = PackedCollator()(features())
    bare = make(family)
    expected = bare(**batch, use_cache=False).logits
    model, handle = attach(family)
    with handle.disabled():
        torch.testing.assert_close(model(**batch, use_cache=False).logits, expected, rtol=0, atol=0)
    assert not torch.allclose(model(**batch).logits, expected, atol=1e-3)
    handle.detach()
    torch.testing.assert_close(model(**batch, use_cache=False).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_which_models_can_be_given_packed_batches(family: str) -> None:
    model, handle = attach(family)
    assert handle.can_pack
    handle.detach()
    assert not prefixcore.attach(model.base_model, PrefixTuningConfig(3, init="random")).can_pack


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        {"label_smoothing_factor": 0.2},
    ],
    ids=str,
)
def test_trainer(changes: dict[str, Any], tmp_path: Path) -> None:
    """The same losses step by step, the same gradient norms, the same virtual tokens and evaluation at the end."""
    data = [
        {**row, "attention_mask": [1] * len(row["input_ids"])} for row in features((5, 9, 4, 2, 7, 12, 3, 8))
    ]  # fmt: skip

    def run(collator: Any) -> tuple[list[dict[str, float]], list[torch.Tensor], Any]:
        model, handle = attach()
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, per_device_eval_batch_size=2,
            optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", report_to=[], use_cpu=True, seed=1,
            disable_tqdm=True, save_strategy="no", logging_steps=1, **changes,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:6], data_collator=collator)
        trainer.train()
        logs = [
            {name: log[name] for name in ("loss", "grad_norm")} for log in trainer.state.log_history if "loss" in log
        ]
        logs.append({"eval_loss": trainer.evaluate()["eval_loss"]})
        return logs, [p.detach().clone() for p in handle.parameters()], trainer.predict(data[:6])

    padded, packed = run(pad), run(PackedCollator())
    assert len(packed[0]) == 5
    assert packed[0][0]["loss"] > packed[0][3]["loss"] + 0.01
    for one, other in zip(packed[0], padded[0], strict=True):
        assert one == pytest.approx(other, rel=2e-5, abs=1e-5)
    torch.testing.assert_close(packed[1], padded[1], rtol=1e-4, atol=1e-5)

    def answers(prediction: Any) -> torch.Tensor:
        return taught(torch.from_numpy(prediction.predictions), torch.from_numpy(prediction.label_ids))

    torch.testing.assert_close(answers(packed[2]), answers(padded[2]), rtol=1e-4, atol=1e-4)
