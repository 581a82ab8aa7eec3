"""A bank of adapters: each row gets what it gets alone, whatever the others are."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import prefixcore
from prefixcore import PackedCollator, PrefixTuningConfig, PromptBank, PromptTuningConfig

from .models import FAMILIES, assert_same, close, make, padded, state, tokens, window_of
from .test_cached_attention import make as make_cached
from .tiny_models import tiny_config

CONFIGS = {
    "long": PrefixTuningConfig(5, init="random", seed=1),
    "short": PrefixTuningConfig(2, init="random", seed=2),
    "some layers": PrefixTuningConfig(4, init="random", seed=3, layers=[1]),
    "mlp": PrefixTuningConfig(3, init="random", reparameterization="mlp", seed=4),
    "prompt": PromptTuningConfig(6, init="random", seed=5),
    "short prompt": PromptTuningConfig(1, init="random", seed=6),
}
MIXTURES = [
    ["long", "short", None],
    ["prompt", "short prompt", None],
    ["prompt", "long", None],
    ["short prompt", "some layers", "mlp"],
    ["prompt", "prompt", "prompt"],
    [None, None, None],
]


def fill(model: Any, names: list[str | None]) -> PromptBank:
    bank = PromptBank(model)
    for name in CONFIGS:
        if name in names:
            bank.attach(name, CONFIGS[name])
    return bank


@pytest.mark.parametrize("names", MIXTURES, ids=str)
@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.usefixtures("prompts_computed")
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_that_of_its_adapter_alone(family: str, side: str, names: Any) -> None:
    """Logits, loss and gradients, without labels and with them, with gradients and without."""
    changes = window_of(family, 64)
    model, batch = make(family, **changes), padded(side)
    bank = fill(model, [*names, "long"])
    out = model(**batch, task_ids=names)
    if any(names):
        out.loss.backward()
    with torch.no_grad():
        evaluated = [
            model(**batch, task_ids=names).logits,
            model(batch["input_ids"], attention_mask=batch["attention_mask"], task_ids=names).logits,
        ]
    seen = batch["attention_mask"].bool()
    alone = make(family, **changes)
    losses, rows = [], []
    for row, name in enumerate(names):
        inputs = {key: value[row : row + 1, seen[row]] for key, value in batch.items()}
        if name is None:
            found = alone(**inputs)
            losses.append((found.loss * (inputs["labels"].shape[1] - 1), inputs["labels"].shape[1] - 1))
        else:
            handle = prefixcore.attach(alone, CONFIGS[name])
            found = alone(**inputs)
            first = 0 if CONFIGS[name].method == "prompt" else 1
            losses.append((found.loss * (inputs["labels"].shape[1] - first), inputs["labels"].shape[1] - first))
            rows.append((name, handle, losses[-1][0]))
            handle.detach()
        for logits in (out.logits, *evaluated):
            close(logits[row, seen[row]], found.logits[0])
    count = sum(number for _, number in losses)
    # Of padding on the left, and no soft prompt, transformers predicts the first token from padding.
    if side != "left" or any(name and CONFIGS[name].method == "prompt" for name in names):
        close(out.loss, sum(loss for loss, _ in losses) / count)
        for name, handle, loss in rows:
            if names.count(name) == 1:
                (loss / count).backward()
                for got, expected in zip(bank[name].parameters(), handle.parameters(), strict=True):
                    close(got.grad, expected.grad)


def test_only_those_that_are_named_get_gradients() -> None:
    model = make("llama")
    bank = fill(model, list(CONFIGS))
    model(**padded("left"), task_ids=["long", "prompt", "long"]).loss.backward()
    got = {name for name in bank if any(p.grad is not None for p in bank[name].parameters())}
    assert got == {"long", "prompt"}


WAYS: list[dict[str, Any]] = [
    {},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 2},
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"prefill_chunk_size": 3},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("names", [MIXTURES[0], MIXTURES[1], MIXTURES[2]], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_generate(family: str, names: Any, way: dict[str, Any]) -> None:
    model, batch = make(family), padded("left")
    del batch["labels"]
    fill(model, names)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **way}
    got = model.generate(**batch, task_ids=names, **options)[:, 9:]
    per_row = options.get("num_return_sequences", 1)
    for row, name in enumerate(names):
        alone = batch["input_ids"][row : row + 1, batch["attention_mask"][row].bool()]
        expected = model.generate(alone, task_ids=[name], **options)[:, alone.shape[1] :]
        assert torch.equal(got[row * per_row : (row + 1) * per_row], expected)


@pytest.mark.parametrize("names", [MIXTURES[0], MIXTURES[2]], ids=str)
def test_sampling_and_assistants(names: Any) -> None:
    model, assistant = make("llama"), make("llama", seed=9, num_hidden_layers=1)
    fill(model, names)
    for name in names:
        ids = tokens(1, 6)
        options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None, "task_ids": [name]}
        expected = model.generate(ids, do_sample=False, **options)
        assert torch.equal(model.generate(ids, do_sample=False, assistant_model=assistant, **options), expected)
        assert torch.equal(model.generate(ids, do_sample=False, prompt_lookup_num_tokens=2, **options), expected)
        torch.manual_seed(0)
        drawn = model.generate(ids, do_sample=True, **options)
        torch.manual_seed(0)
        assert torch.equal(model.generate(ids, do_sample=True, **options), drawn)


@pytest.mark.parametrize("names", MIXTURES[:-1], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed(family: str, names: Any) -> None:
    changes = window_of(family, 64)
    model = make(family, **changes)
    bank = fill(model, names)
    parts = [tokens(1, length, seed=length)[0] for length in (5, 2, 7)]
    features = [{"input_ids": p, "labels": p, "task_ids": name} for p, name in zip(parts, names, strict=True)]
    batch = PackedCollator()(features)
    together = model(**batch, use_cache=False)
    together.loss.backward()
    gradients = {name: [p.grad.clone() for p in bank[name].parameters()] for name in bank}
    keep = batch.pop("logits_to_keep")
    labels = batch.pop("labels")
    whole = model(**batch, use_cache=False).logits
    close(whole[:, keep], together.logits)
    model.zero_grad()
    start, total, count = 0, 0.0, int((labels != -100).sum())
    for part, name in zip(parts, names, strict=True):
        own = part.clone()
        own[0] = -100
        found = model(part[None], labels=own[None], task_ids=[name], use_cache=False)
        close(whole[:, start : start + len(part)], found.logits)
        total, start = total + found.loss * (len(part) - 1), start + len(part)
    close(together.loss, total / count)
    (total / count).backward()
    for name in bank:
        for parameter, expected in zip(bank[name].parameters(), gradients[name], strict=True):
            close(parameter.grad, expected)


def test_numbers_names_one_for_all_and_tensors() -> None:
    model, batch = make("llama"), padded("right")
    bank = fill(model, ["long", "prompt"])
    ids = batch["input_ids"]
    with torch.no_grad():
        expected = model(ids, task_ids=["long", None, "prompt"]).logits
        numbers = [bank.number("long"), -1, bank.number("prompt")]
        assert torch.equal(model(ids, task_ids=numbers).logits, expected)
        assert torch.equal(model(ids, task_ids=torch.tensor(numbers)).logits, expected)
        assert torch.equal(model(ids, task_ids="long").logits, model(ids, task_ids=["long"] * 3).logits)
        assert torch.equal(model(ids, task_ids=-1).logits, model(ids, task_ids=[None] * 3).logits)
        assert torch.equal(model.forward(ids, task_ids=numbers).logits, expected)
    refused = [
        (None, "several tasks are attached: say which one"),
        (["long", "prompt"], "one for each of 3 rows, got 2"),
        (["long", "none such", None], r"'none such' is not attached; there are 'long' \(0\), 'prompt' \(1\)"),
        (7, "7 is not attached"),
    ]
    for task_ids, message in refused:
        with pytest.raises(ValueError, match=message):
            model(ids, task_ids=task_ids)
    with pytest.raises(TypeError, match="expected names or numbers"):
        model(ids, task_ids={"long": 1})


def test_a_row_of_a_single_adapter_may_go_without() -> None:
    model, batch = make("llama"), padded("right")
    bare = model(batch["input_ids"]).logits
    prefixcore.attach(model, CONFIGS["long"])
    got = model(batch["input_ids"], task_ids=[0, -1, 0]).logits
    close(got[1], bare[1])
    close(got[[0, 2]], model(batch["input_ids"]).logits[[0, 2]])


def test_one_is_added_replaced_and_removed_without_touching_the_others(tmp_path: Path) -> None:
    model, ids = make("llama"), tokens(2, 6)
    before = state(model)
    with prefixcore.attach(model, PrefixTuningConfig(3, init="random", seed=8)) as handle:
        saved = handle.save(tmp_path / "adapter")
        frozen = model(ids).logits
    bank = fill(model, ["long", "prompt"])
    with torch.no_grad():
        expected = {name: model(ids, task_ids=name).logits for name in bank}
        cache = model(ids, task_ids="long", use_cache=True).past_key_values
        bank.load("loaded", saved)
        torch.testing.assert_close(model(ids, task_ids="loaded").logits, frozen, rtol=1e-6, atol=1e-6)
        with pytest.raises(ValueError, match="named 'long' already"):
            bank.attach("long", CONFIGS["short"])
        with pytest.raises(prefixcore.AdapterError):
            bank.load("long", tmp_path / "nothing", replace=True)
        assert torch.equal(model(ids, task_ids="long").logits, expected["long"])
        numbers = {name: bank.number(name) for name in bank}
        bank.attach("long", CONFIGS["short"], replace=True)
        with pytest.raises(ValueError, match="behind other virtual tokens"):  # a sequence of the one that was there
            model(tokens(2, 1), past_key_values=cache, task_ids="long")
        assert not torch.allclose(model(ids, task_ids="long").logits, expected["long"])
        assert torch.equal(model(ids, task_ids="prompt").logits, expected["prompt"])
        bank.remove("loaded")
        assert bank.names == ["prompt", "long"]
        assert torch.equal(model(ids, task_ids="prompt").logits, expected["prompt"])
        with pytest.raises(ValueError, match="is not attached"):
            model(ids, task_ids=numbers["loaded"])
        bank.load("again", saved)
        assert bank.number("again") > max(numbers.values())  # a number that was kept somewhere names nothing else
    handle = bank["prompt"]
    handle.detach()
    assert "prompt" not in bank
    bank.detach()
    torch.set_rng_state(before["rng"])
    assert_same(before, state(model))
    assert prefixcore.attach(model, CONFIGS["long"]).is_attached


def test_names_and_what_is_refused(tmp_path: Path) -> None:
    model = make("llama")
    bank = fill(model, ["long"])
    for name in ("", "a.b", 3, "/tmp/a", "a/b", "a\\b", "a\0", "\ud800", "a" * 201, "training"):
        with pytest.raises(ValueError, match="a text without a dot"):
            bank.attach(name, CONFIGS["short"])  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="no adapter is named 'x'; there are long"):
        bank["x"]
    with pytest.raises(TypeError, match="config must be"):
        bank.attach("x", {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="attached to LlamaForCausalLM already"):
        PromptBank(model)
    longest = "é" * 100
    bank.attach(longest, CONFIGS["short"])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "prefixcore" / longest).is_dir()
    bank.remove(longest)
    assert repr(bank) == "PromptBank(1 adapters on LlamaForCausalLM: long)"


def test_adapters_of_a_bank_are_trained_together(tmp_path: Path) -> None:
    model = make("llama")
    bank = fill(model, ["long", "prompt"])
    before = {name: [p.detach().clone() for p in bank[name].parameters()] for name in bank}
    data = [
        {"input_ids": row.tolist(), "labels": row.tolist(), "task_ids": ["long", "prompt", None][i % 3]}
        for i, row in enumerate(tokens(6, 5))
    ]
    arguments = TrainingArguments(tmp_path, max_steps=2, per_device_train_batch_size=3, use_cpu=True, report_to=[])
    Trainer(model, arguments, train_dataset=data, data_collator=PackedCollator()).train()
    for name in bank:
        assert not any(torch.equal(a, b) for a, b in zip(bank[name].parameters(), before[name], strict=True))
        bank[name].save(tmp_path / name)
        with torch.no_grad():
            expected = model(tokens(2, 4), task_ids=name).logits
        other = make("llama")
        prefixcore.load(other, tmp_path / name)
        close(other(tokens(2, 4)).logits, expected)


def test_hundreds_in_a_budget_of_memory(tmp_path: Path) -> None:
    """On the CPU nothing is copied; a device that holds shapes alone shows what would be, and what gives way."""
    from prefixcore.hf.bank.residency import Residency

    model, ids = make("llama"), tokens(3, 4)
    handles = []
    for seed in range(3):
        with prefixcore.attach(model, PrefixTuningConfig(4, init="random", seed=seed)) as handle:
            handles.append((handle.save(tmp_path / str(seed)), model(ids).logits.detach()))
    bank = PromptBank(model, memory=10_000)
    for i in range(300):
        bank.load(f"task {i}", handles[i % 3][0])
    for chosen in ([0, 1, 2], [299, 150, 31], [7, 7, 8]):
        got = model(ids, task_ids=[f"task {i}" for i in chosen]).logits
        for row, i in enumerate(chosen):
            close(got[row], handles[i % 3][1][row])

    size = 2 * 2 * 2 * 4 * 16 * 4  # two layers of keys and values [2, 4, 16], float32
    residency, device = Residency(3 * size), torch.device("meta")
    values = [(torch.ones(2, 4, 16), torch.ones(2, 4, 16))] * 2
    for uid in "abcab":
        residency.get(uid, values, device)
    assert residency.bytes == 3 * size
    kept = residency.get("a", values, device)
    residency.get("d", values, device)  # c was used longest ago
    assert residency.get("a", values, device) is kept
    assert {uid for uid, _ in residency._copies} == {"a", "b", "d"}
    residency.drop("a")
    assert residency.bytes == 2 * size
    residency.get("x", values * 9, device)  # more than there is room for: used, and not kept
    assert residency.bytes <= 3 * size


@pytest.mark.parametrize("config", [PrefixTuningConfig(4, init="random"), PromptTuningConfig(4, init="random")])
def test_a_changed_adapter_is_copied_anew(config: Any, tmp_path: Path) -> None:
    """A device that holds shapes alone shows when: a copy from before the change would be seen by every later call."""
    model = make("llama")
    with prefixcore.attach(model, config) as handle:
        handle.save(tmp_path / "a")
    bank = PromptBank(model)
    module = bank.load("a", tmp_path / "a").module
    adapter, residency, device = bank._bank.adapters["a"], bank._bank.residency, torch.device("meta")

    def copied() -> Any:
        return residency.get(adapter.uid, module(), device, adapter.version)

    first = copied()
    assert copied() is first
    with torch.no_grad():
        next(module.parameters()).mul_(0.5)
    second = copied()
    assert second is not first
    module.load_state_dict(module.state_dict())
    assert copied() is not second
    assert residency.bytes == sum(p.numel() * p.element_size() for p in module.parameters())


def test_one_that_cannot_take_the_place_of_another_leaves_it_there() -> None:
    model, ids = make_cached("bloom"), tokens(2, 6)
    bank = PromptBank(model)
    handle = bank.attach("a", PrefixTuningConfig(4, init="random"))
    expected = model(ids, task_ids="a").logits
    with pytest.raises(NotImplementedError, match="in every layer or in none"):
        bank.attach("a", PrefixTuningConfig(4, init="random", layers=[1]), replace=True)
    assert bank["a"] is handle
    assert torch.equal(model(ids, task_ids="a").logits, expected)


def test_threads_with_tasks_of_their_own() -> None:
    model, batch = make("llama"), padded("left")
    del batch["labels"]
    fill(model, list(CONFIGS))
    mixtures = [mixture for mixture in MIXTURES for _ in range(3)]
    with torch.no_grad():
        expected = [model(**batch, task_ids=names).logits for names in mixtures]
    start = threading.Barrier(3)

    def run(offset: int) -> int:
        start.wait()
        wrong = 0
        with torch.no_grad():
            for i in range(len(mixtures)):
                at = (i + offset) % len(mixtures)
                wrong += not torch.equal(model(**batch, task_ids=mixtures[at]).logits, expected[at])
        return wrong

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, (0, 5, 11))) == [0, 0, 0]


def test_a_copy_has_a_bank_of_its_own() -> None:
    model, ids = make("llama"), tokens(2, 5)
    bank = fill(model, ["long", "prompt"])
    with torch.no_grad():
        expected = model(ids, task_ids=["long", "prompt"]).logits
        cache = model(ids, task_ids=["long", "prompt"], use_cache=True).past_key_values
        other = copy.deepcopy(model)
        for handle in (bank["long"], bank["prompt"]):
            for parameter in handle.parameters():
                parameter.add_(1.0)
        assert torch.equal(other(ids, task_ids=["long", "prompt"]).logits, expected)
        more = tokens(2, 1)
        a = other(more, past_key_values=copy.deepcopy(cache), task_ids=["long", "prompt"]).logits
        assert torch.equal(a, other(more, past_key_values=cache).logits)  # the cache tells whose rows they are


@pytest.mark.parametrize("names", [MIXTURES[0], MIXTURES[2]], ids=str)
def test_gradient_checkpointing(names: Any) -> None:
    model, batch = make("llama").train(), padded("left")
    bank = fill(model, names)
    model(**batch, task_ids=names).loss.backward()
    expected = {name: [p.grad.clone() for p in bank[name].parameters()] for name in bank}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch, task_ids=names).loss.backward()
    for name in bank:
        for parameter, reference in zip(bank[name].parameters(), expected[name], strict=True):
            close(parameter.grad, reference)


@pytest.mark.parametrize("family", ["olmo2", "phi", "granitemoehybrid"])
@pytest.mark.parametrize("first", ["prefix", "prompt"])
def test_a_family_that_is_not_known_is_reached_from_a_bank(family: str, first: str, tmp_path: Path) -> None:
    """Whatever the bank holds when its first prefix comes, from a file here."""
    model = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    ids = torch.arange(5, 12)[None]
    with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=3, seed=1)) as handle:
        handle.save(tmp_path / "saved")
        expected = model(ids).logits
    bank = prefixcore.PromptBank(model)
    if first == "prompt":
        bank.attach("prompt", prefixcore.PromptTuningConfig(num_virtual_tokens=2))
    bank.load("prefix", tmp_path / "saved")
    torch.testing.assert_close(model(ids, task_ids=["prefix"]).logits, expected)
    assert (model(ids, task_ids=[None]).logits - expected).abs().max() > 1e-3
