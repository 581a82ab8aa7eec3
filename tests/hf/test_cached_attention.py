"""Families that transformers' attention interface does not reach: their prefix is concatenated with keys and values.

In float64, beside the model's own forward whose cache begins with the prefix, as PEFT fills it.
"""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, StaticCache

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig
from prefixcore.hf.families import CACHED

from . import tiny_models
from .models import VOCABULARY, padded, tokens

P = 5

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


def make(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A tiny model; "falcon-alibi" is Falcon with ALiBi in place of rotary embeddings."""
    options: dict[str, dict[str, Any]] = {
        "bloom": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
        "falcon": {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
        "falcon-alibi": {"alibi": True, "new_decoder_architecture": False, "multi_query": True},
        "mpt": {"max_seq_len": 64},
        "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 4,
                    "max_position_embeddings": 64, "intermediate_size": 48, "resid_dropout": 0.0,
                    "embed_dropout": 0.0, "attention_dropout": 0.0},
        "gptj": {"n_positions": 64, "rotary_dim": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "codegen": {"n_positions": 64, "n_ctx": 64, "rotary_dim": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
                    "attn_pdrop": 0.0},
        "xglm": {"d_model": 32, "ffn_dim": 48, "attention_heads": 4, "num_layers": 2, "dropout": 0.0,
                 "max_position_embeddings": 64, "init_std": 0.2},
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(family.partition("-")[0], **{**_SIZES, **options[family], **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return model if family == "xglm" else model.to(dtype)  # whose attention has a constant that no float64 is


def close(got: Tensor, expected: Tensor, family: str) -> None:
    """To the rounding of float32 where attention goes through it, whatever the model's dtype."""
    exact = family in ("bloom", "falcon", "falcon-alibi") and got.dtype == torch.float64
    tolerance = 1e-9 if exact else 2e-5
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


FAMILIES = ["bloom", "falcon", "falcon-alibi", "mpt", "gpt_neo", "gptj", "codegen", "xglm"]

each_family = pytest.mark.parametrize("family", FAMILIES)


def test_every_such_family_is_tested() -> None:
    assert {family.partition("-")[0] for family in FAMILIES} == set(CACHED)


def attach(model: Any) -> prefixcore.Handle:
    handle = prefixcore.attach(model, PrefixTuningConfig(P, init="random", seed=1))
    handle.module.to(model.dtype)
    return handle


def filled(pairs: list[tuple[Tensor, Tensor]], rows: int) -> DynamicCache:
    """A cache that begins with the prefix, as PEFT makes it."""
    cache = DynamicCache()
    for layer, (key, value) in enumerate(pairs):
        cache.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), layer)
    return cache


def own(model: Any, pairs: list[tuple[Tensor, Tensor]], batch: dict[str, Tensor]) -> Any:
    """The model's own forward behind the prefix in its cache."""
    rows = len(batch["input_ids"])
    mask = torch.cat((torch.ones(rows, P, dtype=torch.long), batch["attention_mask"]), 1)
    return model(**{**batch, "attention_mask": mask}, past_key_values=filled(pairs, rows))


@each_family
@pytest.mark.parametrize("side", ["none", "right"])
def test_logits_loss_and_gradients(family: str, side: str) -> None:
    model, batch = make(family), padded(side)
    bare = copy.deepcopy(model)
    if family == "gpt_neo":  # its window would hide the prefix from where it has passed it: `test_no_window_hides_it`
        bare = make(family, window_size=32)
        model = copy.deepcopy(bare)
    handle = attach(model)
    got = model(**batch)
    pairs = [(key.requires_grad_(), value.requires_grad_()) for key, value in handle.bake()]
    expected = own(bare, pairs, batch)
    seen = batch["attention_mask"].bool()
    close(got.logits[seen], expected.logits[seen], family)
    close(got.loss, expected.loss, family)
    got.loss.backward()
    expected.loss.backward()
    for layer, (key, value) in zip(handle.module.layers, pairs, strict=True):
        assert key.grad is not None
        assert key.grad.abs().max() > 1e-6
        close(layer.key.grad, key.grad, family)
        close(layer.value.grad, value.grad, family)
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("prefixcore."))


