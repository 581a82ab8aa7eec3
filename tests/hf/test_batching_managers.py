"""Continuous batching while the model, what is attached to it, and other managers change."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import peft
import pytest
import torch

import prefixcore
from prefixcore import PrefixTuningConfig, PTuningConfig
from prefixcore.hf.paged.bare_copy import bare_copy

from .models import Tokenizer, make
from .test_continuous_batching import BOTH, REQUESTS, attach, batch, move, one_by_one, options, small


def start(model: Any) -> Any:
    manager = model.init_continuous_batching(generation_config=options(), continuous_batching_config=small())
    manager.start()
    return manager


def answers(manager: Any, requests: list[list[int]] = REQUESTS, **given: Any) -> list[list[int]]:
    names, found = manager.add_requests(requests, **given), {}
    while len(found) < len(names):
        result = manager.get_result(timeout=60)
        assert result.error is None
        found[result.request_id] = result.generated_tokens
    return [found[name] for name in names]


def test_one_manager_stops_while_another_runs() -> None:
    """Transformers then sets back the attention of the model that the first one was given."""
    model = make("llama", attn_implementation="eager")
    attach(model, BOTH[0])
    expected = one_by_one(model)
    first, second = start(model), start(model)
    try:
        assert answers(first) == expected
        first.stop(block=True)
        assert answers(second) == expected
        assert batch(model) == expected
    finally:
        first.stop(block=True)
        second.stop(block=True)


@pytest.mark.parametrize("keep", [False, True])
def test_lora_that_is_switched_or_merged(keep: bool) -> None:
    model = make("llama")
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    attach(model, BOTH[0])
    outer: Any = peft.get_peft_model(model, lora).eval()
    generate = functools.partial(batch, outer, persistent_manager=keep)
    first = generate()
    assert first == one_by_one(outer)
    with outer.disable_adapter():
        assert generate() == one_by_one(outer) != first
    outer.merge_adapter()
    assert generate() == one_by_one(outer)
    outer.unmerge_adapter()
    assert generate() == one_by_one(outer)
    model.destroy_cached_continuous_batching_manager()


def test_an_encoder_with_dropout_in_a_model_that_is_training() -> None:
    model = make("llama")
    config = PTuningConfig(num_virtual_tokens=6, encoder_reparameterization_type="LSTM", encoder_dropout=0.5)
    handle = attach(model, config)
    expected = one_by_one(model)
    assert batch(model.train()) == expected
    assert all(module.training for module in handle.module.modules())


@pytest.mark.parametrize("keep", [False, True])
def test_other_changes_of_the_model(keep: bool) -> None:
    model = make("llama")
    attach(model, BOTH[1])
    layer, long = model.model.layers[0], [[5, 6, 7] * 20] * 2
    generate = functools.partial(batch, model, long, persistent_manager=keep)
    found = [generate()]
    layer.mlp.register_forward_hook(lambda module, args, output: output * 2)
    found.append(generate())
    assert found[-1] == one_by_one(model, long)
    layer.self_attn.scaling = 1.7
    found.append(generate())
    assert found[-1] == one_by_one(model, long)
    with torch.no_grad():
        layer.self_attn.v_proj.weight.mul_(-2)
    found.append(generate())
    assert found[-1] == one_by_one(model, long)
    assert len({str(each) for each in found}) == len(found)
    model.destroy_cached_continuous_batching_manager()


def test_weights_that_were_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = make("llama")
    attach(model, BOTH[0])
    assert batch(model) == one_by_one(model)


def test_what_was_detached_is_not_left_out_in_silence() -> None:
    model = make("llama")
    handle = attach(model, BOTH[0])
    manager = start(model)
    try:
        assert answers(manager) == one_by_one(model)
        handle.detach()
        with pytest.raises(RuntimeError, match="has been detached since.*start it anew"):
            manager.add_request(REQUESTS[0])
        attach(model, BOTH[1])
        with pytest.raises(RuntimeError, match="has been detached since"):
            manager.add_requests(REQUESTS)
    finally:
        manager.stop(block=True)


def test_another_adapter_of_the_same_name() -> None:
    model = make("llama")
    bank = prefixcore.PromptBank(model)
    config = PrefixTuningConfig(init_text="abcdefghijklmnopqrstuvwxyz" * 2)  # more than a page
    handle = bank.attach("one", config, tokenizer=Tokenizer())
    move(handle, 3)
    first = batch(model, task_ids="one", persistent_manager=True)
    manager = start(model)  # the one that was kept, with the pages of the first
    try:
        handle.detach()
        move(bank.attach("one", config, tokenizer=Tokenizer()), 5)
        with pytest.raises(RuntimeError, match="adapter 'one' was attached or changed after"):
            manager.add_requests(REQUESTS, task_ids="one")
    finally:
        manager.stop(block=True, keep_for_next_session=True)
    assert batch(model, task_ids="one", persistent_manager=True) == one_by_one(model, REQUESTS, ["one"] * 4) != first
    model.destroy_cached_continuous_batching_manager()


def test_threads_that_generate_and_attach() -> None:
    model = make("llama")
    bank = prefixcore.PromptBank(model)
    move(bank.attach("one", BOTH[0], tokenizer=Tokenizer()), 3)
    move(bank.attach("two", PrefixTuningConfig(num_virtual_tokens=5)), 4)
    names = ["one", "two", None, "two"]
    expected, found, errors = one_by_one(model, REQUESTS, names), [], []
    stop = threading.Event()

    def churn() -> None:
        try:
            for i in range(10**6):
                bank.attach(f"other {i}", PrefixTuningConfig(num_virtual_tokens=2)).detach()
                if stop.wait(0.001):
                    return
        except Exception as error:
            errors.append(error)

    def generate() -> None:
        try:
            found.extend(batch(model, task_ids=names) for _ in range(3))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=generate) for _ in range(2)]
    other = threading.Thread(target=churn)
    for thread in (other, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    other.join()
    assert not errors
    assert found == [expected] * 6


def test_ids_in_other_forms() -> None:
    model = make("llama")
    attach(model, BOTH[0])
    expected = batch(model)
    for form in (tuple, np.array, torch.tensor, lambda ids: torch.tensor([ids]), lambda ids: np.array([ids])):
        made = model.generate_batch([form(ids) for ids in REQUESTS], options(), small(), max_new_tokens=None)
        assert [each.prompt_ids for each in made.values()] == REQUESTS
        assert [each.generated_tokens for each in made.values()] == expected
    with pytest.raises(ValueError, match=r"expected ids from 0 to 96, got tensor\(\[1, 2\]\)"):
        model.generate_batch([torch.tensor([[1, 2], [3, 4]])])


def test_max_new_tokens_of_none_is_that_of_the_configuration() -> None:
    model = make("mistral", sliding_window=24)
    attach(model, BOTH[0])
    made = model.generate_batch([[5, 6]], options(max_new_tokens=5), small(), max_new_tokens=None)
    assert [each.generated_tokens for each in made.values()] == [one_by_one(model, [[5, 6]])[0][:5]]


def test_only_what_requests_name_is_made_ready() -> None:
    model = make("llama")
    bank = prefixcore.PromptBank(model)
    move(bank.attach("one", BOTH[0], tokenizer=Tokenizer()), 3)
    bank.attach("other", PrefixTuningConfig(num_virtual_tokens=4, layers=[1]))
    assert batch(model, task_ids="one") == one_by_one(model, REQUESTS, ["one"] * 4)
    with pytest.raises(NotImplementedError, match="seen by some layers alone"):
        model.generate_batch(REQUESTS, task_ids=["one", "one", "one", "other"])


def test_weights_that_accelerate_offloads_are_there_once(tmp_path: Path) -> None:
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    model = accelerate.dispatch_model(
        make("llama"), {**places, "model.layers.1": "disk"}, main_device="cpu", offload_dir=str(tmp_path)
    )
    attach(model, BOTH[0])
    assert batch(model) == one_by_one(model)
    hooks = [each.model.layers[1].mlp.up_proj._hf_hook for each in (model, bare_copy(model))]
    assert hooks[0] is not hooks[1]
    assert hooks[0].weights_map.dataset is hooks[1].weights_map.dataset
    whole = accelerate.cpu_offload(make("llama"), execution_device=torch.device("cpu"))
    attach(whole, BOTH[0])
    with pytest.raises(NotImplementedError, match="offloaded"):
        whole.generate_batch(REQUESTS)


def test_a_forward_that_another_library_puts_on_a_head() -> None:
    model = make("llama")
    attach(model, BOTH[0])
    head = model.lm_head

    def in_float32(hidden: torch.Tensor) -> torch.Tensor:  # as TRL's cast_lm_head_to_fp32
        return torch.nn.functional.linear(hidden.float(), -head.weight.float())

    head.forward = in_float32
    assert batch(model) == one_by_one(model)
    layer = model.model.layers[0].mlp
    inner = layer.forward
    layer.forward = lambda hidden: inner(hidden)
    with pytest.raises(NotImplementedError, match=r"the forward of model.layers.0.mlp is a function that calls"):
        model.generate_batch(REQUESTS)
