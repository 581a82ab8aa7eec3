"""Continuous batching (`generate_batch`): each request gets what `generate` gives its row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig
from prefixcore.hf.paged.ids import VirtualIds

from . import tiny_models
from .models import FAMILIES, Tokenizer, assert_same, make, state, window_of

TEXT = "abcdefghijklmnopq"
BOTH = [PrefixTuningConfig(init_text=TEXT), PromptTuningConfig(init_text=TEXT)]
REQUESTS = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 8, 9, 1, 2, 3], [4] * 11]
NEW = 9
PAGE_SIZE = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"


def attach(model: Any, config: Any, seed: int = 3) -> Any:
    """A handle on virtual tokens that are no text's."""
    handle = prefixcore.attach(model, config, tokenizer=Tokenizer())
    move(handle, seed)
    return handle


def move(handle: Any, seed: int, by: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * by)


def options(**changes: Any) -> GenerationConfig:
    return GenerationConfig(
        **{"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0, **changes}
    )


def small(**changes: Any) -> ContinuousBatchingConfig:
    """Few pages: by default they take most of a machine's memory."""
    return ContinuousBatchingConfig(**{"num_blocks": 64, "max_batch_tokens": 64, **changes})


def batch(model: Any, requests: list[list[int]] = REQUESTS, **given: Any) -> list[list[int]]:
    config = given.pop("continuous_batching_config", None) or small()
    made = model.generate_batch(
        requests, generation_config=options(), continuous_batching_config=config, **given
    ).values()
    assert [each.error for each in made] == [None] * len(requests)
    assert [each.prompt_ids for each in made] == requests
    return [each.generated_tokens for each in made]


def one_by_one(model: Any, requests: list[list[int]] = REQUESTS, task_ids: Any = None) -> list[list[int]]:
    found = []
    for i, ids in enumerate(requests):
        row = torch.tensor([ids])
        given = {} if task_ids is None else {"task_ids": task_ids[i : i + 1]}
        mask = torch.ones_like(row)
        out: Tensor = model.generate(
            row, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0, **given
        )
        found.append(out[0, len(ids) :].tolist())
    return found


@pytest.mark.parametrize("config", BOTH)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_as_generate(family: str, config: Any) -> None:
    model = make(family, **window_of(family, 64))
    bare = one_by_one(model)
    attach(model, config)
    expected = one_by_one(model)
    assert batch(model) == expected != bare


@pytest.mark.parametrize("config", [PrefixTuningConfig(num_virtual_tokens=5), PromptTuningConfig(num_virtual_tokens=5)])
@pytest.mark.parametrize("name", ["Qwen2VLForConditionalGeneration", "Gemma3nForCausalLM", "Gemma3ForCausalLM"])
def test_models_that_look_at_ids_or_scale_embeddings(name: str, config: Any) -> None:
    # With a table of its own Gemma 3 does not say its last token again, whatever it has read.
    changes = {"tie_word_embeddings": False} if name == "Gemma3ForCausalLM" else {}
    model = tiny_models.make(name, tiny_models.every_class()[name], **changes)
    try:
        bare = one_by_one(model)
        assert batch(model) == bare
    except (IndexError, ValueError) as error:  # before 5.23
        pytest.skip(f"transformers by itself: {error}")
    move(prefixcore.attach(model, config), 3, by=10.0)
    expected = one_by_one(model)
    made = model.generate_batch(REQUESTS, generation_config=options(), continuous_batching_config=small()).values()
    if name.startswith("Gemma3n") and any(each.error for each in made):  # from 5.24 on layers read another's pages
        assert "does not read pages of keys and values in each layer" in next(iter(made)).error
    else:
        assert [each.generated_tokens for each in made] == expected != bare


@pytest.mark.parametrize("config", BOTH)
@pytest.mark.parametrize("changes", [{"max_batch_tokens": 8}, {"allow_block_sharing": False}, {PAGE_SIZE: 4}], ids=str)
def test_virtual_tokens_in_parts_and_pages(config: Any, changes: dict[str, Any]) -> None:
    model = make("llama")
    attach(model, config)
    assert batch(model, continuous_batching_config=small(**changes)) == one_by_one(model)


def test_each_request_has_its_own_adapter() -> None:
    model = make("llama")
    bank = prefixcore.PromptBank(model)
    move(bank.attach("long", PrefixTuningConfig(init_text=TEXT), tokenizer=Tokenizer()), 3)
    move(bank.attach("short", PrefixTuningConfig(num_virtual_tokens=3)), 4)
    move(bank.attach("prompt", PromptTuningConfig(num_virtual_tokens=5)), 5)
    names = ["prompt", None, "long", "short", "prompt", "long"]
    requests = [*REQUESTS, *REQUESTS[:2]]
    assert batch(model, requests, task_ids=names) == one_by_one(model, requests, names)
    assert batch(model, requests[:2], task_ids="short") == one_by_one(model, requests[:2], ["short", "short"])
    with pytest.raises(ValueError, match="several tasks are attached"):
        model.generate_batch(requests)
    with pytest.raises(ValueError, match="expected one for each of 6 requests, got 2"):
        model.generate_batch(requests, task_ids=["long", "short"])


@pytest.mark.parametrize("config", BOTH)
def test_several_sequences_a_request(config: Any) -> None:
    model = make("llama")
    attach(model, config)
    made = model.generate_batch(
        REQUESTS,
        generation_config=options(num_return_sequences=2, do_sample=True, top_k=1),
        continuous_batching_config=small(),
    )
    assert len(made) >= len(REQUESTS)  # transformers before 5.20 hands out one of each
    expected = dict(zip(map(tuple, REQUESTS), one_by_one(model), strict=True))
    assert all(each.generated_tokens == expected[tuple(each.prompt_ids)] for each in made.values())


def test_requests_of_a_running_manager() -> None:
    model = make("llama").train()
    bank = prefixcore.PromptBank(model)
    move(bank.attach("one", PrefixTuningConfig(init_text=TEXT), tokenizer=Tokenizer()), 3)
    handle = bank.attach("two", PromptTuningConfig(num_virtual_tokens=5))
    expected = one_by_one(model.eval(), REQUESTS[:3], ["one", "two", None])
    manager = model.train().init_continuous_batching(generation_config=options(), continuous_batching_config=small())
    manager.start()
    try:
        names = [
            manager.add_request(REQUESTS[0], task_id="one"),
            manager.add_request(REQUESTS[1], task_id="two", streaming=True),
            *manager.add_requests(REQUESTS[2:3], task_ids=[None]),
        ]
        with pytest.raises(ValueError, match="'three' is not attached"):
            manager.add_request(REQUESTS[0], task_id="three")
        model(torch.tensor(REQUESTS[:1]), task_ids="two", labels=torch.tensor(REQUESTS[:1])).loss.backward()
        found: dict[str, Any] = {}
        while not all(name in found and found[name].is_finished() for name in names):
            result = manager.get_result(timeout=10)
            assert result is not None
            found[result.request_id] = result
        assert [found[name].generated_tokens for name in names] == expected
        assert [found[name].prompt_ids for name in names] == REQUESTS[:3]
        move(handle, 6)
        with pytest.raises(RuntimeError, match="adapter 'two' was attached or changed after continuous batching"):
            manager.add_request(REQUESTS[0], task_id="two")
    finally:
        manager.stop(block=True)
    assert model.training


def test_the_model_is_left_as_it_is() -> None:
    model = make("llama").train()
    handle = attach(model, BOTH[0])
    before = state(model)
    batch(model)
    after = state(model)
    assert_same({**before, "rng": None}, {**after, "rng": None})
    assert [p.requires_grad for p in handle.parameters()] == [True] * len(list(handle.parameters()))
    handle.detach()
    assert "generate_batch" not in model.__dict__
    assert "init_continuous_batching" not in model.__dict__
    assert batch(model.eval()) == one_by_one(model)


@pytest.mark.parametrize("config", BOTH)
def test_what_is_kept_for_a_next_session_follows_the_values(config: Any) -> None:
    model = make("llama")
    handle = attach(model, config)
    first = batch(model, persistent_manager=True)
    assert batch(model, persistent_manager=True) == first == one_by_one(model)
    move(handle, 8)
    assert batch(model, persistent_manager=True) == one_by_one(model) != first
    model.destroy_cached_continuous_batching_manager()
    assert batch(model) == one_by_one(model)


@pytest.mark.parametrize("config", BOTH)
def test_a_copy_of_the_model_keeps_no_pages(config: Any) -> None:
    model = make("llama")
    attach(model, config)
    expected = batch(model, persistent_manager=True)
    other = copy.deepcopy(model)
    assert batch(other) == expected
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    model.destroy_cached_continuous_batching_manager()


@pytest.mark.parametrize("config", BOTH)
def test_disabled(config: Any) -> None:
    model = make("llama")
    bare = one_by_one(model)
    handle = attach(model, config)
    with handle.disabled():
        assert batch(model) == bare
    assert batch(model) == one_by_one(model)


def refused(match: str, kind: type[Exception] = NotImplementedError) -> Any:
    return pytest.raises(kind, match=match)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gpt_oss"])
def test_a_prefix_whose_text_begins_at_position_0(family: str) -> None:
    """Beside one whose text begins at P: keys stand as far from queries as in `generate`."""
    model = make(family, **window_of(family, 64))
    bare = one_by_one(model)
    bank = prefixcore.PromptBank(model)
    for name, offset, seed in (("zero", False, 3), ("p", True, 4)):
        move(bank.attach(name, PrefixTuningConfig(num_virtual_tokens=7, position_offset=offset)), seed, by=1.0)
    for names in (["zero"] * 4, ["zero", "p", None, "zero"]):
        expected = one_by_one(model, task_ids=names)
        assert batch(model, task_ids=names) == expected != bare
    same = bank.attach("same at p", PrefixTuningConfig(num_virtual_tokens=7))
    same.module.load_state_dict(bank["zero"].module.state_dict())
    assert batch(model, task_ids=["same at p"] * 4) != batch(model, task_ids=["zero"] * 4)


def test_where_keys_cannot_be_moved_a_text_that_begins_at_position_0_is_refused() -> None:
    model = make("gpt2")
    prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=4, position_offset=False))
    with refused("takes no positions .*learned positions.*call generate on padded batches"):
        model.generate_batch(REQUESTS)


