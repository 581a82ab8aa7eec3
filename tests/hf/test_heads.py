"""`modules_to_save`: a head beside virtual tokens is trained, saved, loaded and resumed, and PEFT reads the folder."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    Trainer,
    TrainingArguments,
)

import prefixcore
from prefixcore import AdapterError, PrefixTuningConfig, PromptTuningConfig

from .models import assert_same, make, padded, state

IDS, LABELS = torch.randint(3, 97, (4, 6), generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0])
PREFIX = {"num_virtual_tokens": 4, "init": "random", "seed": 0}


def classifier(seed: int, cls: Any = LlamaForSequenceClassification, **changes: Any) -> Any:
    """One body, and a head that is new each time, as `from_pretrained` makes it from a model without one."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_labels": 2, "pad_token_id": 0, "initializer_range": 0.2,
        "problem_type": "single_label_classification", **changes,
    }  # fmt: skip
    model = cls(LlamaConfig(**options)).eval()
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.score.weight)
    return model


def train(model: Any, handle: prefixcore.Handle, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=LABELS).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("how", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["score"]}])
def test_trained_saved_loaded_and_resumed(how: dict[str, Any], tmp_path: Path) -> None:
    model = classifier(1)
    own, before = model.score, state(model)
    handle = prefixcore.attach(model, PrefixTuningConfig(**PREFIX, **how))
    assert handle.num_trainable == sum(p.numel() for p in handle.parameters()) == 2 * 2 * 4 * 32 + 64
    assert dict(handle.named_parameters())["score.weight"] is model.score.weight
    start = model.score.weight.detach().clone()
    train(model, handle)
    assert not torch.equal(model.score.weight, start)
    expected = model(IDS).logits
    handle.save(tmp_path / "a")
    train(model, handle)
    after = [p.detach().clone() for p in handle.parameters()]
    handle.detach()
    assert model.score is own
    torch.set_rng_state(before["rng"])
    assert_same(before, state(model))

    other = classifier(2)
    loaded = prefixcore.load(other, tmp_path / "a")
    assert loaded.num_trainable == 0
    assert torch.equal(other(IDS).logits, expected)
    loaded.detach()
    resumed = prefixcore.load(other, tmp_path / "a", trainable=True)
    assert resumed.num_trainable == handle.num_trainable
    train(other, resumed)
    for got, want in zip(resumed.parameters(), after, strict=True):
        assert torch.equal(got, want)
    resumed.save(tmp_path / "b")


