"""A soft prompt before a packed batch: computed once, and to every sequence the prompt of a row of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import FalconConfig, FalconForCausalLM, Trainer, TrainingArguments

import prefixcore
from prefixcore import PackedCollator, PromptTuningConfig

from .models import FAMILIES, VOCABULARY, WINDOWED, assert_same, make, state, tokens
from .test_packing import LENGTHS, close, features, gradients, lose_lengths, pad, taught

P = 3
PROMPT = PromptTuningConfig(num_virtual_tokens=P, init="random", seed=0)
# Windows that leave virtual tokens out of sight of some text tokens, of some sequences, and of none.
WINDOWS = [(family, window) for family in WINDOWED for window in (2, 7, 64)]


def attach(family: str = "llama", **changes: Any) -> tuple[Any, prefixcore.Handle]:
    model = make(family, **changes)
    return model, prefixcore.attach(model, PROMPT)


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Any]]:
    """`features` without labels on first tokens, which a packed batch does not learn."""
    return [{**row, "labels": [-100, *row["labels"][1:]]} for row in features(lengths)]


def check_step(model: Any, handle: prefixcore.Handle, data: list[dict[str, Any]]) -> None:
    """Loss, logits and gradient of the packed batch are those of the padded one."""
    expected = model(**pad(data))
    expected.loss.backward()
    wanted = gradients(handle)
    batch = PackedCollator()(data)
    got = model(**batch, use_cache=False)
    assert got.logits.shape == batch["labels"].shape + (VOCABULARY,)
    torch.testing.assert_close(got.loss, expected.loss, **close)
    torch.testing.assert_close(
        taught(got.logits, batch["labels"]), taught(expected.logits, pad(data)["labels"]), **close
    )
    got.loss.backward()
    (gradient,) = gradients(handle)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close([gradient], wanted, **close)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_logits_and_gradient_are_those_of_the_padded_batch(family: str) -> None:
    model, handle = attach(family)
    assert handle.can_pack
    check_step(model, handle, rows())
    check_step(model, handle, rows((4,)))


@pytest.mark.parametrize(("family", "window"), WINDOWS)
def test_virtual_tokens_stand_within_a_sliding_window(family: str, window: int) -> None:
    model, handle = attach(family, sliding_window=window)
    check_step(model, handle, rows())
    batch = PackedCollator()(rows())
    with torch.no_grad():  # with the cache that a forward keeps by default
        torch.testing.assert_close(model(**batch).loss, model(**batch, use_cache=False).loss, **close)
        wrong = {**batch, "max_length_q": 1}
        torch.testing.assert_close(model(**wrong).loss, model(**batch).loss, rtol=0, atol=0)


def test_types_of_tokens_go_along() -> None:
    model, _ = attach("gpt2")
    data = [{**row, "token_type_ids": [place + 3] * len(row["input_ids"])} for place, row in enumerate(rows((5, 5)))]
    padded = pad(data)
    types = torch.tensor([row["token_type_ids"] for row in data])
    with torch.no_grad():
        same = torch.full_like(types, 3)
        expected = model(**padded, token_type_ids=same).loss
        batch = PackedCollator()(data)
        torch.testing.assert_close(model(**batch, token_type_ids=same.view(1, -1)).loss, expected, **close)
        with pytest.raises(NotImplementedError, match="begin with different types"):
            model(**batch, token_type_ids=types.view(1, -1))


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family: str) -> None:
    model, handle = attach(family)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**pad(rows()))
        expected.loss.backward()
        (wanted,) = gradients(handle)
        got = model(**PackedCollator()(rows()))
        got.loss.backward()
    (gradient,) = gradients(handle)
    torch.testing.assert_close(got.loss, expected.loss, rtol=0.02, atol=0.02)
    assert (gradient - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("keep", [torch.tensor([-1, 2]), torch.arange(sum(LENGTHS)) % 5 == 0])
def test_logits_to_keep_from_the_end_or_as_a_mask(keep: torch.Tensor) -> None:
    model, _ = attach()
    batch = PackedCollator()([{"input_ids": row["input_ids"]} for row in rows()])
    expected = model(**batch).logits[:, keep]
    torch.testing.assert_close(model(**batch, logits_to_keep=keep).logits, expected, **close)


def test_weights_are_refused_from_the_first_packed_batch_on() -> None:
    model, _ = attach("gpt2", attn_implementation="eager")
    assert len(model(**pad(rows()), output_attentions=True).attentions) == 2
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="never forms attention weights"):
            model(**PackedCollator()(rows()), output_attentions=True)
        assert len(model(**pad(rows()), output_attentions=True).attentions) == 2  # refused before anything changed
    model(**PackedCollator()(rows()))
    with pytest.raises(NotImplementedError, match="never forms attention weights"):
        model(**pad(rows()), output_attentions=True)


def test_a_router_that_counts_tokens_is_refused() -> None:
    model, _ = attach("gpt_oss")
    with pytest.raises(NotImplementedError, match="output_router_logits"):
        model(**PackedCollator()(rows()), output_router_logits=True)


def test_packing_needs_kernels_for_attention() -> None:
    model, handle = attach()
    assert handle.can_pack
    with prefixcore.use_backend("reference"):
        assert handle.can_pack
    model.double()
    assert not handle.can_pack


def test_a_model_in_bfloat16() -> None:
    model, handle = attach()
    batch = PackedCollator()(rows())
    model(**batch).loss.backward()
    (wanted,) = gradients(handle)
    handle.detach()
    handle = prefixcore.attach(model.bfloat16(), PROMPT)
    model(**batch).loss.backward()
    (got,) = gradients(handle)
    assert got.dtype == torch.float32
    assert (got - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_and_counted(family: str) -> None:
    model, handle = attach(family)
    batch, count = PackedCollator()(rows()), torch.tensor(100)
    expected = model(**pad(rows()), num_items_in_batch=count).loss
    expected.backward()
    wanted = gradients(handle)
    model.train()
    model.gradient_checkpointing_enable()
    loss = model(**batch, num_items_in_batch=count).loss
    torch.testing.assert_close(loss, expected, **close)
    with torch.no_grad():
        model(**pad(rows((3, 4))))  # between a forward and its backward
    loss.backward()
    torch.testing.assert_close(gradients(handle), wanted, **close)


def test_an_encoder_of_the_prompt_gets_its_gradient() -> None:
    model = make("llama")
    handle = prefixcore.attach(model, prefixcore.PTuningConfig(num_virtual_tokens=P, encoder_hidden_size=8, seed=0))
    model(**pad(rows())).loss.backward()
    wanted = gradients(handle)
    model(**PackedCollator()(rows())).loss.backward()
    torch.testing.assert_close(gradients(handle), wanted, **close)


def test_without_logits_to_keep_every_logit_is_there() -> None:
    """As a collator makes the batch that knows nothing of `logits_to_keep`; embeddings do in place of ids."""
    model, _ = attach()
    batch = PackedCollator()(rows())
    expected = model(**batch)
    kept = batch.pop("logits_to_keep")
    batch["labels"] = torch.cat([torch.tensor(row["labels"]) for row in rows()])[None]
    got = model(**batch)
    assert got.logits.shape == (1, sum(LENGTHS), VOCABULARY)
    torch.testing.assert_close(got.loss, expected.loss, **close)
    torch.testing.assert_close(got.logits[:, kept], expected.logits, **close)
    embedded = model.get_input_embeddings()(batch.pop("input_ids"))
    torch.testing.assert_close(model(inputs_embeds=embedded, **batch).logits, got.logits, **close)
    del batch["position_ids"]
    torch.testing.assert_close(model(inputs_embeds=embedded, **batch).logits, got.logits, **close)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_follows_a_packed_batch_is_as_before(family: str) -> None:
    """Attention stays ours from then on, which padded rows, generation, copies and the bare model do not show."""
    bare = make(family)
    before = state(bare)
    text, batch = pad(rows()), PackedCollator()(rows())
    model, handle = attach(family)
    expected, plain = model(**text).logits, bare(**text).logits
    answers = model.generate(text["input_ids"][:, :2], max_new_tokens=5, do_sample=False)
    packed = model(**batch).logits
    torch.testing.assert_close(model(**text).logits, expected, **close)
    assert torch.equal(model.generate(text["input_ids"][:, :2], max_new_tokens=5, do_sample=False), answers)
    torch.testing.assert_close(copy.deepcopy(model)(**batch).logits, packed, rtol=0, atol=0)
    with handle.disabled():
        assert torch.equal(model(**text).logits, plain)
    torch.testing.assert_close(model(**batch).logits, packed, rtol=0, atol=0)
    handle.detach()
    assert torch.equal(model(**text).logits, plain)
    torch.set_rng_state(before["rng"])
    assert_same(before, {**state(model), "identity": before["identity"]})


def test_the_prompt_is_computed_once_a_batch() -> None:
    """No tensor of a step has rows for more than P + T tokens."""

    class Longest(TorchDispatchMode):
        tokens = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default:
                self.tokens = max(self.tokens, len(out))
            return out

    model, _ = attach()
    batch = PackedCollator()(rows((4,) * 30))
    with prefixcore.use_backend("cpu"), Longest() as longest:
        model(**batch, use_cache=False).loss.backward()
    assert longest.tokens == P + 4 * 30


def test_learned_positions_are_limited_in_each_sequence_not_in_all() -> None:
    model, handle = attach("gpt2")  # 64 positions
    check_step(model, handle, rows((50, 61, 33)))
    with pytest.raises(ValueError, match=r"64 positions, but this input needs 65"):
        model(**PackedCollator()(rows((5, 62))))


def test_what_is_refused() -> None:
    model, _ = attach()
    batch = PackedCollator()(rows())
    expected = model(**batch).logits
    total = sum(LENGTHS)
    two = {"input_ids": tokens(2, total), "labels": None, "position_ids": None}
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        (two, ValueError, "expected one row .* got 2 rows"),
        ({"attention_mask": torch.zeros(1, total)}, ValueError, "attention_mask: expected none in a packed batch"),
        ({"cu_seq_lens_k": torch.tensor([0, total])}, ValueError, r"cu_seq_lens_k: expected \[6\]"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 7, total]), "cu_seq_lens_k": None}, ValueError, "cu_seqlens"),
        ({"cu_seq_lens_q": None}, NotImplementedError, "a tensor of token indices, which is for packed batches"),
        ({"cu_seq_lens_q": None, "logits_to_keep": 0}, NotImplementedError, "no cu_seq_lens_q that says where"),
    ]
    for changes, error, message in refused:
        with pytest.raises(error, match=message):
            model(**{**batch, **changes})
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="was set to 'sdpa' after virtual tokens were attached"):
        model(**batch)
    model.set_attn_implementation("prefixcore")
    cache = model(**batch, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=f"an empty cache in a packed batch .* got a cache of {P + total} tokens"):
        model(**batch, past_key_values=cache)
    with pytest.raises(ValueError, match="computed without these virtual tokens"):
        model(tokens(1, 1), past_key_values=cache)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)


def test_a_model_that_loses_the_lengths_is_refused() -> None:
    model, _ = attach()

    lose_lengths(model.model.layers[1])
    with pytest.raises(NotImplementedError, match="LlamaAttention is called without the cu_seq_lens_q"):
        model(**PackedCollator()(rows()))


def test_a_model_without_the_attention_interface_is_refused_and_left_alone() -> None:
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = FalconForCausalLM(config).eval()
    handle = prefixcore.attach(model, PROMPT)
    assert not handle.can_pack
    expected = model(**pad(rows())).logits
    with pytest.raises(
        NotImplementedError, match="FalconForCausalLM cannot be given packed batches .* only known families can"
    ):
        model(**PackedCollator()(rows()))
    assert torch.equal(model(**pad(rows())).logits, expected)


def test_dropout_of_weights_that_is_left_out_is_said() -> None:
    model, _ = attach("gpt2", attn_pdrop=0.5)
    with pytest.warns(UserWarning, match="attn_pdrop is 0.5"):
        model(**PackedCollator()(rows()))


def test_trainer(tmp_path: Path) -> None:
    """The same losses step by step and the same prompt at the end."""
    data = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows((5, 9, 4, 2, 7, 12))]

    def run(collator: Any) -> tuple[list[float], torch.Tensor]:
        model, handle = attach()
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=3, learning_rate=1e-2, report_to=[],
            use_cpu=True, seed=1, disable_tqdm=True, save_strategy="no", logging_steps=1,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator)
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        return losses, handle.module.bake()

    padded, packed = run(pad), run(PackedCollator())
    assert len(packed[0]) == 4
    assert packed[0] == pytest.approx(padded[0], rel=2e-5)
    torch.testing.assert_close(packed[1], padded[1], rtol=1e-4, atol=1e-5)


def test_a_known_family_out_of_reach_says_why() -> None:
    model = make("llama")
    model.model.layers[1].self_attn.is_causal = False
    handle = prefixcore.attach(model, PROMPT)
    assert not handle.can_pack
    with pytest.raises(
        NotImplementedError, match="LlamaForCausalLM cannot be .* model.layers.1.self_attn is not causal"
    ):
        model(**PackedCollator()(rows()))


@pytest.mark.parametrize("prepared", [False, True], ids=["first packed batch", "later"])
def test_compiled(prepared: bool) -> None:
    model, handle = attach()
    batch = PackedCollator()(rows())
    expected = model(**batch, use_cache=False)
    expected.loss.backward()
    wanted = gradients(handle)
    if not prepared:
        handle.detach()
        handle = prefixcore.attach(model, PROMPT)
    torch._dynamo.reset()
    got = torch.compile(model, backend="aot_eager")(**batch, use_cache=False)
    torch.testing.assert_close(got.loss, expected.loss, **close)
    got.loss.backward()
    torch.testing.assert_close(gradients(handle), wanted, **close)
    torch._dynamo.reset()
    handle.detach()
    assert model.config._attn_implementation == "sdpa"


def test_compiled_beside_a_model_of_the_same_configuration() -> None:
    """The first packed call switches attention, inside compiled code: who has switched it stays known."""
    model, handle = attach()
    other = type(model)(model.config).eval()
    others = prefixcore.attach(other, prefixcore.PrefixTuningConfig(num_virtual_tokens=2))
    batch = PackedCollator()(rows())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")(**batch, use_cache=False)
    torch._dynamo.reset()
    others.detach()
    torch.testing.assert_close(model(**batch, use_cache=False).loss, compiled.loss, **close)
    prefixcore.attach(other, PROMPT).detach()
    handle.detach()
    assert model.config._attn_implementation == "sdpa"


def test_batches_of_a_collator_that_tells_sequences_by_index() -> None:
    """As TRL's packing does, which takes transformers' collator."""
    from transformers import DataCollatorWithFlattening

    features = [{"input_ids": row["input_ids"]} for row in rows()]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(features)
    assert "seq_idx" in batch
    model, _ = attach()
    expected = model(**{name: value for name, value in batch.items() if name != "seq_idx"})
    torch.testing.assert_close(model(**batch).loss, expected.loss, rtol=0, atol=0)
