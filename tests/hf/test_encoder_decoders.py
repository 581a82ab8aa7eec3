"""Encoder-decoders: a prefix in self- and cross-attention, soft prompts before the encoder, generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig
from prefixcore.hf import ENCODER_DECODERS, reaching
from prefixcore.hf.attention import interface
from prefixcore.hf.measures import attention_on_prefix

from .encoder_decoders import BIASED, FAMILIES, GREEDY, inputs, labels, make
from .encoders import P, concatenated, nine_tenths
from .encoders import make as encoder
from .models import assert_same, state

PLACES = [None, ("encoder",), ("decoder",), ("cross",)]

pytestmark = pytest.mark.filterwarnings("ignore")


def config(where: Any = None, **changes: Any) -> PrefixTuningConfig:
    return PrefixTuningConfig(P, init="random", seed=0, where=where, **{"task_type": "SEQ_2_SEQ_LM", **changes})


def move_positions(model: Any) -> None:
    """Lets the decoder count positions from P on, as with P tokens in its cache."""

    def move(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("position_ids") is not None:
            return args, {**kwargs, "position_ids": kwargs["position_ids"] + P}
        return (*args[:2], args[2] + P), kwargs

    model.get_decoder().embed_positions.register_forward_pre_hook(move, with_kwargs=True)


def test_every_known_family_is_tested() -> None:
    assert set(FAMILIES) == set(ENCODER_DECODERS)


@pytest.mark.parametrize("where", [*PLACES, ("encoder", "decoder"), ("encoder", "cross")])
def test_a_call_evaluates_a_prefix_once(where: Any) -> None:
    """For both stacks: while it is trained, that is a reparameterisation's whole forward."""
    model, evaluated = make("bart"), []
    handle = prefixcore.attach(model, config(where, reparameterization="mlp"))
    handle.module.register_forward_hook(lambda *_: evaluated.append(None))
    model(**inputs("bart"), labels=labels()).loss.backward()
    assert len(evaluated) == 1


@pytest.mark.parametrize(("where", "times"), [(("encoder",), 1), (("decoder",), 1), (None, 2)])
def test_generate_evaluates_a_prefix_once_for_each_stack_that_has_it(where: Any, times: int) -> None:
    """Which `generate` calls by themselves: the encoder before the decoder's first step, whose cache keeps the rest."""
    model, evaluated = make("bart"), []
    handle = prefixcore.attach(model, config(where, reparameterization="mlp"))
    handle.module.register_forward_hook(lambda *_: evaluated.append(None))
    model.generate(**inputs("bart"), **GREEDY)
    assert len(evaluated) == times


def test_a_cache_behind_an_encoder_with_a_prefix_says_so() -> None:
    model, batch = make("bart"), inputs("bart")
    with prefixcore.attach(model, config(("encoder",))):
        ids = torch.tensor([[2, 5], [2, 7]])
        filled = model(**batch, decoder_input_ids=ids, use_cache=True)
        again = {"encoder_outputs": (filled.encoder_last_hidden_state,), "decoder_input_ids": ids[:, -1:]}
        cache = filled.past_key_values
        expected = model(**batch, decoder_input_ids=torch.cat((ids, ids[:, -1:]), 1)).logits[:, -1:]
        got = model(**again, attention_mask=batch["attention_mask"], past_key_values=cache).logits
        torch.testing.assert_close(got, expected)
    with pytest.raises(RuntimeError, match="filled by a model with virtual tokens"):
        model(**again, attention_mask=batch["attention_mask"], past_key_values=cache)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients(family: str, where: Any) -> None:
    """In float64, beside the model's own eager attention with concatenated keys and values."""
    model, batch = make(family).double(), {**inputs(family), "labels": labels()}
    batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    handle = prefixcore.attach(model, config(where))
    handle.module.double()
    pairs = [(k.requires_grad_(), v.requires_grad_()) for k, v in handle.bake()]
    layers = handle.config.layers or list(range(len(pairs)))
    out = model(**batch)
    out.loss.backward()
    gradients = [p.grad for p in handle.parameters()]
    handle.detach()
    without = model(**batch).logits
    if family not in BIASED and where in (None, ("decoder",)):
        move_positions(model)
    by_call: list[Any] = [None] * ((3 if family in BIASED else 2) + 3 * 2)
    for layer, pair in zip(layers, pairs, strict=True):
        by_call[layer] = pair
    with concatenated(model, by_call):
        expected = model(**batch)
    wanted = torch.autograd.grad(expected.loss, [x for pair in pairs for x in pair])
    assert (expected.logits - without).abs().max() > 1e-3, "a prefix that does nothing shows nothing"
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=1e-6)
    for gradient, one in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, one, rtol=1e-4, atol=1e-7)