@each_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_row_by_itself(family: str, side: str) -> None:
    # In float32: padding that sees nothing is NaN where scores of a float64 model go through float32.
    model, batch = make(family, torch.float32), padded(side)
    attach(model)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for row, mask in enumerate(batch["attention_mask"].bool()):
        alone = model(batch["input_ids"][row][mask][None]).logits[0]
        close(logits[row][mask], alone, family)


@each_family
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_a_cache_is_generate_without(family: str, cache: str) -> None:
    model, batch = make(family, torch.float32), padded("left")
    attach(model)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if cache == "static" and family in ("falcon-alibi", "gpt_neo"):
        with pytest.raises((NotImplementedError, ValueError), match="static|unpack"):  # the latter Falcon's own
            model.generate(**inputs, **options, cache_implementation="static", disable_compile=True)
        return
    if cache == "static":
        options["cache_implementation"] = "static"
        options["disable_compile"] = True
    expected = model.generate(**inputs, **{**options, "use_cache": False, "cache_implementation": None})
    assert torch.equal(model.generate(**inputs, **options), expected)


@each_family
def test_the_cache_holds_the_text_alone(family: str) -> None:
    model, ids = make(family), tokens(2, 7)
    attach(model)
    whole = model(ids).logits
    output = model(ids[:, :4], use_cache=True)
    assert output.past_key_values.get_seq_length() == 4
    rest = model(ids[:, 4:], past_key_values=output.past_key_values, use_cache=True)
    close(rest.logits, whole[:, 4:], family)
    assert model(ids, use_cache=False).past_key_values is None
    assert model(ids, use_cache=False, return_dict=False)[0].shape == whole.shape


@each_family
def test_rows_of_a_bank(family: str) -> None:
    """Prefixes of several lengths, and none, in one batch with padding on the left."""
    model, batch = make(family, torch.float32), padded("left")
    bare = copy.deepcopy(model)
    bank = prefixcore.PromptBank(model)
    for name, length in (("long", 5), ("short", 2)):
        bank.attach(name, PrefixTuningConfig(length, init="random", seed=length)).module.to(bare.dtype)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    logits = model(**inputs, task_ids=["short", None, "long"]).logits
    for row, task in enumerate(["short", None, "long"]):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
        alone = bare(ids) if task is None else model(ids, task_ids=[task])
        close(logits[row, -ids.shape[1] :], alone.logits[0], family)


def test_no_window_hides_it() -> None:
    """GPT-Neo's local layers see the prefix at any distance, and of the text what they see without it."""
    model, ids = make("gpt_neo", window_size=3), tokens(1, 20)
    handle = attach(model)
    with torch.no_grad():
        before = model(ids).logits
        handle.module.layers[1].value.add_(1.0)  # the local layer's
        changed = (model(ids).logits - before).abs().amax(-1)[0]
        assert changed.min() > 1e-3
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        cached = model.generate(ids[:, :3], **options)
        assert torch.equal(cached, model.generate(ids[:, :3], use_cache=False, **options))
    last = model(ids).logits[0, -1].sum()
    assert torch.autograd.grad(last, handle.module.layers[1].value)[0].abs().min() > 0


def test_a_window_that_is_not_known_is_named_beside_what_the_interface_refuses() -> None:
    with pytest.raises(
        NotImplementedError, match=r"does not act as the text.*has a window \(config\.keep_window_size\)"
    ):
        attach(tiny_models.make("DogeForCausalLM", "doge"))


