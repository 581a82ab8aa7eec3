"""`handle.disabled()` is of the thread that runs the block: no call of another thread changes, and none of its own."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import prefixcore
from prefixcore import PackedCollator, PrefixTuningConfig, PromptTuningConfig

from ..hf.models import FAMILIES, make, padded, tokens, window_of

CONFIGS = {
    "prefix": PrefixTuningConfig(num_virtual_tokens=4, init="random", seed=1),
    "one layer": PrefixTuningConfig(num_virtual_tokens=4, init="random", seed=1, layers=[1]),
    "prompt": PromptTuningConfig(num_virtual_tokens=4, init="random", seed=1),
}
CALLS = 40


@contextmanager
def elsewhere(handle: prefixcore.Handle) -> Iterator[None]:
    """A block during which another thread has the handle disabled."""
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with handle.disabled():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    try:
        yield
    finally:
        leave.set()
        thread.join()


def padded_logits(model: Any) -> Tensor:
    return model(**padded("left")).logits


def packed_logits(model: Any) -> Tensor:
    batch = PackedCollator()([{"input_ids": row} for row in tokens(3, 5).tolist()])
    return model(**batch, use_cache=False).logits


def generated(model: Any) -> Tensor:
    batch = padded("left")
    return model.generate(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    ).logits[-1]


WHAT: dict[str, Callable[[Any], Tensor]] = {"padded": padded_logits, "packed": packed_logits, "generate": generated}


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bare_model_here_and_the_attached_one_elsewhere(family: str, kind: str, what: str) -> None:
    bare, model = make(family, **window_of(family, 16)), make(family, **window_of(family, 16))
    call = WHAT[what]
    expected = call(bare)
    handle = prefixcore.attach(model, CONFIGS[kind])
    if kind == "prompt":
        packed_logits(model)  # from here on the attention is ours
    attached = call(model)
    assert not torch.allclose(attached, expected, atol=1e-3)
    with handle.disabled():
        assert torch.equal(call(model), expected)
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(call, model).result(), attached)
    with elsewhere(handle):
        assert torch.equal(call(model), attached)
        with handle.disabled():
            assert torch.equal(call(model), expected)
        assert torch.equal(call(model), attached)
    assert torch.equal(call(model), attached)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_two_threads_at_once(kind: str) -> None:
    """Many calls side by side, one thread with and one without the virtual tokens; the third generates."""
    bare, model = make("llama"), make("llama")
    expected = {name: call(bare) for name, call in WHAT.items()}
    handle = prefixcore.attach(model, CONFIGS[kind])
    packed_logits(model)
    attached = {name: call(model) for name, call in WHAT.items()}
    start = threading.Barrier(3)

    def without() -> int:
        start.wait()
        wrong = 0
        for i in range(CALLS):
            name = list(WHAT)[i % 3]
            with handle.disabled():
                wrong += not torch.equal(WHAT[name](model), expected[name])
        return wrong

    def with_it(names: list[str]) -> int:
        start.wait()
        return sum(not torch.equal(WHAT[name](model), attached[name]) for name in names)

    with ThreadPoolExecutor(3) as pool:
        runs = [
            pool.submit(without),
            pool.submit(with_it, ["padded", "packed"] * (CALLS // 2)),
            pool.submit(with_it, ["generate"] * (CALLS // 4)),
        ]
        assert [run.result() for run in runs] == [0, 0, 0]


@pytest.mark.parametrize(
    ("family", "attention"),
    [("llama", "eager"), ("llama", "sdpa"), ("gpt2", "eager"), ("gpt2", "sdpa"), ("gemma2", "eager")],
)
def test_it_is_the_attention_that_the_model_had(family: str, attention: str) -> None:
    bare = make(family, attn_implementation=attention)
    model = make(family, attn_implementation=attention)
    handle = prefixcore.attach(model, CONFIGS["prefix"])
    with handle.disabled():
        assert torch.equal(padded_logits(model), padded_logits(bare))
        if attention == "eager":
            got, expected = (m(**padded("left"), output_attentions=True).attentions for m in (model, bare))
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_an_attention_that_reads_its_name_from_the_configuration() -> None:
    """As flash attention does."""
    names = []

    def named(module: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(module.config._attn_implementation)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("tests_named", named)
    try:
        model = make("llama")
        model.config._attn_implementation_internal = "tests_named"
        expected = model(tokens(2, 5)).logits  # without a mask function: no mask, and causal by itself
        handle = prefixcore.attach(model, CONFIGS["prefix"])
        names.clear()
        with handle.disabled():
            assert torch.equal(model(tokens(2, 5)).logits, expected)
        assert set(names) == {"tests_named"}
    finally:
        del AttentionInterface._global_mapping["tests_named"]


def gradients(model: Any, embeds: Tensor, around: Any, within: Any) -> tuple[Tensor, ...]:
    """Of the embeddings and the virtual tokens, with the forward in one block and the backward in another."""
    embeds = embeds.clone().requires_grad_()
    wanted = [embeds, *(p for p in model.parameters() if p.requires_grad)]
    with around():
        loss = model(inputs_embeds=embeds, use_cache=False).logits.square().sum()
    with within():
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return tuple(torch.zeros(1) if g is None else g for g in found)


@contextmanager
def nothing() -> Iterator[None]:
    yield


@pytest.mark.parametrize("kind", ["prefix", "prompt", "packed prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_backward_repeats_what_its_forward_did(family: str, kind: str) -> None:
    """Gradient checkpointing runs the layers again in the backward: in the block, after it, and in another thread."""
    model = make(family).train()
    handle = prefixcore.attach(model, CONFIGS[kind.removeprefix("packed ")])
    if kind == "packed prompt":
        packed_logits(model)
    embeds = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    plain = gradients(model, embeds, nothing, nothing)
    bare = gradients(model, embeds, handle.disabled, handle.disabled)
    assert not torch.allclose(plain[0], bare[0], rtol=1e-2)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    threaded = [
        (handle.disabled, nothing, bare),
        (handle.disabled, handle.disabled, bare),
        (nothing, handle.disabled, plain),
        (nothing, nothing, plain),
    ]
    for around, within, expected in threaded:
        for found in (
            gradients(model, embeds, around, within),
            gradients(model, embeds, around, lambda within=within: backward_elsewhere(within)),
        ):
            for got, reference in zip(found, expected, strict=True):
                torch.testing.assert_close(got, reference, rtol=1e-4, atol=5e-5)


_grad = torch.autograd.grad


@contextmanager
def backward_elsewhere(within: Any) -> Iterator[None]:
    """Gradients asked for inside are computed in another thread."""

    def grad(*args: Any, **kwargs: Any) -> Any:
        def run() -> Any:
            with within():
                return _grad(*args, **kwargs)

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(run).result()

    torch.autograd.grad = grad  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.grad = _grad


@pytest.mark.parametrize("kind", ["prefix", "prompt", "packed prompt"])
def test_compiled_code_is_of_its_thread(kind: str) -> None:
    torch._dynamo.reset()
    bare, model = make("llama"), make("llama")
    expected, seen = padded_logits(bare), padded("left")["attention_mask"].bool()
    handle = prefixcore.attach(model, CONFIGS[kind.removeprefix("packed ")])
    if kind == "packed prompt":
        packed_logits(model)
    attached = padded_logits(model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend="eager", fullgraph=kind == "prefix")
        for _ in range(2):
            torch.testing.assert_close(padded_logits(compiled)[seen], attached[seen], rtol=1e-5, atol=1e-5)
            with handle.disabled():
                torch.testing.assert_close(padded_logits(compiled), expected, rtol=1e-5, atol=1e-5)
            with elsewhere(handle):
                torch.testing.assert_close(padded_logits(compiled)[seen], attached[seen], rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", CONFIGS)
def test_blocks_nest_raise_and_end_where_they_began(kind: str) -> None:
    model = make("llama")
    expected = padded_logits(model)
    handle = prefixcore.attach(model, CONFIGS[kind])
    attached = padded_logits(model)
    with handle.disabled():
        with pytest.raises(KeyError), handle.disabled():
            raise KeyError
        assert torch.equal(padded_logits(model), expected)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(padded_logits(copied), attached)  # another model, which nobody has disabled
    assert torch.equal(padded_logits(model), attached)
    block = handle.disabled()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(block.__enter__).result()
        with pytest.raises(RuntimeError, match="in the thread in which it began"):
            block.__exit__(None, None, None)
    assert torch.equal(padded_logits(model), attached)
    with handle.disabled():
        handle.detach()
        assert torch.equal(padded_logits(model), expected)
        with prefixcore.attach(model, CONFIGS[kind]):
            assert torch.equal(padded_logits(model), attached)
    assert torch.equal(padded_logits(model), expected)


def test_another_model_with_the_same_configuration() -> None:
    config = make("llama").config
    torch.manual_seed(0)
    first, second = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    bare = padded_logits(second)
    with prefixcore.attach(first, CONFIGS["prefix"]) as one:
        with one.disabled():
            torch.testing.assert_close(padded_logits(second), bare, rtol=1e-5, atol=1e-5)
        with prefixcore.attach(second, CONFIGS["prefix"]):
            attached = padded_logits(second)
            with one.disabled():
                torch.testing.assert_close(padded_logits(second), attached, rtol=1e-5, atol=1e-5)


def test_attention_that_is_not_told_is_refused() -> None:
    """A model that hands its layers other arguments than it gets would see no prefix, or one that is disabled."""
    model = make("llama")
    handle = prefixcore.attach(model, CONFIGS["prefix"])
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: (args, {k: v for k, v in kwargs.items() if not k.startswith("prefixcore")}),
        with_kwargs=True,
    )
    for block in (nullcontext(), handle.disabled()):
        with block, pytest.raises(RuntimeError, match="does not get the arguments of its model's forward"):
            padded_logits(model)
