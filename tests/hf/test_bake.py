"""`bake`: a soft prompt, a text or a reparameterized prefix as a plain prefix that is equal to it."""

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
from prefixcore.hf.baking import source
from prefixcore.nn import CPTConfig, CPTPrompt
from tests import tiny

from . import tiny_models
from .models import FAMILIES, VOCABULARY, assert_same, make, state, tokens, window_of

P = 5
PROMPTS = {
    "prompt": prefixcore.PromptTuningConfig(num_virtual_tokens=P),
    "low rank": prefixcore.PromptTuningConfig(num_virtual_tokens=P, reparameterization="low_rank", rank=2),
    "p-tuning": prefixcore.PTuningConfig(num_virtual_tokens=P, init="random"),
    "lstm": prefixcore.PTuningConfig(num_virtual_tokens=P, encoder_reparameterization_type="LSTM"),
}
PREFIXES = {
    "plain": prefixcore.PrefixTuningConfig(num_virtual_tokens=P, num_frozen_tokens=1),
    "mlp": prefixcore.PrefixTuningConfig(num_virtual_tokens=P, prefix_projection=True, layers=[1]),
    "random basis": prefixcore.PrefixTuningConfig(num_virtual_tokens=P, reparameterization="random_basis", num_basis=9),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.1}


def wide(family: str) -> dict[str, int]:
    """Windows that never lose sight of anything, where the family has windows."""
    return window_of(family, 256)


def trained(model: Any, config: Any, folder: Path, **options: Any) -> Path:
    """An adapter whose values are those of no text."""
    with prefixcore.attach(model, config) as handle:
        move(handle.module)
        return handle.save(folder, **options)


def move(module: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def spelled_out(model: Any, prompt: Tensor, ids: Tensor) -> Tensor:
    """Logits of ids [B, T] behind embeddings [P, E], by the bare model."""
    embeddings = model.get_input_embeddings()(ids)
    front = prompt.to(embeddings.dtype).expand(len(ids), -1, -1)
    with torch.no_grad():
        return model(inputs_embeds=torch.cat((front, embeddings), 1), use_cache=False).logits[:, len(prompt) :]


def with_adapter(model: Any, folder: Path, ids: Tensor) -> Tensor:
    with prefixcore.load(model, folder), torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


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
    expected = spelled_out(model, prompt, ids)
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
        torch.testing.assert_close(got, spelled_out(model, prompts[task], ids), atol=2e-5, rtol=0)
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
    expected = spelled_out(model, module.bake(), ids)
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


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_a_text(family: str, tmp_path: Path) -> None:
    """Its prefix acts as the text before the input does."""
    model, tokenizer = make(family, vocab_size=len(tiny.tokenizer()), **wide(family)), tiny.tokenizer()
    text = "Say it: "
    baked = prefixcore.bake(model, None, tmp_path / "baked", text=text, tokenizer=tokenizer, inputs=["a ->", "b"])
    assert (baked.num_virtual_tokens, baked.method, baked.comparison.num_inputs) == (len(text), "text", 2)
    both = tokenizer(text + "what now", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=both).logits[:, len(text) :]
    got = with_adapter(model, tmp_path / "baked", both[:, len(text) :])
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    facts = read_record(tmp_path / "baked")["baked_from"]
    assert (facts["method"], facts["text"], facts["bos"]) == ("text", text, False)


def test_the_token_that_begins_a_text_is_asked_for(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = tiny.model(), tiny.tokenizer()
    tokenizer.bos_token = "<end>"
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    assert tokenizer("a")["input_ids"][0] == 0
    with pytest.raises(AdapterError, match=r"begins every text with '<end>': say whether .* --bos: requests must then"):
        prefixcore.bake(model, None, tmp_path / "baked", text="ab", tokenizer=tokenizer)
    assert not (tmp_path / "baked").exists()
    plain = tokenizer("cd", add_special_tokens=False, return_tensors="pt")["input_ids"]
    for bos, begin in ((True, tokenizer("ab")["input_ids"]), (False, tokenizer("ab")["input_ids"][1:])):
        prefixcore.bake(model, None, tmp_path / "baked", text="ab", tokenizer=tokenizer, bos=bos)
        both = torch.cat((torch.tensor([begin]), plain), 1)
        with torch.no_grad():
            expected = model(input_ids=both).logits[:, len(begin) :]
        torch.testing.assert_close(with_adapter(model, tmp_path / "baked", plain), expected, atol=2e-5, rtol=0)


def test_a_tokenizer_that_merges_text_and_request_is_named(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.BPE(vocab={"<end>": 0, "a": 1, "b": 2, "ab": 3, "c": 4}, merges=[("a", "b")]))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    with pytest.warns(UserWarning, match="merges the end of the text with the beginning of 'bc'"):
        prefixcore.bake(tiny.model(), None, tmp_path / "x", text="ca", tokenizer=tokenizer, inputs=["cb", "bc"])


def test_a_tokenizer_without_such_a_token(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no token that begins a text"):
        prefixcore.bake(tiny.model(), None, tmp_path / "x", text="ab", tokenizer=tiny.tokenizer(), bos=True)
    with pytest.raises(AdapterError, match="expected one with tokens"):
        prefixcore.bake(tiny.model(), None, tmp_path / "x", text="", tokenizer=tiny.tokenizer())
    with pytest.raises(AdapterError, match="another model's tokenizer"):
        prefixcore.bake(make("llama", vocab_size=50), None, tmp_path / "x", text="zz", tokenizer=tiny.tokenizer())


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "gpt_oss"])
def test_windows_that_lose_sight_are_refused(family: str, tmp_path: Path) -> None:
    """The refusal is right: behind a window's length of text the two are not equal."""
    model = make(family, **window_of(family, 8))
    trained(model, PROMPTS["prompt"], tmp_path / "prompt")
    with pytest.raises(NotImplementedError, match=r"sliding window of 8 tokens .* never of a prefix"):
        prefixcore.bake(model, tmp_path / "prompt", tmp_path / "baked")
    with pytest.raises(NotImplementedError, match="sliding window"):
        prefixcore.bake(model, None, tmp_path / "baked", text="abc", tokenizer=tiny.tokenizer())
    assert not (tmp_path / "baked").exists()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_keys_that_move_with_the_length_are_refused(kind: str, tmp_path: Path) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 128}
    model = make("llama", rope_parameters=rope)
    trained(model, PROMPTS["prompt"], tmp_path / "prompt")
    with pytest.raises(NotImplementedError, match=f"rotary embeddings of the kind '{kind}'"):
        prefixcore.bake(model, tmp_path / "prompt", tmp_path / "baked")


