"""What PyTorch's FLOP counter sees of our ops: as much as of its own attention over the same keys."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop,
    sdpa_backward_flop_count,
    sdpa_flop,
    sdpa_flop_count,
)
from transformers import DynamicCache

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig

P, T = 5, 7
_aten = torch.ops.aten
ATTENTION_OF_A_CPU: Any = {
    _aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop.__wrapped__,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop.__wrapped__,
}
"""PyTorch's own formulas, for the one kernel of its attention that it leaves out."""

pytestmark = pytest.mark.filterwarnings("ignore")


def counting() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=ATTENTION_OF_A_CPU)


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").requires_grad_(False)


def test_a_model_costs_what_its_own_attention_over_concatenated_keys_does() -> None:
    model, ids = llama(), torch.randint(97, (2, T))
    with prefixcore.attach(model, PrefixTuningConfig(P, init="random")) as handle:
        with counting() as forward:
            loss = model(ids, labels=ids).loss
        with counting() as backward:
            loss.backward()
        pairs = [(key.requires_grad_(), value.requires_grad_()) for key, value in handle.bake()]
    cache = DynamicCache()
    for layer, (key, value) in enumerate(pairs):
        cache.update(key.expand(2, -1, -1, -1), value.expand(2, -1, -1, -1), layer)
    mask = torch.ones(2, P + T, dtype=torch.long)
    with counting() as own_forward:
        own_loss = model(ids, labels=ids, attention_mask=mask, past_key_values=cache).loss
    with counting() as own_backward:
        own_loss.backward()
    torch.testing.assert_close(loss, own_loss)
    attention = {packet for packet in own_forward.get_flop_counts()["Global"] if "attention" in str(packet)}
    assert attention, "PyTorch's attention was not what ran"
    assert forward.get_total_flops() == own_forward.get_total_flops() > 0
    assert backward.get_total_flops() == own_backward.get_total_flops() > 0


def shapes(**changes: Any) -> dict[str, Any]:
    """Rows with grouped heads and values of another size, behind prefixes of a bank."""
    made = {
        "query": torch.randn(3, 4, 6, 8),
        "key": torch.randn(3, 2, 9, 8),
        "value": torch.randn(3, 2, 9, 16),
        "prefix_key": torch.randn(2, 2, P, 8, requires_grad=True),
        "prefix_value": torch.randn(2, 2, P, 16, requires_grad=True),
        "prefix_index": torch.tensor([0, 1, -1]),
    }
    return {**made, **changes}


def counted(arguments: dict[str, Any]) -> tuple[int, int]:
    """What forward and backward of `prefix_attention` cost."""
    with FlopCounterMode(display=False) as forward:
        out = prefixcore.prefix_attention(**arguments)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_grouped_heads_and_a_bank() -> None:
    query, key, value = (3, 4, 6, 8), (3, 2, 9 + P, 8), (3, 2, 9 + P, 16)
    expected = sdpa_flop_count(query, key, value), sdpa_backward_flop_count((3, 4, 6, 16), query, key, value)
    assert counted(shapes()) == expected


def test_packed_sequences_are_counted_by_themselves() -> None:
    def each(length: int) -> tuple[Any, Any, Any]:
        return (1, 4, length, 8), (1, 2, length + P, 8), (1, 2, length + P, 16)

    packed = shapes(
        query=torch.randn(1, 4, 9, 8), key=torch.randn(1, 2, 9, 8), value=torch.randn(1, 2, 9, 16),
        prefix_index=torch.tensor([0, 1]), cu_seqlens=torch.tensor([0, 3, 9]),
    )  # fmt: skip
    expected = (
        sum(sdpa_flop_count(*each(length)) for length in (3, 6)),
        sum(sdpa_backward_flop_count((1, 4, length, 16), *each(length)) for length in (3, 6)),
    )
    assert counted(packed) == expected


def test_fake_tensors_are_counted_too() -> None:
    from torch._subclasses import FakeTensorMode

    expected = counted(shapes())
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in shapes().items()}
        assert counted(fake) == expected
        one = {"query": torch.randn(1, 4, 9, 8), "key": torch.randn(1, 2, 9, 8), "value": torch.randn(1, 2, 9, 16)}
        whole = counted(shapes(**one, prefix_index=torch.tensor([0])))
        assert counted(shapes(**one, prefix_index=torch.tensor([0, 1]), cu_seqlens=torch.tensor([0, 3, 9]))) == whole


def test_looking_up_costs_nothing() -> None:
    virtual = torch.randn(P, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        prefixcore.soft_embedding(torch.tensor([[97, 3, 98]]), torch.randn(97, 8), virtual).sum().backward()
    assert virtual.grad is not None
    assert counter.get_total_flops() == 0
    model, ids = llama(), torch.randint(97, (2, T))
    with counting() as bare:
        model(torch.randint(97, (2, P + T)))
    with prefixcore.attach(model, PromptTuningConfig(P)), counting() as prompted:
        model(ids)
    assert prompted.get_total_flops() == bare.get_total_flops()


@pytest.mark.parametrize("first", ["prefixcore", "torch.utils.flop_counter"])
def test_whichever_is_imported_first(first: str) -> None:
    """And nobody pays for the counter who does not count."""
    second = "torch.utils.flop_counter" if first == "prefixcore" else "prefixcore"
    program = f"""
import sys, {first}
assert {first!r} != "prefixcore" or "torch.utils.flop_counter" not in sys.modules
import {second}, torch
from torch.utils.flop_counter import FlopCounterMode
x = torch.randn(1, 2, 3, 4)
with FlopCounterMode(display=False) as counter:
    prefixcore.prefix_attention(x, x, x)
assert counter.get_total_flops() == 4 * 2 * 3 * 3 * 4, counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
