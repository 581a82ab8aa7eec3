"""Steps that begin at the first layer with a prefix learn what whole steps do; where they cannot, that is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig
from prefixcore.hf.lower_layers import LowerLayers
from prefixcore.training import TokenizedExample, TrainingOptions, held_out_loss, train, train_layers
from prefixcore.training.activations import CacheError, cache_activations, room
from prefixcore.training.batch import Batch, call_model
from tests import tiny
from tests.hf import models

EXAMPLES = [
    TokenizedExample([5, 6, 7], [8, 9]),
    TokenizedExample([10, 11], [12, 13, 14]),
    TokenizedExample([5, 6, 20], [21]),
    TokenizedExample([30], [31, 32]),
    TokenizedExample([40, 41, 42, 43], [44]),
]


def attach(model: Any, layers: list[int] | None = None, **options: Any) -> Any:
    options = {"num_virtual_tokens": 3, "init": "random", "seed": 0, **options}
    return prefixcore.attach(model, PrefixTuningConfig(layers=[1] if layers is None else layers, **options))


def learnt(handle: Any, batch: Batch, call: Any = call_model) -> list[torch.Tensor]:
    """The loss of a batch, and the gradients of the prefix."""
    loss = call(handle.model, batch).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(handle.parameters()))]


def two_batches(packed: bool) -> list[Batch]:
    options = {"packed": packed, "device": torch.device("cpu")}
    return [Batch.of(EXAMPLES[:3], 0, **options), Batch.of([EXAMPLES[3], EXAMPLES[0], EXAMPLES[2]], 0, **options)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_kept_batch_is_learnt_as_the_whole_one_is(family, packed, dtype):
    """The same bits where the batch is the same one."""
    if family == "gpt_oss" and dtype == torch.float64:
        dtype = torch.float32  # its experts' products have no float64
    handle = attach(models.make(family).to(dtype).train())
    first, _ = two_batches(packed)
    with cache_activations(handle, tiny.tokenizer(), EXAMPLES, "memory", packed=packed) as cached:
        whole = learnt(handle, first)
        recording = learnt(handle, first, cached)
        kept = learnt(handle, first, cached)
        assert cached.calls == 1
    if packed:
        for one, other, third in zip(whole, recording, kept, strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one, third)
    else:  # what stands at padding is seen by nobody, but products over it are made of other numbers
        torch.testing.assert_close(kept, whole)


@pytest.mark.parametrize("packed", [True, False])
def test_texts_are_put_together_in_other_batches(packed):
    handle = attach(models.make("llama").double().train())
    first, second = two_batches(packed)
    with cache_activations(handle, tiny.tokenizer(), EXAMPLES, "memory", packed=packed) as cached:
        cached(handle.model, first)
        cached(handle.model, Batch.of(EXAMPLES[3:4], 0, packed=packed, device=torch.device("cpu")))
        kept = learnt(handle, second, cached)
        assert cached.calls == 1
    torch.testing.assert_close(kept, learnt(handle, second), rtol=1e-12, atol=1e-14)


def test_a_training_is_the_same_and_later_epochs_begin_in_the_middle():
    options = {"steps": 9, "batch_size": 2, "learning_rate": 1e-2, "eval_every": 3}
    records, values, calls = [], [], []
    for place in (None, "memory", "disk"):
        handle = attach(models.make("qwen3", num_hidden_layers=4), [2, 3])
        seen: list[int] = []
        handle.model.model.layers[0].self_attn.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        records.append(
            train(
                handle,
                tiny.tokenizer(),
                EXAMPLES[:4],
                held_out=EXAMPLES[4:],
                options=TrainingOptions(**options, cache_activations=place),
            )
        )
        values.append([parameter.detach().clone() for parameter in handle.parameters()])
        calls.append(len(seen))
    for record, value in zip(records[1:], values[1:], strict=True):
        assert [x for _, x in record.train_loss] == pytest.approx([x for _, x in records[0].train_loss], rel=1e-5)
        assert [x for _, x in record.held_out_loss] == pytest.approx([x for _, x in records[0].held_out_loss], rel=1e-5)
        torch.testing.assert_close(value, values[0], rtol=1e-4, atol=1e-5)
    assert calls[0] == 9 + 4
    # The check, the two steps of the first epoch, and the first held-out loss.
    assert calls[1] == calls[2] == 3 + 2 + 1


def test_nothing_is_computed_or_kept_below_the_prefix():
    handle = attach(models.make("llama", num_hidden_layers=4), [2, 3])
    first, _ = two_batches(packed=True)
    with cache_activations(handle, tiny.tokenizer(), EXAMPLES, "memory") as cached:
        cached(handle.model, first)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as kept:
            cached(handle.model, first)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as whole:
            call_model(handle.model, first)
    counts = [sum(row.count for row in each.key_averages() if row.key == "aten::mm") for each in (kept, whole)]
    assert counts == [2 * 7 + 1, 4 * 7 + 1]
    lower = handle.model.model.layers[:2]
    seen: list[torch.Tensor] = []
    hook = lower[1].register_forward_hook(lambda module, args, output: seen.append(output))
    call_model(handle.model, first)
    hook.remove()
    assert seen[0].grad_fn is None
    assert all("forward" not in layer.__dict__ for layer in lower)


def test_a_smaller_dtype_is_near(tmp_path):
    handle = attach(models.make("llama"))
    first, _ = two_batches(packed=True)
    with cache_activations(handle, tiny.tokenizer(), EXAMPLES, "memory", dtype=torch.bfloat16) as cached:
        whole = float(cached(handle.model, first).loss.detach())
        kept = float(cached(handle.model, first).loss.detach())
    assert kept != whole
    assert kept == pytest.approx(whole, rel=1e-2)


def held(handle: Any) -> int:
    """How many texts are known at first."""
    with cache_activations(handle, tiny.tokenizer(), EXAMPLES, "memory") as cached:
        return len(cached.rows.known)


def lines_of(handle: Any, folder: Path, **options: Any) -> tuple[list[str], float, int]:
    """What is said, the held-out loss, and how many calls began in the middle."""
    lines: list[str] = []
    with cache_activations(handle, tiny.tokenizer(), EXAMPLES, "disk", folder=folder, say=lines.append, **options) as c:
        loss = held_out_loss(handle.model, EXAMPLES, 0, packed=True, call=c)
        return lines, loss, c.calls


def test_a_folder_is_taken_again_for_the_same_and_for_nothing_else(tmp_path):
    folder = tmp_path / "activations"
    handle = attach(models.make("llama"))
    _, loss, calls = lines_of(handle, folder)
    assert calls == 0
    lines, again, calls = lines_of(handle, folder)
    assert (again, calls) == (loss, 1)
    assert "5 of 5 texts are there already" in lines[0]
    handle.detach()

    other = attach(models.make("llama", seed=1))
    lines, _, calls = lines_of(other, folder)
    assert calls == 0
    assert "of other weights" in lines[0]
    other.detach()

    for change, why in (
        ({"num_virtual_tokens": 4}, "positions"),
        ({}, "positions"),
        ({"position_offset": False}, "positions"),
    ):
        handle = attach(models.make("llama", seed=1), **change)
        lines, _, calls = lines_of(handle, folder)
        assert calls == 0
        assert f"of other {why}" in lines[0]
        handle.detach()
    handle = attach(models.make("llama", seed=1))
    assert "of other dtype" in lines_of(handle, folder, dtype=torch.bfloat16)[0][0]
    assert lines_of(handle, folder, dtype=torch.bfloat16)[2] == 1


def test_a_folder_is_of_the_configuration_and_of_what_peft_scales_by(tmp_path):
    """Neither is in the weights, and both change what the lower layers make of a text."""
    from peft import LoraConfig, inject_adapter_in_model

    model = models.make("llama")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), model)
    model.requires_grad_(False)
    tuner = model.model.layers[0].self_attn.q_proj

    def calls() -> int:
        with attach(model) as handle:
            return lines_of(handle, tmp_path)[2]

    assert [calls(), calls()] == [0, 1]
    tuner.scaling["default"] *= 2
    assert [calls(), calls()] == [0, 1]
    tuner.enable_adapters(False)
    assert [calls(), calls()] == [0, 1]
    model.config.rms_norm_eps *= 2
    assert [calls(), calls()] == [0, 1]


def test_two_processes_at_once_never_say_that_rows_are_there_which_are_not(tmp_path):
    """The second makes the file anew; the first ends, and knows rows that the second has not made yet."""
    handle = attach(models.make("llama"))
    first, _ = two_batches(packed=True)
    options = (handle, tiny.tokenizer(), EXAMPLES, "disk")
    with cache_activations(*options, folder=tmp_path) as one, cache_activations(*options, folder=tmp_path):
        one(handle.model, first)
    with cache_activations(*options, folder=tmp_path) as third:
        assert not third.rows.known


@pytest.mark.parametrize("damage", ["numbers", "cut", "record"])
def test_damaged_activations_are_made_anew(tmp_path, damage):
    handle = attach(models.make("llama"))
    _, loss, _ = lines_of(handle, tmp_path)
    numbers, record = tmp_path / "activations.bin", tmp_path / "activations.json"
    whole = numbers.read_bytes()
    if damage == "numbers":
        numbers.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "cut":
        numbers.write_bytes(whole[:100])
    else:
        record.write_text("{")
    lines, again, calls = lines_of(handle, tmp_path)
    assert "are made anew" in lines[0]
    assert (again, calls) == (loss, 0)


def test_a_folder_of_others_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    handle = attach(models.make("llama"))
    with pytest.raises(ValueError, match="holds thesis.txt"):
        lines_of(handle, tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.txt"]


def test_what_does_not_fit_is_refused_beforehand(tmp_path, monkeypatch):
    handle = attach(models.make("llama"))
    monkeypatch.setattr(room, "free_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"take 2\.8 KiB .* but 1000 bytes are free in memory: take .*'disk'"):
        held(handle)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2000}))
    with pytest.raises(ValueError, match="2.0 KiB are free on the disk"):
        lines_of(handle, tmp_path / "new")


def test_a_prefix_of_the_first_layer_and_a_soft_prompt_are_refused():
    options = TrainingOptions(steps=1, cache_activations="memory")
    for config, why in (
        (PrefixTuningConfig(num_virtual_tokens=3, init="random"), "prefix of layer 0 is trained"),
        (PromptTuningConfig(num_virtual_tokens=3, init="random"), "soft prompt stands below the first layer"),
    ):
        with prefixcore.attach(models.make("llama"), config) as handle, pytest.raises(CacheError, match=why):
            train(handle, tiny.tokenizer(), EXAMPLES, options=options)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_layers_below_may_have_a_prefix_that_stays(family):
    """It is seen, and what is kept is of its values."""
    handle = attach(models.make(family).train(), [0, 1])
    train_layers(handle, [1])
    before = [tensor.clone() for tensor in handle.bake()[0]]
    first, _ = two_batches(packed=True)
    trained = [parameter for parameter in handle.parameters() if parameter.requires_grad]
    with cache_activations(handle, tiny.tokenizer(), EXAMPLES, "memory") as cached:
        outputs = [call(handle.model, first).loss for call in (call_model, cached, cached)]
        assert cached.calls == 1
    whole, _, kept = (torch.autograd.grad(loss, trained) for loss in outputs)
    assert all(torch.equal(one, other) for one, other in zip(whole, kept, strict=True))
    options = TrainingOptions(steps=6, batch_size=2, learning_rate=0.1, cache_activations="memory")
    train(handle, tiny.tokenizer(), EXAMPLES, options=options)
    assert all(torch.equal(one, other) for one, other in zip(before, handle.bake()[0], strict=True))
    assert not torch.equal(handle.bake()[1][0], before[0])


def test_a_folder_is_of_the_prefix_below(tmp_path):
    for seed, calls in ((0, 0), (0, 1), (1, 0)):
        handle = attach(models.make("llama"), [0, 1], seed=seed)
        train_layers(handle, [1])
        lines, _, found = lines_of(handle, tmp_path)
        assert found == calls
        handle.detach()
    assert "of other prefix" in lines[0]


def test_layers_to_train_are_checked():
    handle = attach(models.make("llama", num_hidden_layers=3), [1, 2])
    for layers, why in (([0], "layer 0 is not among the layers with a prefix, 1 to 2"), ([], "at least one of")):
        with pytest.raises(ValueError, match=why):
            train_layers(handle, layers)
    handle.detach()
    handle = attach(models.make("llama"), [0, 1], reparameterization="low_rank", rank=1)
    with pytest.raises(ValueError, match="through 'low_rank'"):
        train_layers(handle, [1])
    handle.detach()
    handle = prefixcore.attach(models.make("llama"), PromptTuningConfig(num_virtual_tokens=3, init="random"))
    with pytest.raises(ValueError, match="is for a prefix, and what is attached is 'prompt'"):
        train_layers(handle, [1])


def test_dropout_below_the_prefix_is_refused():
    handle = attach(models.make("gpt2", resid_pdrop=0.1))
    with pytest.raises(CacheError, match="have dropout"):
        train(handle, tiny.tokenizer(), EXAMPLES, options=TrainingOptions(steps=1, cache_activations="memory"))


def test_a_model_whose_layers_hand_on_more_is_refused(monkeypatch):
    model = models.make("llama", num_hidden_layers=3)
    handle = attach(model, [1, 2])
    keep: dict[str, torch.Tensor] = {}
    first, last = model.model.layers[0], model.model.layers[2]
    first.mlp.register_forward_hook(lambda module, args, output: keep.update(shared=output))
    last.mlp.register_forward_hook(lambda module, args, output: output + keep.pop("shared"))
    with pytest.raises(CacheError, match="need.? more of"):
        train(handle, tiny.tokenizer(), EXAMPLES, options=TrainingOptions(steps=1, cache_activations="memory"))
    assert handle.model.training is False


def test_what_is_trained_below_the_prefix_is_refused():
    handle = attach(models.make("llama"))
    handle.model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(CacheError, match="below the first trained layer of the prefix is trained"):
        train(handle, tiny.tokenizer(), EXAMPLES, options=TrainingOptions(steps=1, cache_activations="memory"))


def test_a_model_that_is_no_list_of_layers_is_refused():
    config = transformers.AlbertConfig(
        vocab_size=97, embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.AlbertForSequenceClassification(config).eval()
    options = {"num_virtual_tokens": 3, "layers": [1], "init": "random", "task_type": "SEQ_CLS"}
    handle = prefixcore.attach(model, PrefixTuningConfig(**options))
    with pytest.raises(NotImplementedError, match="one list of modules"):
        LowerLayers(handle)
