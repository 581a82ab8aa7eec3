"""`bake`: a soft prompt or a reparameterized prefix as a plain prefix that is equal to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import prefixcore
from prefixcore.adapters import AdapterError, adapter_digest, read_adapter, read_record
from prefixcore.nn import CPTConfig, CPTPrompt
from tests import tiny
from tests.formats.outputs import behind_embeddings, with_adapter

from .baked import PREFIXES, PROMPTS, TOLERANCE, P, move, trained, wide
from .models import FAMILIES, VOCABULARY, assert_same, make, state, tokens, window_of

CASES = [
    (method, family, dtype)
    for method in PROMPTS
    for family in FAMILIES
    for dtype in TOLERANCE
    if (family, dtype) != ("gpt_oss", torch.bfloat16)  # a rounding lets a token go to another expert
]


@pytest.mark.parametrize(("method", "family", "dtype"), CASES)
def test_a_soft_prompt(method: str, family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(family, **wide(family)).to(dtype)
    trained(model, PROMPTS[method], tmp_path / "prompt")
    prompt = read_adapter(tmp_path / "prompt").tensors
    assert isinstance(prompt, Tensor)
    before = state(model)
    baked = prefixcore.bake(model, tmp_path / "prompt", tmp_path / "baked")
    assert_same(before, state(model))
    assert baked.comparison.num_tokens == 24
    adapter = read_adapter(tmp_path / "baked")
    assert (adapter.config.method, adapter.config.is_reparameterized, len(adapter.layer_shapes)) == ("prefix", False, 2)
    ids = tokens(3, 30)
    expected = behind_embeddings(model, prompt, ids)
    with torch.no_grad():
        without = model(input_ids=ids).logits
    got = with_adapter(model, tmp_path / "baked", ids)
    assert float((without - expected).abs().max()) > 10 * TOLERANCE[dtype]
    assert float((got - expected).abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("method", PREFIXES)
def test_a_reparameterized_prefix_is_its_tensors(method: str, family: str, tmp_path: Path) -> None:
    """Also where there are windows: a prefix stays in sight anyway."""
    model = make(family, **window_of(family, 8))
    trained(model, PREFIXES[method], tmp_path / "prefix")
    comparison = prefixcore.bake(model, tmp_path / "prefix", tmp_path / "baked").comparison
    assert comparison.largest_difference == 0
    source, baked = read_adapter(tmp_path / "prefix"), read_adapter(tmp_path / "baked")
    assert baked.layers == source.layers
    assert baked.training_state is None
    for pair, other in zip(source.tensors, baked.tensors, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, other, strict=True))
    ids = tokens(2, 30)
    got, expected = (with_adapter(model, tmp_path / name, ids) for name in ("baked", "prefix"))
    assert torch.equal(got, expected)


def test_generate_with_padding_and_a_cache_is_the_soft_prompts(tmp_path: Path) -> None:
    model = make("llama")
    trained(model, PROMPTS["prompt"], tmp_path / "prompt")
    prefixcore.bake(model, tmp_path / "prompt", tmp_path / "baked")
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    found = []
    for name in ("prompt", "baked"):
        with prefixcore.load(model, tmp_path / name):
            found.append(model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False))
    assert torch.equal(*found)


def test_the_prompt_of_one_of_several_tasks(tmp_path: Path) -> None:
    model = make("llama")
    config = prefixcore.MultitaskPromptTuningConfig(num_virtual_tokens=P, num_tasks=3, num_ranks=2)
    with prefixcore.attach(model, config) as handle:
        move(handle.module)
        prompts = handle.bake()
        handle.save(tmp_path / "tasks")
    ids = tokens(2, 9)
    for task in range(3):
        prefixcore.bake(model, tmp_path / "tasks", tmp_path / "baked", task_id=task)
        got = with_adapter(model, tmp_path / "baked", ids)
        torch.testing.assert_close(got, behind_embeddings(model, prompts[task], ids), atol=2e-5, rtol=0)
    assert read_record(tmp_path / "baked")["baked_from"]["task_id"] == 2
    with pytest.raises(AdapterError, match=r"prompts of 3 tasks .* task_id=0 to 2"):
        prefixcore.bake(model, tmp_path / "tasks", tmp_path / "none")
    with pytest.raises(AdapterError, match="task_id is 3, but its tasks are 0 to 2"):
        prefixcore.bake(model, tmp_path / "tasks", tmp_path / "none", task_id=3)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["prompt", "p-tuning", "multitask", "cpt", "prefix", "cartridge"])
def test_what_peft_wrote(kind: str, tmp_path: Path) -> None:
    configs: dict[str, Any] = {
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
        "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
        "multitask": peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, num_tasks=1),
        "cpt": peft.CPTConfig(
            task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7, 8], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4]
        ),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
        "cartridge": peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, num_frozen_tokens=1),
    }
    theirs = peft.get_peft_model(make("llama"), configs[kind]).eval()
    move(theirs.prompt_encoder)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = tokens(1, 9)
    tasks = {"task_ids": torch.tensor([0])} if kind == "multitask" else {}
    with torch.no_grad():
        expected = theirs(input_ids=ids, **tasks).logits[:, -9:]
    model = make("llama")
    prefixcore.bake(model, tmp_path / "theirs", tmp_path / "baked")
    torch.testing.assert_close(with_adapter(model, tmp_path / "baked", ids), expected, atol=2e-5, rtol=0)
    again = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "baked").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, expected, atol=2e-5, rtol=0)


def test_our_own_cpt(tmp_path: Path) -> None:
    from prefixcore.adapters import Manifest, write_adapter

    model = make("llama")
    config = CPTConfig(cpt_token_ids=[5, 6, 7, 8], cpt_tokens_type_mask=[1, 2, 3, 4])
    module = CPTPrompt(32, config, model.get_input_embeddings()(torch.tensor([5, 6, 7, 8])))
    move(module)
    write_adapter(tmp_path / "cpt", module=module, config=config, manifest=Manifest.create(model, config))
    prefixcore.bake(model, tmp_path / "cpt", tmp_path / "baked")
    ids = tokens(2, 7)
    expected = behind_embeddings(model, module.bake(), ids)
    torch.testing.assert_close(with_adapter(model, tmp_path / "baked", ids), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
@pytest.mark.parametrize("method", ["prompt", "p-tuning"])
def test_a_head_that_was_trained_along(head: str, method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
               "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "num_labels": 3}  # fmt: skip
    model = getattr(transformers, f"LlamaFor{head}")(transformers.LlamaConfig(**options)).eval()
    kinds = {"prompt": prefixcore.PromptTuningConfig, "p-tuning": prefixcore.PTuningConfig}
    config = kinds[method](num_virtual_tokens=P, task_type="SEQ_CLS" if head[0] == "S" else "TOKEN_CLS")
    with prefixcore.attach(model, config) as handle:
        move(handle.module)
        move(handle.heads.trained["score"])
        handle.save(tmp_path / "prompt")
    comparison = prefixcore.bake(model, tmp_path / "prompt", tmp_path / "baked").comparison
    assert comparison.num_tokens == 0
    ids = tokens(2, 9)
    got, expected = (with_adapter(model, tmp_path / name, ids) for name in ("baked", "prompt"))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    assert "score.weight" in read_adapter(tmp_path / "baked").heads


def test_what_is_known_of_the_source_is_kept(tmp_path: Path) -> None:
    """Task, tokenizer and what was measured: it holds of an equal prefix. Its losses are those of another training."""
    model = tiny.model()
    record = {
        "model": "tiny", "data": "x.jsonl", "end": "\n", "split": {"seed": 0, "fraction": 0.1},
        "train_loss": [2.0, 1.0],
        "held_out": {"after training": {"loss": 1.0, "exact_match": 0.5, "examples": 4}},
    }  # fmt: skip
    with prefixcore.attach(model, PROMPTS["p-tuning"], tokenizer=tiny.tokenizer()) as handle:
        handle.save(
            tmp_path / "prompt",
            task="country -> capital",
            record=record,
            license="CC-BY-4.0",
            data={"sha256": "ab" * 32},
            metrics={"exact match": 0.5},
            split={"name": "test"},
            training={"steps": 2},
            seed=7,
        )
    prefixcore.bake(model, tmp_path / "prompt", tmp_path / "baked")
    source, adapter, found = (
        read_adapter(tmp_path / "prompt").manifest,
        read_adapter(tmp_path / "baked").manifest,
        read_record(tmp_path / "baked"),
    )
    assert source is not None
    assert adapter is not None
    assert (adapter.task, adapter.tokenizer) == ("country -> capital", source.tokenizer)
    for name in ("license", "data", "metrics", "split", "seed"):
        assert getattr(adapter, name) == getattr(source, name) is not None
    assert adapter.training is not None
    assert (adapter.training["steps"], adapter.training["baked_method"]) == (2, "p-tuning")
    assert adapter.training["baked_digest"] == adapter_digest(tmp_path / "prompt")
    assert adapter.derived_from is not None
    assert [parent["digest"] for parent in adapter.derived_from] == [adapter_digest(tmp_path / "prompt")]
    assert adapter.base_model == source.base_model
    assert found["held_out"] == record["held_out"]
    assert found["end"] == "\n"
    assert "train_loss" not in found
    facts = found["baked_from"]
    assert facts["digest"] == adapter_digest(tmp_path / "prompt")
    assert facts["method"] == "p-tuning"
    prefixcore.bake(model, tmp_path / "prompt", tmp_path / "baked", task="another name")
    again = read_adapter(tmp_path / "baked").manifest
    assert again is not None
    assert again.task == "another name"
