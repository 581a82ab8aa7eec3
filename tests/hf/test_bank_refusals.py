"""What a bank refuses says how to go on."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import prefixcore
from prefixcore import PrefixTuningConfig, PromptBank, PromptTuningConfig
from prefixcore.adapters import AdapterError

from .models import make, tokens


@pytest.mark.parametrize("memory", [-1, "1GB", 1e9, True], ids=str)
def test_memory_is_a_number_of_bytes(memory: Any) -> None:
    with pytest.raises(ValueError, match="memory: expected a number of bytes"):
        PromptBank(make("llama"), memory=memory)


def test_a_second_adapter_is_told_of_the_bank() -> None:
    model = make("llama")
    prefixcore.attach(model, PromptTuningConfig(3))
    with pytest.raises(ValueError, match=r"handle\.detach\(\) first, or make a prefixcore\.PromptBank"):
        prefixcore.attach(model, PromptTuningConfig(3))


def test_a_peft_model_is_told_of_accelerate() -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(TypeError, match=r"prefixcore\.accelerate\(peft_model\)"):
        prefixcore.attach(peft.get_peft_model(make("llama"), config), PrefixTuningConfig(3))


def test_a_head_that_a_task_type_means_is_not_left_out_in_silence() -> None:
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            pad_token_id=0,
        )
    )  # fmt: skip
    bank = PromptBank(model)
    for config in (PrefixTuningConfig(3, task_type="SEQ_CLS"), PromptTuningConfig(3, modules_to_save=["score"])):
        with pytest.raises(NotImplementedError, match=r"score is to be trained along.*modules_to_save=\[\]"):
            bank.attach("a", config)
    bank.attach("a", PrefixTuningConfig(3, task_type="SEQ_CLS", modules_to_save=[]))


def test_the_checkpoint_of_a_bank_says_what_is_in_it(tmp_path: Any) -> None:
    model = make("llama")
    with PromptBank(model) as bank:
        bank.attach("capitals", PrefixTuningConfig(3, seed=0)).save(tmp_path / "prefixcore" / "capitals")
    with pytest.raises(AdapterError, match=r"a bank of .*'capitals'.*: load prefixcore/NAME"):
        prefixcore.load(model, tmp_path)
    prefixcore.load(model, tmp_path / "prefixcore" / "capitals").detach()


def _bank() -> tuple[Any, PromptBank]:
    model = make("llama")
    bank = PromptBank(model)
    bank.attach("a", PrefixTuningConfig(3, seed=0))
    bank.attach("b", PrefixTuningConfig(4, seed=1))
    bank.attach("tasks", prefixcore.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=3, num_ranks=1, seed=2))
    return model, bank


def test_a_batch_that_is_packed_by_positions_alone_is_told_what_it_lacks() -> None:
    model, _ = _bank()
    ids, positions = tokens(1, 5), torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match=r"for each of 1 rows, got 2: position_ids restart .* cu_seq_lens_q"):
        model(ids, position_ids=positions, task_ids=["a", "b"])
    with pytest.raises(ValueError, match=r"for each of 1 rows, got 2$"):
        model(ids, task_ids=["a", "b"])


@torch.no_grad()
def test_a_name_and_a_number_for_two_rows_are_two_tasks() -> None:
    model, bank = _bank()
    ids = tokens(2, 5)
    expected = model(ids, task_ids=["a", "b"]).logits
    assert torch.equal(model(ids, task_ids=("a", bank.number("b"))).logits, expected)


@torch.no_grad()
def test_a_pair_that_may_be_one_task_or_two_is_refused() -> None:
    model, bank = _bank()
    with pytest.raises(ValueError, match=r"say \[\('tasks', 1\)\] for the one, \['tasks', 1\] for the other"):
        model(tokens(2, 5), task_ids=("tasks", 1))
    one, number = model(tokens(3, 5), task_ids=("tasks", 1)).logits, bank.number("tasks") + 1
    assert torch.equal(one, model(tokens(3, 5), task_ids=[number] * 3).logits)
    one = model(tokens(2, 5), task_ids=[("tasks", 1)]).logits
    assert torch.equal(one, model(tokens(2, 5), task_ids=[number] * 2).logits)


@pytest.mark.parametrize("cast", [int, None], ids=["list", "tensor"])
def test_task_ids_in_one_graph(cast: Any) -> None:
    torch._dynamo.reset()
    model, _ = _bank()
    ids, numbers = tokens(2, 5), [0, 1]
    with torch.no_grad():
        expected = model(ids, task_ids=numbers).logits
        given = numbers if cast else torch.tensor(numbers)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        if cast:
            torch.testing.assert_close(compiled(ids, task_ids=given).logits, expected)
        else:
            with pytest.raises(Exception, match="task_ids is a tensor.*give a list of names or numbers"):
                compiled(ids, task_ids=given)
            torch.testing.assert_close(torch.compile(model, backend="eager")(ids, task_ids=given).logits, expected)
    torch._dynamo.reset()


def test_a_batch_without_rows_is_refused_in_words() -> None:
    model = make("llama")
    with (
        prefixcore.attach(model, PromptTuningConfig(3, seed=0)),
        pytest.raises(ValueError, match=r"the batch has no rows \(\[0, 5\]\)"),
    ):
        model(torch.zeros(0, 5, dtype=torch.long))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sequence_that_processes_share_is_refused(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    """DeepSpeed keeps their group in a module of its own; the rest of DeepSpeed is not needed to see it."""
    model = make("llama")
    prefixcore.attach(model, PrefixTuningConfig(3, init="zero"))
    group = SimpleNamespace(size=lambda: processes)
    name = "deepspeed.runtime.sequence_parallel.parallel_state_sp"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(_SEQUENCE_PARALLEL_GROUP=group))  # type: ignore[arg-type]
    if processes == 1:
        model(input_ids=tokens(1, 4))
    else:
        with pytest.raises(NotImplementedError, match="a part of every sequence"):
            model(input_ids=tokens(1, 4))