def test_where() -> None:
    model = make("bart")
    counts = {}
    for where in PLACES:
        with prefixcore.attach(model, config(where)) as handle:
            counts[where] = len(handle.bake())
    assert counts == {None: 8, ("encoder",): 2, ("decoder",): 3, ("cross",): 3}
    with pytest.raises(ValueError, match="where must be a list of some of"):
        config(("middle",))
    with pytest.raises(ValueError, match="has the layers"):
        prefixcore.attach(model, config(("encoder",), layers=[7]))


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family: str) -> None:
    """With caches as without, greedily and with beams; and as the forward of what was generated."""
    model, batch = make(family), inputs(family)
    with prefixcore.attach(model, config()):
        cached = model.generate(**batch, **GREEDY)
        assert torch.equal(cached, model.generate(**batch, **GREEDY, use_cache=False))
        beams = model.generate(**batch, **GREEDY, num_beams=3)
        assert torch.equal(beams, model.generate(**batch, **GREEDY, num_beams=3, use_cache=False))
        if family == "whisper":  # returns no start of the text
            return
        logits = model(**batch, decoder_input_ids=cached).logits
        assert torch.equal(logits[:, -4:-1].argmax(-1), cached[:, -3:])


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_rows_of_a_bank(family: str, kind: str) -> None:
    """Each row its own, or none, in a forward and in generate with beams."""
    model, batch = make(family), inputs(family)
    bank = prefixcore.PromptBank(model)
    for name, length in (("long", 6), ("short", 2)):
        made = (
            PrefixTuningConfig(length, init="random", seed=length)
            if kind == "prefix"
            else PromptTuningConfig(length, init="random", seed=length)
        )
        bank.attach(name, made)
    if kind == "prompt" and family == "bart":  # counts padding as positions
        with pytest.raises(NotImplementedError, match="soft prompts of different lengths"):
            model(**batch, decoder_input_ids=labels().clamp(min=0), task_ids=["long", "short"])
        return
    for names in (["long", "short"], ["short", None], [None, "long"]):
        got = model(**batch, decoder_input_ids=labels().clamp(min=0), task_ids=names).logits
        tokens = model.generate(**batch, **GREEDY, num_beams=2, task_ids=names)
        for row, name in enumerate(names):
            one = {key: x[row : row + 1] for key, x in batch.items()}
            alone = model(**one, decoder_input_ids=labels()[row : row + 1].clamp(min=0), task_ids=[name]).logits
            torch.testing.assert_close(got[row], alone[0], rtol=1e-4, atol=1e-4)
            alone_tokens = model.generate(**one, **GREEDY, num_beams=2, task_ids=[name])
            assert torch.equal(tokens[row], alone_tokens[0])


@pytest.mark.parametrize("family", ["bart", "t5", "whisper"])
def test_gradient_checkpointing(family: str) -> None:
    model, batch = make(family), {**inputs(family), "labels": labels()}
    handle = prefixcore.attach(model, config())
    gradients = []
    for on in (False, True):
        model.train()
        if on:
            model.gradient_checkpointing_enable()
        model(**batch, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in handle.parameters()])
        model.zero_grad()
    for plain, repeated in zip(*gradients, strict=True):
        torch.testing.assert_close(repeated, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["bart", "t5", "whisper"])
@pytest.mark.parametrize("where", [None, ("decoder", "cross")])
def test_saving_and_loading(family: str, where: Any, tmp_path: Any) -> None:
    model, batch = make(family), {**inputs(family), "labels": labels()}
    with prefixcore.attach(model, config(where)) as handle:
        expected = model(**batch).logits
        handle.save(tmp_path / "adapter")
    with prefixcore.load(model, tmp_path / "adapter") as handle:
        assert handle.config.where == where
        assert torch.equal(model(**batch).logits, expected)
    with prefixcore.load(model, tmp_path / "adapter", trainable=True):
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_detaching_leaves_the_model_as_it_was(family: str) -> None:
    model, batch = make(family), {**inputs(family), "labels": labels()}
    before, bare = state(model), model(**batch).logits
    for made in (config(), PromptTuningConfig(P, seed=0)):
        handle = prefixcore.attach(model, made)
        with handle.disabled():
            torch.testing.assert_close(model(**batch).logits, bare)  # a frozen bias lets PyTorch take another kernel
        assert not torch.allclose(model(**batch).logits, bare)
        handle.detach()
        assert_same(before, {**state(model), "rng": before["rng"]})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_of_an_unknown_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reaching, "is_known_encoder_decoder", lambda model: False)
    with prefixcore.attach(make(family), config()):
        pass
    monkeypatch.setattr(interface, "prefix_attention", nine_tenths(interface.prefix_attention))
    with pytest.raises(NotImplementedError, match="not what it would be if it was concatenated"):
        prefixcore.attach(make(family), config())