def test_peft_loads_ours_and_we_load_pefts(tmp_path: Path) -> None:
    model = classifier(1)
    handle = prefixcore.attach(model, PrefixTuningConfig(**PREFIX, task_type="SEQ_CLS"))
    train(model, handle)
    handle.save(tmp_path / "ours")
    mask = torch.ones_like(IDS)
    theirs = PeftModel.from_pretrained(classifier(2), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(IDS, attention_mask=mask).logits, model(IDS, attention_mask=mask).logits)

    wrapped: Any = get_peft_model(classifier(3), peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    wrapped.eval().save_pretrained(tmp_path / "theirs")
    again = classifier(4)
    with prefixcore.load(again, tmp_path / "theirs", trainable=True) as loaded:
        torch.testing.assert_close(again(IDS).logits, wrapped(IDS, attention_mask=mask).logits)
        assert loaded.num_trainable == 2 * 2 * 4 * 32 + 64


@pytest.mark.filterwarnings("ignore:.*stays as it is")
@pytest.mark.parametrize("cls", [LlamaForSequenceClassification, LlamaForTokenClassification])
@pytest.mark.parametrize("how", [{"modules_to_save": ["score"]}, {}, {"task_type": "SEQ_CLS", "modules_to_save": []}])
@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
def test_peft_loads_a_folder_whatever_its_task_type(config: Any, how: dict[str, Any], cls: Any, tmp_path: Path) -> None:
    """The default task type, CAUSAL_LM, is for models that generate; to PEFT it says another of these."""
    model = classifier(1, cls)
    handle = prefixcore.attach(model, config(**PREFIX, **how))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    handle.save(tmp_path / "a")
    mask = torch.ones_like(IDS)
    expected = model(IDS, attention_mask=mask).logits
    theirs = PeftModel.from_pretrained(classifier(2 if handle.heads.trained else 1, cls), tmp_path / "a").eval()
    got = theirs(IDS, attention_mask=mask).logits
    torch.testing.assert_close(got[:, -6:] if expected.dim() == 3 else got, expected, rtol=1e-4, atol=1e-4)
    again = classifier(2 if handle.heads.trained else 1, cls)
    with prefixcore.load(again, tmp_path / "a") as loaded:
        torch.testing.assert_close(again(IDS, attention_mask=mask).logits, expected)
        assert loaded.config.task_type == handle.config.task_type
    (tmp_path / "a" / "prefixcore_manifest.json").unlink()
    with prefixcore.load(again, tmp_path / "a"):
        torch.testing.assert_close(again(IDS, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("config", [PrefixTuningConfig(**PREFIX, layers=[1], modules_to_save=["lm_head", "norm"])])
def test_any_module_and_a_folder_of_our_own(config: Any, tmp_path: Path) -> None:
    model = make("llama")
    handle = prefixcore.attach(model, config)
    names = [name for name, _ in handle.named_parameters() if not name.startswith("layers.0.")]
    assert names == [name for name, p in model.named_parameters() if p.requires_grad and "prefixcore" not in name]
    assert {"lm_head.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"} <= set(names)
    model(**padded("none")).loss.backward()
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter -= parameter.grad if parameter.grad is not None else 0
    expected = model(**padded("none")).logits
    handle.save(tmp_path / "a")
    assert not (tmp_path / "a" / "adapter_config.json").exists()
    again = make("llama")
    with prefixcore.load(again, tmp_path / "a"):
        torch.testing.assert_close(again(**padded("none")).logits, expected)


def test_a_head_that_stays_random_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"score of LlamaForSequenceClassification stays as it is.*\['score'\]"):
        prefixcore.attach(classifier(1), PrefixTuningConfig(**PREFIX)).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prefixcore.attach(classifier(1), PrefixTuningConfig(**PREFIX, modules_to_save=[])).detach()
        prefixcore.attach(classifier(1), PrefixTuningConfig(**PREFIX, task_type="SEQ_CLS")).detach()
        prefixcore.attach(make("llama"), PrefixTuningConfig(**PREFIX)).detach()


def test_disabled_and_copies_have_the_head_they_should() -> None:
    model = classifier(1)
    bare = model(IDS).logits
    handle = prefixcore.attach(model, PrefixTuningConfig(**PREFIX, task_type="SEQ_CLS"))
    train(model, handle)
    expected = model(IDS).logits
    with handle.disabled():
        assert torch.equal(model(IDS).logits, bare)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS).logits, expected)
        with torch.no_grad():
            other.score.weight.zero_()
        assert torch.equal(model(IDS).logits, expected)
        from prefixcore.hf.handle import attached

        mine = attached(other)
        assert mine is not None
        assert dict(mine.named_parameters())["score.weight"] is other.score.weight
        mine.detach()
        assert torch.equal(other(IDS).logits, bare)
    model.to(torch.bfloat16)
    with handle.disabled():
        model(IDS)
    handle.detach()
    assert model.score.weight.dtype == torch.bfloat16


def test_wrong_names_are_said(tmp_path: Path) -> None:
    before = state(model := classifier(1))
    with pytest.raises(ValueError, match="no module whose name ends with 'scores'; its own are model, score"):
        prefixcore.attach(model, PrefixTuningConfig(**PREFIX, modules_to_save=["scores"]))
    assert_same(before, state(model))
    with pytest.raises(ValueError, match="get no gradient"):
        prefixcore.attach(make("llama"), PromptTuningConfig(3, modules_to_save=["embed_tokens"]))
    for wrong in ("score", [3], [""]):
        with pytest.raises(ValueError, match="modules_to_save must be a list of names"):
            PrefixTuningConfig(3, modules_to_save=wrong)  # type: ignore[arg-type]


def test_another_head_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model = classifier(1)
    prefixcore.attach(model, PrefixTuningConfig(**PREFIX, task_type="SEQ_CLS")).save(tmp_path / "a")
    other = classifier(1, num_labels=3)
    before = state(other)
    with pytest.raises(AdapterError, match=r"score.weight: expected shape \[3, 32\], as the model has it, got \[2"):
        prefixcore.load(other, tmp_path / "a")
    assert_same(before, state(other))
    (tmp_path / "a" / "prefixcore_manifest.json").unlink()
    with pytest.raises(AdapterError, match="score.weight: the adapter brings it along, but LlamaForCausalLM has none"):
        prefixcore.load(make("llama", num_key_value_heads=4, head_dim=8), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for names, message in ((["norm"], "'norm' is named, but the file has no tensor"), ("score", "must be a list")):
        changed = {**config, "modules_to_save": names}
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(AdapterError, match=message):
            prefixcore.load(classifier(1), tmp_path / "a")


def test_a_token_classifier_with_a_bias(tmp_path: Path) -> None:
    model = classifier(1, LlamaForTokenClassification)
    handle = prefixcore.attach(model, PrefixTuningConfig(**PREFIX, task_type="TOKEN_CLS"))
    with torch.no_grad():
        model.score.bias.fill_(2.0)
    handle.save(tmp_path / "a")
    other = classifier(2, LlamaForTokenClassification)
    with prefixcore.load(other, tmp_path / "a"):
        assert torch.equal(other(IDS).logits, model(IDS).logits)


def tied() -> Any:
    model = make("llama", tie_word_embeddings=True)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids="-".join)
