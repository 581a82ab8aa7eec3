"""A compiled model with virtual tokens: one graph for a prefix, and never a stale value."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import CompileConfig

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig

from .models import make, padded, tokens


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def test_a_prefix_in_one_graph() -> None:
    model, batch = make("llama"), padded("left")
    config = PrefixTuningConfig(num_virtual_tokens=4, init="random", reparameterization="mlp", num_frozen_tokens=1)
    handle = prefixcore.attach(model, config)
    model(**batch).loss.backward()
    expected = [p.grad.clone() for p in handle.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(**batch).loss.backward()
    for got, reference in zip(handle.parameters(), expected, strict=True):
        torch.testing.assert_close(got.grad, reference, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        for _ in range(3):  # the values of now, not those of when it was compiled or called last
            torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
            for parameter in handle.parameters():
                parameter.add_(0.3)


def test_a_packed_batch_in_one_graph() -> None:
    model = make("mistral", sliding_window=3)
    handle = prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=4, init="random"))
    parts = [tokens(1, length, seed=length)[0] for length in (5, 2, 7)]
    batch = prefixcore.PackedCollator()([{"input_ids": part, "labels": part} for part in parts])
    expected = model(**batch, use_cache=False)
    expected.loss.backward()
    gradients = [p.grad.clone() for p in handle.parameters()]
    model.zero_grad()
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch, use_cache=False)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-5)
    got.loss.backward()
    for parameter, reference in zip(handle.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, reference, rtol=1e-5, atol=1e-7)


def test_a_soft_prompt() -> None:
    model, batch = make("llama"), padded("left")
    handle = prefixcore.attach(model, PromptTuningConfig(num_virtual_tokens=4))
    expected = model(**batch)
    expected.loss.backward()
    gradient = handle.module.embedding.grad.clone()
    model.zero_grad()
    got, seen = torch.compile(model, backend="eager", fullgraph=True)(**batch), batch["attention_mask"].bool()
    torch.testing.assert_close(got.logits[seen], expected.logits[seen], rtol=1e-5, atol=1e-5)
    got.loss.backward()
    torch.testing.assert_close(handle.module.embedding.grad, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
def test_an_exported_program_has_the_virtual_tokens(config: type) -> None:
    model, ids = make("llama"), tokens(2, 5)
    bare = model(ids).logits
    prefixcore.attach(model, config(num_virtual_tokens=4, init="random"))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    program = torch.export.export(model, (), inputs, strict=False).module()
    expected = model(**inputs).logits
    torch.testing.assert_close(program(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected - bare).abs().max() > 1e-3


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
def test_the_reference_is_exported_in_operators_of_torch(config: type) -> None:
    """Which ONNX has too."""
    model, ids = make("llama"), tokens(1, 5)
    prefixcore.attach(model, config(num_virtual_tokens=4, init="random"))
    given = {"input_ids": ids, "use_cache": False}
    lengths = {"input_ids": {1: torch.export.Dim.AUTO}, "use_cache": None}
    with prefixcore.use_backend("reference"):
        program = torch.export.export(model, (), given, dynamic_shapes=lengths, strict=False)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "aten.mm.default" in called or "aten.linear.default" in called
    assert not [name for name in called if "prefixcore" in name]
    longer = {"input_ids": tokens(1, 9), "use_cache": False}
    torch.testing.assert_close(program.module()(**longer).logits, model(**longer).logits, rtol=1e-5, atol=1e-5)


def test_generate_with_a_static_cache_and_a_compiled_step() -> None:
    """What generate does by itself on a GPU."""
    model, ids = make("gpt2"), tokens(2, 5)
    prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=4, init="random"))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **options)
    compile_config = CompileConfig(backend="eager", mode=None)
    compile_config._compile_all_devices = True
    got = model.generate(ids, cache_implementation="static", compile_config=compile_config, **options)
    assert torch.equal(got, expected)


class Hidden(torch.nn.Module):
    """What TRL's trainers do: the model without its head, and a loss of its hidden states."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.model.base_model(**inputs, use_cache=False).last_hidden_state


@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_a_soft_prompt_without_the_head(given: str) -> None:
    model, ids = make("llama"), tokens(2, 5)
    handle = prefixcore.attach(model, PromptTuningConfig(num_virtual_tokens=4))
    inputs = {given: ids if given == "input_ids" else model.get_input_embeddings()(ids)}
    expected = Hidden(model)(**inputs)
    with handle.disabled():
        assert (Hidden(model)(**inputs) - expected).abs().max() > 1e-3
    got = torch.compile(Hidden(model), backend="eager", fullgraph=True)(**inputs)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    got.sum().backward()
    assert handle.module.embedding.grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_soft_prompt_is_put_in_once_where_a_part_of_the_model_is_compiled(family: str) -> None:
    model, batch = make(family), padded("left")
    prefixcore.attach(model, PromptTuningConfig(num_virtual_tokens=4))
    expected = model(**batch)
    model.base_model.compile(backend="eager")
    got, seen = model(**batch), batch["attention_mask"].bool()
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.logits[seen], expected.logits[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [PrefixTuningConfig, PromptTuningConfig])
def test_one_after_another(first: type) -> None:
    """What one compiled model leaves in a thread that has run none is in no other's way."""
    second = PromptTuningConfig if first is PrefixTuningConfig else PrefixTuningConfig

    def losses() -> list[tuple[float, float]]:
        found, ids = [], tokens(2, 5)
        for config in (first, second, first):
            model = make("llama")
            prefixcore.attach(model, config(num_virtual_tokens=4))
            got = torch.compile(model, backend="eager")(ids, labels=ids).loss  # first: the other runs everything
            found.append((float(model(ids, labels=ids).loss), float(got)))
        return found

    with ThreadPoolExecutor(1) as pool:
        for expected, got in pool.submit(losses).result():
            assert got == pytest.approx(expected, rel=1e-5)