def test_what_is_refused() -> None:
    model = make("bart")
    with prefixcore.attach(model, PromptTuningConfig(P, seed=0)):
        batch = inputs("bart")
        states = torch.randn(2, 7, 32)
        with pytest.raises(ValueError, match="computed without the soft prompt"):
            model(
                encoder_outputs=(states,), attention_mask=batch["attention_mask"], decoder_input_ids=batch["input_ids"]
            )
    with pytest.raises(NotImplementedError, match="soft prompts are for models that read input_ids"):
        prefixcore.attach(make("whisper"), PromptTuningConfig(P, init="zero"))
    with pytest.raises(ValueError, match="for encoder-decoders, but the model has one stack"):
        prefixcore.attach(encoder("bert"), config(("encoder",)))
    with prefixcore.attach(model, config()), pytest.raises(ValueError, match="64 positions"):
        model(**inputs("bart"), decoder_input_ids=torch.ones(2, 62, dtype=torch.long))


@pytest.mark.parametrize("made", [config(), PromptTuningConfig(P, seed=0)])
def test_a_decoder_that_is_given_nothing(made: Any) -> None:
    """T5 makes no start from what the encoder reads, as BART does."""
    model = make("t5")
    with (
        prefixcore.attach(model, made),
        pytest.raises(ValueError, match="either decoder_input_ids or"),
    ):
        model(**inputs("t5"))


def test_what_has_no_meaning_is_refused(tmp_path: Any) -> None:
    """No text is a prefix of both stacks."""
    model = make("bart")
    with prefixcore.attach(model, PromptTuningConfig(P, seed=0)) as handle:
        handle.save(tmp_path / "prompt")
    with pytest.raises(NotImplementedError, match="is an encoder-decoder: only a decoder alone"):
        prefixcore.bake(model, tmp_path / "prompt", tmp_path / "baked")


@pytest.mark.parametrize("made", [config(), PromptTuningConfig(P, seed=0)])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_cache_is_for_the_virtual_tokens_that_filled_it(family: str, made: Any) -> None:
    """Without a mask nothing else would fail: the cache holds what the decoder read of the encoder."""
    model, ids = make(family), torch.tensor([[2, 11, 23, 42], [2, 31, 9, 7]])
    batch = {"input_ids": inputs(family)["input_ids"].clamp(min=3)}
    with prefixcore.attach(model, made) as handle:
        whole = model(**batch, decoder_input_ids=ids).logits

        def start() -> dict[str, Any]:
            out = model(**batch, decoder_input_ids=ids[:, :2], use_cache=True)
            return {"past_key_values": out.past_key_values, "encoder_outputs": (out.encoder_last_hidden_state,)}

        rest = {"decoder_input_ids": ids[:, 2:]}
        torch.testing.assert_close(model(**start(), **rest).logits, whole[:, 2:], rtol=1e-4, atol=1e-5)
        again = start()["past_key_values"]
        again.reorder_cache(torch.tensor([1, 0]))
        filled = start()
        with handle.disabled():
            with pytest.raises(RuntimeError, match="filled by a model with virtual tokens attached"):
                model(**filled, **rest)
            bare = start()
        with pytest.raises(ValueError, match="computed without"):
            model(**batch, **rest, past_key_values=bare["past_key_values"])
    with pytest.raises(RuntimeError, match="filled by a model with virtual tokens attached"):
        model(**filled, **rest)


@pytest.mark.parametrize("kinds", [("a prefix", "a prompt"), ("a prompt", None)])
def test_generate_with_a_bank_of_both_kinds(kinds: Any) -> None:
    """Rows of a soft prompt alone, in a model whose attention another adapter's prefix has reached."""
    model, batch = make("t5"), inputs("t5")
    bank = prefixcore.PromptBank(model)
    bank.attach("a prefix", PrefixTuningConfig(3, init="random", seed=1))
    bank.attach("a prompt", PromptTuningConfig(5, init="random", seed=2))
    tokens = model.generate(**batch, **GREEDY, num_beams=2, task_ids=list(kinds))
    for row, kind in enumerate(kinds):
        one = {name: x[row : row + 1] for name, x in batch.items()}
        assert torch.equal(model.generate(**one, **GREEDY, num_beams=2, task_ids=[kind])[0], tokens[row])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_on_the_prefix(family: str) -> None:
    """Of the tokens that the decoder reads, which are the labels', and of the encoder's own; beside eager weights."""
    model, batch = make(family), {**inputs(family), "labels": labels()}
    handle = prefixcore.attach(model, config())
    got = list(attention_on_prefix(handle, [batch]).values())
    pairs = handle.bake()
    handle.detach()
    if family not in BIASED:
        move_positions(model)
    shares: list[float] = []
    softmax = torch.nn.functional.softmax

    def watching(scores: Tensor, *args: Any, **options: Any) -> Tensor:
        weights = softmax(scores, *args, **options)
        in_encoder = len(shares) < (3 if family in BIASED else 2)
        keep = batch.get("attention_mask") if in_encoder else labels() != -100
        mass = weights[..., :P].sum(-1).mean(1)
        keep = torch.ones_like(mass) if keep is None else keep.float()
        shares.append(float((mass * keep).sum() / keep.sum()))
        return weights

    with concatenated(model, pairs), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", watching)
        model(**batch)
    assert got == pytest.approx(shares, rel=1e-4)