@pytest.mark.parametrize("family", ["bloom", "falcon", "mpt", "gptj", "codegen", "xglm"])
def test_as_in_peft(family: str) -> None:
    model, batch = make(family), padded("right")
    sizes = {"num_layers": 2, "token_dim": 32, "num_attention_heads": 4} if family in ("mpt", "xglm") else {}
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, **sizes)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    weight = theirs.prompt_encoder["default"].embedding.weight.detach()
    prefixcore.attach(model, PrefixTuningConfig(init=weight)).module.to(model.dtype)
    seen = batch["attention_mask"].bool()
    close(model(**batch).logits[seen], theirs(**batch).logits[seen], "xglm")


@pytest.fixture
def bloom() -> Any:
    return make("bloom")


def test_detached_it_is_what_it_was() -> None:
    model, ids = make("gpt_neo"), tokens(2, 6)
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    before = model(ids).logits
    handle = attach(model)
    assert not torch.equal(model(ids).logits, before)
    with handle.disabled():
        assert torch.equal(model(ids).logits, before)
    handle.detach()
    assert torch.equal(model(ids).logits, before)
    for name, module in model.named_modules():
        assert set(module.__dict__) == set(attributes[name])


def test_what_it_says_of_its_backend(bloom: Any) -> None:
    assert attach(bloom).backend().name == "concatenated"
    assert not prefixcore.hf.attached(bloom).can_pack


def test_refusals(bloom: Any) -> None:
    with pytest.raises(NotImplementedError, match="in every layer or in none"):
        prefixcore.attach(bloom, PrefixTuningConfig(P, layers=[1]))
    with pytest.raises(NotImplementedError, match="leave position_offset=False out"):
        prefixcore.attach(bloom, PrefixTuningConfig(P, init="random", position_offset=False))
    assert prefixcore.hf.attached(bloom) is None
    attach(bloom)
    ids = tokens(1, 6)
    with pytest.raises(ValueError, match=r"transformers.Cache\), got a tuple: pairs .* by DynamicCache"):
        bloom(ids, past_key_values=((ids, ids),))
    with pytest.raises(NotImplementedError, match="packed"):
        bloom(ids, cu_seq_lens_q=torch.tensor([0, 2, 6]))
    bloom.gradient_checkpointing_enable()
    with pytest.raises(NotImplementedError, match="gradient checkpointing takes away"):
        bloom.train()(ids, labels=ids)


def test_positions_of_mpt_are_counted() -> None:
    model = make("mpt", max_seq_len=12)
    attach(model)
    model(tokens(1, 7))
    with pytest.raises(ValueError, match="12 positions"):
        model(tokens(1, 8))
    with pytest.raises(ValueError, match="12 positions"):
        model.generate(tokens(1, 6), max_new_tokens=4, do_sample=False)


def test_static_cache_by_hand() -> None:
    model, ids = make("bloom"), tokens(2, 7)
    try:
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=12))
    except RuntimeError:
        pytest.skip("Bloom of this transformers takes no static cache")
    attach(model)
    whole = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=12)
    first = model(ids[:, :4], past_key_values=cache).logits
    close(first, whole[:, :4], "mpt")


@pytest.mark.parametrize("family", ["bloom", "falcon", "mpt", "gptj", "codegen", "xglm"])
def test_rows_of_a_bank_with_a_static_cache(family: str) -> None:
    """Without padding `generate` gives no mask, and the rows need one that leaves out the room in the cache."""
    model, ids = make(family, torch.float32), tokens(3, 5)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    static = {**options, "cache_implementation": "static", "disable_compile": True}
    try:
        model.generate(ids, **static)
    except RuntimeError:
        pytest.skip(f"{family} of this transformers takes no static cache")
    bank, tasks = prefixcore.PromptBank(model), ["short", "long", None]
    for name, length in (("long", 5), ("short", 2)):
        bank.attach(name, PrefixTuningConfig(length, init="random", seed=length))
    together = model.generate(ids, task_ids=tasks, **static)
    for row, task in enumerate(tasks):
        alone = model.generate(ids[row : row + 1], task_ids=[task], **options)
        assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("family", ["bloom", "falcon-alibi", "mpt"])
