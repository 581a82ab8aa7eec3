"""A tree of examples is learnt as the packed batch of them is, and is made only where it is less work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig
from prefixcore.hf.shared_texts import sharing_width
from prefixcore.training import TokenizedExample, TrainingOptions, cache_activations, train
from prefixcore.training.batch import Batch, loss_of
from prefixcore.training.tree import is_worth, paths_of
from tests import tiny
from tests.hf import models

CPU = torch.device("cpu")
COMMON = list(range(10, 22))
EXAMPLES = [
    TokenizedExample([*COMMON, 30, 31], [40, 41]),
    TokenizedExample([*COMMON, 30, 31], [40, 42]),
    TokenizedExample([*COMMON, 32], [40]),
    TokenizedExample([*COMMON, 30, 31], [40, 41]),  # the same again: it counts twice
    TokenizedExample([50, 51, 52], [53, 54, 55], learnt=[True, False, True]),
    TokenizedExample(COMMON[:3], COMMON[3:6]),  # a beginning of others, with labels there
]


def learnt(handle: Any, batch: Batch) -> list[torch.Tensor]:
    loss = loss_of(handle.model, batch)
    return [loss.detach(), *torch.autograd.grad(loss, list(handle.parameters()))]


def batch_of(width: int, examples: Any = EXAMPLES) -> Batch:
    return Batch.of(examples, 0, packed=True, device=CPU, sharing_width=width)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gpt2"])
def test_it_is_learnt_as_the_packed_batch_is(family):
    model = models.make(family).double().train()
    config = PrefixTuningConfig(num_virtual_tokens=3, init="random", seed=0)
    handle = prefixcore.attach(model, config)
    handle.module.double()
    width = sharing_width(handle)
    assert width == 32
    tree = batch_of(width)
    packed = batch_of(0)
    assert tree.shape == (1, 25)
    assert packed.shape == (1, 74)
    torch.testing.assert_close(
        learnt(handle, tree), learnt(handle, packed), rtol=1e-5, atol=1e-7
    )  # the loss is in float32


def test_each_token_sees_its_own_text_alone():
    tree = batch_of(32)
    mask, positions = tree.arguments["attention_mask"][0, 0], tree.arguments["position_ids"][0]
    ids = tree.arguments["input_ids"][0]
    for example, place in zip(EXAMPLES, tree.places, strict=True):
        whole = example.prompt_ids + example.completion_ids
        assert ids[place].tolist() == whole
        assert positions[place].tolist() == list(range(len(whole)))
        for i, node in enumerate(place):
            assert ids[mask[node]].tolist() == whole[: i + 1]


def test_a_tree_is_made_only_where_it_is_less_work():
    alone = [TokenizedExample([i, i + 1], [i + 2]) for i in range(10, 60, 7)]
    assert "cu_seq_lens_q" in batch_of(32, alone).arguments
    paths, tokens = paths_of([TokenizedExample([1, *range(i, i + 900)], [2]) for i in (10, 2000, 4000)])
    assert len(tokens) == sum(map(len, paths)) - 2
    assert not is_worth(paths, len(tokens), 576)
    paths, tokens = paths_of([TokenizedExample([*range(100), i], [2]) for i in range(200, 208)])
    assert is_worth(paths, len(tokens), 576)


def test_windows_soft_prompts_and_other_layers_keep_packed_batches():
    config = PrefixTuningConfig(num_virtual_tokens=3, init="random", seed=0)
    for model, adapter in (
        (models.make("mistral", sliding_window=8), config),
        (models.make("gemma2"), config),
        (models.make("llama"), PromptTuningConfig(num_virtual_tokens=3, init="random", seed=0)),
    ):
        with prefixcore.attach(model, adapter) as handle:
            assert sharing_width(handle) == 0


def test_training_takes_trees_by_itself_and_learns_the_same():
    records, shapes = [], []
    for packed in (None, False):
        handle = prefixcore.attach(
            models.make("llama"), PrefixTuningConfig(num_virtual_tokens=3, init="random", seed=0)
        )
        seen: list[tuple[int, ...]] = []
        handle.model.register_forward_pre_hook(
            lambda m, a, k, seen=seen: seen.append(tuple(k["input_ids"].shape)), with_kwargs=True, prepend=True
        )
        options = TrainingOptions(steps=6, batch_size=3, learning_rate=1e-2, eval_every=2)
        same = {"held_out": EXAMPLES[2:4], "options": options, "packed": packed}
        records.append(train(handle, tiny.tokenizer(), EXAMPLES, **same))
        shapes.append(seen)
    one, other = records
    assert [x for _, x in one.train_loss] == pytest.approx([x for _, x in other.train_loss], rel=1e-4)
    assert [x for _, x in one.held_out_loss] == pytest.approx([x for _, x in other.held_out_loss], rel=1e-4)
    assert max(tokens for _, tokens in shapes[0]) < 48


def test_kept_activations_serve_a_tree():
    config = PrefixTuningConfig(num_virtual_tokens=3, init="random", seed=0, layers=[1])
    handle = prefixcore.attach(models.make("llama").double().train(), config)
    handle.module.double()
    tree = batch_of(sharing_width(handle))
    with cache_activations(handle, tiny.tokenizer(), EXAMPLES, "memory") as cached:
        cached(handle.model, batch_of(0))
        loss = cached(handle.model, tree).loss
        assert cached.calls == 1
    assert float(loss.detach()) == pytest.approx(float(loss_of(handle.model, tree).detach()), rel=1e-6)


def test_routers_with_a_loss_of_their_own_see_each_text_as_often_as_it_occurs():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=10.0,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    handle = prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=3, init="random"))
    assert handle.can_pack
    assert sharing_width(handle) == 0
    padded = Batch.of(EXAMPLES, 0, packed=False, device=CPU)
    torch.testing.assert_close(learnt(handle, batch_of(0)), learnt(handle, padded), rtol=1e-4, atol=1e-6)
    model.config.output_router_logits = False
    assert sharing_width(handle) == 32