def test_what_is_trained_is_not_tied_again(names: list[str], tmp_path: Path) -> None:
    """Trainer asks a model to tie its weights when it has loaded a checkpoint."""
    model = tied()
    handle = prefixcore.attach(model, PrefixTuningConfig(**PREFIX, modules_to_save=names))
    with torch.no_grad():
        for _, parameter in handle.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    names_before, expected = [name for name, p in model.named_parameters() if p.requires_grad], model(IDS).logits
    for each in (model, copy.deepcopy(model)):
        each.tie_weights()
        assert [name for name, p in each.named_parameters() if p.requires_grad] == names_before
        assert torch.equal(each(IDS).logits, expected)
    handle.save(tmp_path / "a")
    handle.detach()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    handle = prefixcore.load(model, tmp_path / "a")
    model.tie_weights()
    assert torch.equal(model(IDS).logits, expected)


def test_trainer_resumes_a_head_that_was_tied(tmp_path: Path) -> None:
    data = [{"input_ids": ids, "labels": ids} for ids in IDS]

    def run(model: Any, steps: int, resume: bool) -> Any:
        prefixcore.attach(model, PrefixTuningConfig(**PREFIX, modules_to_save=["lm_head"]))
        options = {"save_steps": 2, "eval_steps": 2, "eval_strategy": "steps", "load_best_model_at_end": True}
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, learning_rate=0.05, report_to=[], use_cpu=True, disable_tqdm=True, **options
        )
        Trainer(model, arguments, train_dataset=data, eval_dataset=data).train(resume_from_checkpoint=resume)
        return model.eval()(IDS).logits

    first = tied()
    start = first.lm_head.weight.detach().clone()
    expected = run(first, 2, False)  # the best checkpoint is loaded at the end
    assert not torch.equal(first.lm_head.weight, start)
    assert torch.equal(first.model.embed_tokens.weight, start)
    torch.testing.assert_close(run(tied(), 2, True), expected)


@pytest.mark.parametrize("is_tied", [False, True])
def test_an_output_head_that_is_trained_does_not_grow_in_silence(is_tied: bool) -> None:
    model = tied() if is_tied else make("llama")
    handle = prefixcore.attach(model, PrefixTuningConfig(**PREFIX, modules_to_save=["lm_head"]))
    before = state(model)
    with pytest.raises(ValueError, match="lm_head is trained along .* resize the embeddings before you attach"):
        model.resize_token_embeddings(103)
    assert_same(before, state(model))
    assert model.resize_token_embeddings() is model.model.embed_tokens
    handle.detach()
    model.resize_token_embeddings(103)
    assert model(IDS).logits.shape[-1] == 103


@pytest.mark.parametrize("name", ["layers", "self_attn"])
def test_a_list_of_modules_is_disabled_too(name: str, tmp_path: Path) -> None:
    model = make("llama")
    bare, before = model(IDS).logits, state(model)
    handle = prefixcore.attach(model, PrefixTuningConfig(**PREFIX, modules_to_save=[name]))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    expected = model(IDS).logits
    with handle.disabled():
        assert torch.equal(model(IDS).logits, bare)
    handle.save(tmp_path / "a")
    handle.detach()
    assert_same(before, {**state(model), "rng": before["rng"]})
    with prefixcore.load(model, tmp_path / "a") as handle:
        assert torch.equal(model(IDS).logits, expected)
        with handle.disabled():
            assert torch.equal(model(IDS).logits, bare)
    assert_same(before, {**state(model), "rng": before["rng"]})


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
def test_the_decoder_itself_is_not_trained_along(config: Any) -> None:
    model = make("llama")
    before = state(model)
    with pytest.raises(ValueError, match="modules_to_save: model is or holds the whole decoder"):
        prefixcore.attach(model, config(num_virtual_tokens=3, init="zero", modules_to_save=["model"]))
    assert_same(before, state(model))