@pytest.mark.parametrize(("name", "kind"), [("JambaForCausalLM", "jamba"), ("Llama4ForCausalLM", "llama4_text")])
def test_layers_that_are_no_attention_are_refused(name: str, kind: str, tmp_path: Path) -> None:
    model = tiny_models.make(name, kind)
    trained(model, prefixcore.PromptTuningConfig(num_virtual_tokens=2), tmp_path / "prompt")
    with pytest.raises(NotImplementedError, match=name):
        prefixcore.bake(model, tmp_path / "prompt", tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


def test_virtual_tokens_in_the_text_are_refused(tmp_path: Path) -> None:
    model = make("llama")
    config = prefixcore.PromptTuningConfig(num_virtual_tokens=2, virtual_token_ids=[90, 91])
    trained(model, config, tmp_path / "placed")
    with pytest.raises(AdapterError, match="stand in the text, in place of the ids"):
        prefixcore.bake(model, tmp_path / "placed", tmp_path / "baked")


def test_no_room_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    model = make("gpt2", vocab_size=len(tokenizer))
    with pytest.raises(AdapterError, match="64 virtual tokens leave no room: the model has learned 64"):
        prefixcore.bake(model, None, tmp_path / "baked", text="x" * 64, tokenizer=tokenizer)
    assert prefixcore.bake(model, None, tmp_path / "b", text="x" * 55, tokenizer=tokenizer).num_virtual_tokens == 55


def test_what_is_not_equal_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    trained(model, PROMPTS["prompt"], tmp_path / "prompt")
    right = source.prompt_to_prefix

    def wrong(*arguments: Any) -> Any:
        return [(key, value.roll(1, 1)) for key, value in right(*arguments)]

    monkeypatch.setattr(source, "prompt_to_prefix", wrong)
    before = state(model)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(AdapterError, match=r"not equal to what it was baked from, and is not written: on an input"):
            prefixcore.bake(model.to(dtype), tmp_path / "prompt", tmp_path / "baked")
    assert not (tmp_path / "baked").exists()
    assert_same(before["attributes"], state(model)["attributes"])


def test_another_model_is_refused_unless_someone_insists(tmp_path: Path) -> None:
    measured: dict[str, Any] = {"metrics": {"exact match": 0.5}, "split": {"name": "test"}, "license": "MIT"}
    trained(make("llama"), PROMPTS["prompt"], tmp_path / "prompt", **measured)
    other = make("llama", seed=5)
    with pytest.raises(AdapterError, match="weights"):
        prefixcore.bake(other, tmp_path / "prompt", tmp_path / "baked")
    with pytest.warns(UserWarning, match="loaded all the same"):
        prefixcore.bake(other, tmp_path / "prompt", tmp_path / "baked", strict=False)
    manifest = read_adapter(tmp_path / "baked").manifest
    assert manifest is not None
    assert manifest.base_model["forced"]
    assert (manifest.metrics, manifest.license) == (None, "MIT")


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


def test_arguments_that_contradict_each_other(tmp_path: Path) -> None:
    model = tiny.model()
    for options in ({}, {"adapter": tmp_path, "text": "a"}, {"text": "a"}, {"adapter": tmp_path, "bos": True}):
        with pytest.raises(TypeError, match="bake: "):
            prefixcore.bake(model, options.pop("adapter", None), tmp_path / "x", **options)
    with pytest.raises(AdapterError, match="no such folder"):
        prefixcore.bake(model, tmp_path / "nowhere", tmp_path / "x")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("")
    with pytest.raises(AdapterError, match=r"todo\.txt"):
        prefixcore.bake(model, tmp_path / "nowhere", tmp_path / "notes")