def test_what_pages_cannot_show() -> None:
    for config, match in (
        (PrefixTuningConfig(num_virtual_tokens=4, layers=[1]), "seen by some layers alone"),
        (PromptTuningConfig(num_virtual_tokens=2, virtual_token_ids=[4, 5]), "stands within the text"),
    ):
        model = make("llama")
        with prefixcore.attach(model, config) as handle:
            with refused(match + ".*call generate on padded batches"):
                model.generate_batch(REQUESTS)
            with refused(match):
                model.init_continuous_batching()
            with handle.disabled():
                assert len(batch(model)) == len(REQUESTS)


def test_a_window_that_a_prefix_would_leave() -> None:
    model = make("mistral", sliding_window=24)
    attach(model, BOTH[0])
    with refused("at most 24 together, got 29", ValueError):
        batch(model)
    short = [ids[:2] for ids in REQUESTS]
    made = model.generate_batch(short, generation_config=options(max_new_tokens=5), continuous_batching_config=small())
    assert [each.generated_tokens for each in made.values()] == [ids[:5] for ids in one_by_one(model, short)]


@pytest.mark.parametrize("config", [PrefixTuningConfig(num_virtual_tokens=4), PromptTuningConfig(num_virtual_tokens=4)])
@pytest.mark.parametrize("name", ["BloomForCausalLM", "CodeGenForCausalLM", "DiffLlamaForCausalLM", "BartForCausalLM"])
def test_no_model_answers_otherwise_than_generate(name: str, config: Any) -> None:
    """Pages do not reach the attention of these in each transformers, which by itself then gives other answers."""
    model = tiny_models.make(name, tiny_models.every_class()[name])
    prefixcore.attach(model, config)
    try:
        made = model.generate_batch(REQUESTS, generation_config=options(), continuous_batching_config=small()).values()
    except NotImplementedError:
        return
    if not made or any("does not read pages" in str(each.error) for each in made):  # 5.13 then has no answers
        return
    assert [each.generated_tokens for each in made] == one_by_one(model)


