"""MULTITASK_PROMPT_TUNING and CPT: PEFT's numbers from our modules, and each other's files."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

import prefixcore
from prefixcore.adapters import AdapterError, Manifest, make_module, read_adapter, write_adapter
from prefixcore.nn import CPTConfig, CPTPrompt, MultitaskPrompt, MultitaskPromptTuningConfig, cpt_labels, cpt_loss

from .models import contents

P, TASKS, RANK = 5, 3, 2
IDS = torch.tensor([[3, 14, 15, 9, 26, 5], [8, 9, 7, 9, 3, 2]])
TYPES = [1, 2, 3, 4, 5, 6, 7, 8]
EXAMPLES: dict[str, Any] = {
    "cpt_token_ids": [5, 6, 7, 8, 5, 9, 7, 10], "cpt_tokens_type_mask": TYPES, "cpt_mask": [1] * 8,
    "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.7, "opt_projection_epsilon": 0.5,
}  # fmt: skip


def multitask(llama: Any) -> Any:
    torch.manual_seed(3)
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, num_tasks=TASKS, num_ranks=RANK
    )
    return get_peft_model(copy.deepcopy(llama), config).eval()


def cpt(llama: Any) -> Any:
    return get_peft_model(copy.deepcopy(llama), peft.CPTConfig(task_type="CAUSAL_LM", **EXAMPLES))


def bank(wrapped: Any, task: int) -> torch.Tensor:
    return wrapped.get_prompt(batch_size=1, task_ids=torch.tensor([task]))[0].detach()


def test_multitask_there_and_back(llama: Any, tmp_path: Path) -> None:
    theirs = multitask(llama)
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs")
    assert isinstance(adapter.config, MultitaskPromptTuningConfig)
    assert (adapter.config.num_tasks, adapter.config.num_ranks) == (TASKS, RANK)
    module = make_module(adapter, trainable=True)
    assert isinstance(module, MultitaskPrompt)
    assert all(parameter.requires_grad for parameter in module.parameters())
    for task in range(TASKS):
        assert torch.equal(module()[task], bank(theirs, task))
    assert torch.equal(module(torch.tensor([2, 0])), module()[[2, 0]])

    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
    manifest = Manifest.create(llama, adapter.config)
    write_adapter(tmp_path / "ours", module=module, config=adapter.config, manifest=manifest)
    assert not (tmp_path / "ours" / "training_state.safetensors").exists()
    again = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "ours").eval()
    for task in range(TASKS):
        assert torch.equal(bank(again, task), module.bake()[task])
    frozen = make_module(read_adapter(tmp_path / "ours"))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    write_adapter(tmp_path / "twice", module=frozen, config=adapter.config, manifest=manifest)
    assert contents(tmp_path / "twice") == contents(tmp_path / "ours")


def test_multitask_gradients_are_pefts(llama: Any) -> None:
    theirs = multitask(llama)
    encoder = theirs.prompt_encoder["default"]
    config = MultitaskPromptTuningConfig(P, init="random", num_tasks=TASKS, num_ranks=RANK)
    ours = MultitaskPrompt(32, config)
    ours.load_state_dict({key.replace("embedding.weight", "embedding"): t for key, t in encoder.state_dict().items()})
    tasks = torch.tensor([2, 0])
    weights = torch.randn(2, P, 32)
    (theirs.get_prompt(2, tasks) * weights).sum().backward()
    (ours()[tasks] * weights).sum().backward()
    for mine, other in (
        (ours.embedding, encoder.embedding.weight),
        (ours.prefix_task_cols, encoder.prefix_task_cols),
        (ours.prefix_task_rows, encoder.prefix_task_rows),
    ):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("how", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_multitask_begins_from_a_source(how: str, llama: Any, tmp_path: Path) -> None:
    multitask(llama).save_pretrained(tmp_path)
    path = str(tmp_path / "adapter_model.safetensors")
    source = load_file(path)
    options: dict[str, Any] = {
        "prompt_tuning_init": how, "prompt_tuning_init_state_dict_path": path, "prompt_tuning_init_task": 1,
        "num_ranks": RANK, "num_virtual_tokens": P,
    }  # fmt: skip
    ours = MultitaskPrompt(32, MultitaskPromptTuningConfig(**options), source=source)
    theirs = get_peft_model(
        copy.deepcopy(llama), peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_tasks=1, **options)
    ).prompt_encoder["default"]
    assert torch.equal(ours.embedding, theirs.embedding.weight)
    if how != "ONLY_SOURCE_SHARED":  # the rest is random there
        assert torch.equal(ours.prefix_task_cols, theirs.prefix_task_cols)
        assert torch.equal(ours.prefix_task_rows, theirs.prefix_task_rows)


def test_cpt_trains_as_peft_does(llama: Any) -> None:
    theirs = cpt(llama).train()
    encoder = theirs.prompt_encoder["default"]
    config = CPTConfig(**EXAMPLES)
    ours = CPTPrompt(32, config, llama.get_input_embeddings()(torch.tensor(config.cpt_token_ids)))
    table = llama.get_input_embeddings()
    optimizers = [torch.optim.SGD([p], lr=5.0) for p in (encoder.delta_embedding.weight, ours.delta_embedding)]
    for step in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        expected = theirs(input_ids=IDS, labels=IDS.clone()).loss
        expected.backward()
        embeds = torch.cat((ours().expand(2, -1, -1), table(IDS).detach()), dim=1)
        labels, types = cpt_labels(config, IDS)
        loss = cpt_loss(config, llama(inputs_embeds=embeds).logits, labels, types)
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.delta_embedding.grad, encoder.delta_embedding.weight.grad, rtol=1e-4, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
        if step:
            assert ours.delta_embedding.norm(dim=1).max() > 0
    assert torch.equal(ours.delta_embedding[3], torch.zeros(32))  # an answer's token stays
    torch.testing.assert_close(ours(), theirs.get_prompt(1)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.bake(), ours().detach())


def test_cpt_types_of_the_text_are_pefts(llama: Any) -> None:
    theirs, config = cpt(llama).eval(), CPTConfig(**EXAMPLES)
    given = torch.tensor([[0, 1, 2, 2, 3, 4], [1, 2, 3, 4, 4, 4]])
    expected = theirs(input_ids=IDS, labels=IDS.clone(), input_type_mask=given.clone())
    labels, types = cpt_labels(config, IDS, given)
    assert given.max() == 4  # what the caller gave stays as it was
    torch.testing.assert_close(cpt_loss(config, expected.logits, labels, types), expected.loss)


def test_cpt_there_and_back(llama: Any, tmp_path: Path) -> None:
    theirs = cpt(llama)
    with torch.no_grad():
        theirs.prompt_encoder["default"].delta_embedding.weight.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    prompt = load_file(tmp_path / "theirs" / "adapter_model.safetensors")["prompt_embeddings"]
    adapter = read_adapter(tmp_path / "theirs")
    assert isinstance(adapter.config, CPTConfig)
    assert {key: getattr(adapter.config, key) for key in EXAMPLES} == EXAMPLES
    module = make_module(adapter, trainable=True)
    assert isinstance(module, CPTPrompt)
    assert torch.equal(module.bake(), prompt)

    with torch.no_grad():
        module.delta_embedding.normal_(std=0.01)
    manifest = Manifest.create(llama, adapter.config)
    write_adapter(tmp_path / "ours", module=module, config=adapter.config, manifest=manifest)
    again = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "ours").eval()
    assert torch.equal(again.get_prompt(1)[0], module.bake())
    resumed = make_module(read_adapter(tmp_path / "ours"), trainable=True)
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name]), name
    frozen = make_module(read_adapter(tmp_path / "ours"))
    torch.testing.assert_close(frozen.bake(), module.bake())
    write_adapter(tmp_path / "twice", module=frozen, config=adapter.config, manifest=manifest)


@pytest.mark.parametrize("make", [multitask, cpt])
def test_our_files_say_what_pefts_say(make: Any, llama: Any, tmp_path: Path) -> None:
    make(llama).save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs")
    manifest = Manifest.create(llama, adapter.config)
    module = make_module(adapter, trainable=True)
    write_adapter(tmp_path / "ours", module=module, config=adapter.config, manifest=manifest)
    one, other = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    other["base_model_name_or_path"] = other["base_model_name_or_path"] or None  # "" by PEFT 0.20, of a model without
    assert {k: other[k] for k in one} == one
    assert other.keys() - one.keys() == {"peft_version"}
    tensors = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert {k: v.shape for k, v in tensors[0].items()} == {k: v.shape for k, v in tensors[1].items()}


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (multitask, {"num_tasks": 4}, r"prefix_task_cols: expected shape \[4, 5, 2\], got \[3, 5, 2\]"),
        (multitask, {"num_ranks": None}, "num_ranks: expected an integer"),
        (multitask, {"num_tasks": True}, "num_tasks: expected an integer"),
        (multitask, {"peft_type": "PROMPT_TUNING"}, "prefix_task_cols: unknown tensor"),
        (cpt, {"cpt_token_ids": [5, 6]}, "cpt_tokens_type_mask has 8 numbers for 2|cpt_mask has 8 numbers for 2"),
        (cpt, {"cpt_token_ids": 5}, "cpt_token_ids must be|has no len"),
        (cpt, {"cpt_tokens_type_mask": [-1] * 8}, "cpt_tokens_type_mask must be a list of integers"),
        (cpt, {"opt_projection_epsilon": None}, "opt_projection_epsilon must be a number"),
        (cpt, {"opt_weighted_loss_type": "more"}, "opt_weighted_loss_type must be one of"),
    ],
)
def test_a_wrong_field_is_named(make: Any, changes: dict[str, Any], message: str, llama: Any, tmp_path: Path) -> None:
    make(llama).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path)


def test_a_manifest_of_other_tasks_takes_no_memory(llama: Any, tmp_path: Path) -> None:
    multitask(llama).save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs")
    module = make_module(adapter)
    folder = write_adapter(
        tmp_path / "ours", module=module, config=adapter.config, manifest=Manifest.create(llama, adapter.config)
    )
    path = folder / "prefixcore_manifest.json"
    fields = json.loads(path.read_text())
    for changes, message in (
        ({"config": {**fields["config"], "num_tasks": 2**40}}, "config.num_tasks: does not agree"),
        ({"method": "prompt", "config": {"num_virtual_tokens": P, "init": "random"}}, "does not agree"),
    ):
        path.write_text(json.dumps({**fields, **changes}))
        with pytest.raises(AdapterError, match=message):
            read_adapter(folder)


def test_configurations_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="num_tasks must be"):
        MultitaskPromptTuningConfig(3, num_tasks=0)
    with pytest.raises(ValueError, match="needs prompt_tuning_init_state_dict_path"):
        MultitaskPromptTuningConfig(3, prompt_tuning_init="EXACT_SOURCE_TASK")
    with pytest.raises(ValueError, match="prompt_tuning_init must be one of"):
        MultitaskPromptTuningConfig(3, prompt_tuning_init="SOME")
    with pytest.raises(ValueError, match="leave init and init_text out"):
        CPTConfig(init="random", cpt_token_ids=[3])
    with pytest.raises(ValueError, match="num_virtual_tokens is 3, but cpt_token_ids has 2"):
        CPTConfig(3, cpt_token_ids=[3, 4])
    with pytest.raises(ValueError, match="init='vocab' needs the model's embeddings"):
        MultitaskPrompt(8, MultitaskPromptTuningConfig(3))
    config = MultitaskPromptTuningConfig(3, init="random", num_tasks=2)
    assert MultitaskPromptTuningConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert dataclasses.replace(config, num_tasks=4).num_tasks == 4
    assert CPTConfig(**CPTConfig(**EXAMPLES).to_dict()).to_dict() == CPTConfig(**EXAMPLES).to_dict()


@pytest.mark.parametrize("trainable", [False, True])
def test_what_peft_saved_is_attached_and_each_row_names_its_task(llama: Any, tmp_path: Path, trainable: bool) -> None:
    theirs = multitask(llama)
    theirs.save_pretrained(tmp_path)
    model, ids, tasks = copy.deepcopy(llama), torch.cat((IDS, IDS[:1])), torch.tensor([2, 0, 1])
    handle = prefixcore.load(model, tmp_path, trainable=trainable)
    expected, got = theirs(ids, labels=ids, task_ids=tasks), model(ids, labels=ids, task_ids=tasks)
    torch.testing.assert_close(got.logits, expected.logits[:, P:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-5)
    if trainable:
        expected.loss.backward()
        got.loss.backward()
        encoder = theirs.prompt_encoder["default"]
        for name in ("prefix_task_cols", "prefix_task_rows"):
            torch.testing.assert_close(getattr(handle.module, name).grad, getattr(encoder, name).grad)
        torch.testing.assert_close(handle.module.embedding.grad, encoder.embedding.weight.grad)
    for row, task in enumerate(tasks.tolist()):
        torch.testing.assert_close(
            model(ids[row : row + 1], task_ids=[task]).logits, got.logits[row : row + 1], rtol=1e-5, atol=1e-5
        )
    with pytest.raises(ValueError, match="several tasks are attached"):
        model(ids)
    with pytest.raises(ValueError, match="7 is not attached; there are 0 to 2"):
        model(ids, task_ids=7)
    handle.save(tmp_path / "ours")
    again = prefixcore.load(copy.deepcopy(llama), tmp_path / "ours")
    torch.testing.assert_close(again.model(ids, task_ids=tasks).logits, got.logits, rtol=1e-5, atol=1e-5)


def test_multitask_in_a_bank_beside_others(llama: Any) -> None:
    model = copy.deepcopy(llama)
    bank = prefixcore.PromptBank(model)
    bank.attach("prefix", prefixcore.PrefixTuningConfig(4, init="random", seed=1))
    bank.attach("multi", MultitaskPromptTuningConfig(P, init="random", num_tasks=TASKS, seed=2))
    bank.attach("prompt", prefixcore.PromptTuningConfig(3, init="random", seed=3))
    ids = torch.cat((IDS, IDS))
    tasks = ["prefix", ("multi", 2), "prompt", ("multi", 0)]
    numbers = [0, 3, 4, 1]
    assert [bank.number(name) for name in bank] == [0, 1, 4]
    with torch.no_grad():
        got = model(ids, task_ids=tasks).logits
        assert torch.equal(model(ids, task_ids=numbers).logits, got)
        for row, task in enumerate(tasks):
            alone = model(ids[row : row + 1], task_ids=[task]).logits
            torch.testing.assert_close(got[row : row + 1], alone, rtol=2e-5, atol=2e-5)


def test_a_cpt_prompt_is_attached_for_what_it_has_learned(llama: Any, tmp_path: Path) -> None:
    theirs = cpt(llama)
    with torch.no_grad():
        theirs.prompt_encoder["default"].delta_embedding.weight.normal_(std=0.05)
    theirs.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path).eval()
    model = copy.deepcopy(llama)
    with prefixcore.load(model, tmp_path):
        expected = loaded(IDS).logits[:, len(TYPES) :]
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