def test_a_text_whose_place_is_counted_cannot_begin_at_0(family: str) -> None:
    model = make(family)
    config = PrefixTuningConfig(P, init="random", position_offset=False)
    with pytest.raises(NotImplementedError, match="leave position_offset=False out"):
        prefixcore.attach(model, config)
    assert prefixcore.hf.attached(model) is None
    with pytest.raises(NotImplementedError, match="leave position_offset=False out"):
        prefixcore.PromptBank(model).attach("zero", config)


@pytest.mark.parametrize("family", ["falcon", "gpt_neo", "gptj", "codegen", "xglm"])
def test_the_text_begins_at_position_0(family: str) -> None:
    """Rows of both conventions in one batch, beside the model's own cache and positions."""
    model, batch = make(family, torch.float32, **({"window_size": 32} if family == "gpt_neo" else {})), padded("left")
    bare, bank = copy.deepcopy(model), prefixcore.PromptBank(model)
    handles = [
        bank.attach(name, PrefixTuningConfig(P, init="random", seed=1, position_offset=offset))
        for name, offset in (("zero", False), ("p", True))
    ]
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], task_ids=["zero", "p", "zero"]).logits
    for row, handle in enumerate((*handles, handles[0])):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        positions = torch.arange(ids.shape[1])[None] + P * handle.config.position_offset
        mask = torch.ones(1, P + ids.shape[1], dtype=torch.long)
        alone = bare(ids, past_key_values=filled(handle.bake(), 1), position_ids=positions, attention_mask=mask)
        close(logits[row, -ids.shape[1] :], alone.logits[0], family)


@pytest.mark.filterwarnings("ignore:.*is not among the families:UserWarning")
def test_rows_of_a_bank_where_positions_are_counted(monkeypatch: Any) -> None:
    """TrOCR's decoder counts them from its cache, which begins with the longest prefix of the batch for every row."""
    model = tiny_models.make("TrOCRForCausalLM", "trocr")
    bank, batch, tasks = prefixcore.PromptBank(model), padded("right"), ["short", "long", None]
    for name, length in (("long", 5), ("short", 2)):
        bank.attach(name, PrefixTuningConfig(length, init="random", seed=length))
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], task_ids=tasks).logits
    for row, task in enumerate(tasks):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        close(logits[row, : ids.shape[1]], model(ids, task_ids=[task]).logits[0], "mpt")
    ids, options = tokens(3, 5), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, task_ids=tasks, **options)
    for row, task in enumerate(tasks):
        assert torch.equal(together[row], model.generate(ids[row : row + 1], task_ids=[task], **options)[0])

    monkeypatch.setattr("prefixcore.hf.bank.reach.position_module", lambda decoder: None)
    model = tiny_models.make("TrOCRForCausalLM", "trocr")
    prefixcore.PromptBank(model).attach("long", PrefixTuningConfig(5, init="random", seed=5))
    model(ids, task_ids="long")
    with pytest.raises(NotImplementedError, match=r"prefixes of \[0, 5\] virtual tokens"):
        model(ids, task_ids=["long", None, "long"])


def test_nothing_is_baked_that_a_window_would_lose_sight_of(tmp_path: Any) -> None:
    """The prefix is seen at any distance, the soft prompt is not, beyond what `bake` compares, too."""
    model = make("gpt_neo", torch.float32, window_size=60)
    with prefixcore.attach(model, PromptTuningConfig(4, init="random", seed=0)) as handle:
        handle.save(tmp_path / "prompt")
    with pytest.raises(NotImplementedError, match=r"sliding window of 60 tokens \(1 of 2 layers\)"):
        prefixcore.bake(model, tmp_path / "prompt", tmp_path / "prefix")
    everywhere = make("gpt_neo", torch.float32, window_size=60, attention_types=[[["global"], 2]])
    assert prefixcore.bake(everywhere, tmp_path / "prompt", tmp_path / "prefix", strict=False)