def test_a_text_whose_tokens_see_later_ones() -> None:
    name = "PaliGemmaForConditionalGeneration"
    model = tiny_models.make(name, tiny_models.every_class()[name])
    attach(model, PromptTuningConfig(num_virtual_tokens=4))
    with refused("tokens of a text see later ones"):
        model.generate_batch(REQUESTS)


def test_pages_of_other_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As JetMoe's, from transformers 5.24 on."""
    model = make("llama")
    attach(model, BOTH[0])
    at = VirtualIds.at
    monkeypatch.setattr(VirtualIds, "at", lambda *given: tuple(x.repeat(2, 1, 1) for x in at(*given)))
    made = model.generate_batch(REQUESTS, generation_config=options(), continuous_batching_config=small())
    assert all("layer 0 has pages of 2 heads and a prefix of 4" in str(each.error) for each in made.values())


def test_scores_that_transformers_would_not_cap() -> None:
    model = make("gemma2")
    attach(model, BOTH[0])
    with refused("caps its attention scores"):
        model.generate_batch([[5, 6]], generation_config=options(), continuous_batching_config=small())


@pytest.mark.parametrize("ids", [[5, 10**6], [-1], [True], ["a"]])
def test_ids_that_are_none(ids: list[Any]) -> None:
    model = make("llama")
    attach(model, BOTH[0])
    with refused("a request: expected ids from 0 to", ValueError):
        model.generate_batch([[5], ids])
    with refused("a request: expected at least one id", ValueError):
        model.generate_batch([[5], []])


def test_too_many_tokens_for_learned_positions() -> None:
    model = make("gpt2", n_positions=32)
    attach(model, BOTH[0])
    with refused("the model has learned 32 positions", ValueError):
        batch(model)
