"""A prefix on encoders: every query sees it, in every layer, whatever the mask; beside the model's own eager code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig
from prefixcore.hf import ENCODERS, reaching, verify_encoder
from prefixcore.hf.attention import interface
from prefixcore.hf.measures import attention_on_prefix

from .encoders import MOVING, SIDES, TEXT, P, concatenated, inputs, make, moved, nine_tenths
from .models import assert_same, state

pytestmark = [
    pytest.mark.filterwarnings("ignore:config.*attention_probs_dropout_prob|config.*attention_dropout"),
    pytest.mark.filterwarnings("ignore:.*stays as it is"),
]


SPANS = ("start_positions", "end_positions")


def config(**changes: Any) -> PrefixTuningConfig:
    return PrefixTuningConfig(P, init="random", seed=0, **{"task_type": None, **changes})


def test_every_known_family_is_tested() -> None:
    assert {*TEXT, "vit"} == set(ENCODERS)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", ENCODERS)
def test_outputs_and_gradients(family: str, side: str) -> None:
    """In float64, beside the model's own eager attention with concatenated keys and values."""
    model, batch = make(family).double(), inputs(family, side)
    batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    seen = batch["attention_mask"].bool() if family != "vit" else slice(None)
    handle = prefixcore.attach(model, config())
    handle.module.double()
    pairs = [(k.requires_grad_(), v.requires_grad_()) for k, v in handle.bake()]
    got = model(**batch)[0][seen]
    direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (got * direction).sum().backward()
    gradients = [p.grad for p in handle.parameters()]
    handle.detach()
    if family in MOVING:
        batch["position_ids"] = moved(family, batch["attention_mask"])
    with concatenated(model, pairs):
        expected = model(**batch)[0][seen]
        wanted = torch.autograd.grad((expected * direction).sum(), [x for pair in pairs for x in pair])
    assert (expected - model(**batch)[0][seen]).abs().max() > 0.1, "a prefix that does nothing shows nothing"
    # The eager code of these two computes the softmax in float32.
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if family in ("modernbert", "vit") else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(got, expected, **tolerance)
    for gradient, one in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, one, **tolerance)


def test_a_window_to_both_sides() -> None:
    """The tiny ModernBERT has windows of two tokens to each side, far less than the text."""
    model, batch = make("modernbert"), inputs("modernbert")
    assert model.config.sliding_window == 2
    assert "sliding_attention" in model.config.layer_types
    with prefixcore.attach(model, config(layers=[0])):
        before = model(**batch)[0]
    assert torch.isfinite(before).all()


@pytest.mark.parametrize(
    ("family", "head", "labels"),
    [
        ("bert", "ForSequenceClassification", {"labels": torch.tensor([0, 1, 2])}),
        ("roberta", "ForSequenceClassification", {"labels": torch.tensor([0, 1, 2])}),
        ("distilbert", "ForTokenClassification", {"labels": torch.ones(3, 9, dtype=torch.long)}),
        ("electra", "ForMaskedLM", {"labels": torch.full((3, 9), 5)}),
        ("albert", "ForQuestionAnswering", {name: torch.tensor([1, 2, 0]) for name in SPANS}),
        ("modernbert", "ForSequenceClassification", {"labels": torch.tensor([0, 1, 2])}),
        ("vit", "ForImageClassification", {"labels": torch.tensor([0, 1, 2])}),
    ],
)
def test_heads_are_trained_along(family: str, head: str, labels: dict[str, Tensor]) -> None:
    model = make(family, head, num_labels=2 if head == "ForQuestionAnswering" else 3)
    batch = {**inputs(family, "right"), **labels}
    names = ["qa_outputs"] if head == "ForQuestionAnswering" else ["classifier"]
    names = [] if head == "ForMaskedLM" else names
    handle = prefixcore.attach(model, config(modules_to_save=names))
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert {name.split(".")[0] for name, _ in handle.heads.named_parameters()} == set(names)


@pytest.mark.parametrize("family", ["bert", "albert", "vit"])
def test_detaching_leaves_the_model_as_it_was(family: str) -> None:
    model = make(family)
    before, bare = state(model), model(**inputs(family))[0]
    handle = prefixcore.attach(model, config())
    with handle.disabled():
        assert torch.equal(model(**inputs(family))[0], bare)
    assert not torch.allclose(model(**inputs(family))[0], bare)
    handle.detach()
    assert_same(before, {**state(model), "rng": before["rng"]})


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "vit"])
def test_rows_of_a_bank(family: str) -> None:
    """Each row of a batch sees its own prefix, or none, as it does alone."""
    model = make(family)
    bank = prefixcore.PromptBank(model)
    for name, length in (("long", 6), ("short", 2)):
        bank.attach(name, PrefixTuningConfig(length, init="random", seed=length, task_type=None))
    batch = inputs(family, "right")
    got = model(**batch, task_ids=["long", None, "short"])[0]
    for row, name in enumerate(["long", None, "short"]):
        alone = model(**{key: x[row : row + 1] for key, x in batch.items()}, task_ids=[name])[0]
        seen = batch["attention_mask"][row].bool() if family != "vit" else slice(None)
        torch.testing.assert_close(got[row][seen], alone[0][seen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert", "vit"])
def test_gradient_checkpointing(family: str) -> None:
    model, batch = make(family), inputs(family, "right")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    handle = prefixcore.attach(model, config())
    gradients = []
    for on in (False, True):
        model.train()
        if on:
            model.gradient_checkpointing_enable()
        model(**batch)[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in handle.parameters()])
        model.zero_grad()
    for plain, repeated in zip(*gradients, strict=True):
        torch.testing.assert_close(repeated, plain, rtol=1e-4, atol=1e-4)


def test_shared_layers_have_prefixes_of_their_own() -> None:
    """ALBERT calls one module for each layer; the k-th call sees the k-th prefix."""
    model = make("albert")
    model.gradient_checkpointing = False  # transformers' own has none so far
    handle = prefixcore.attach(model, config())
    assert len(handle.bake()) == 3
    assert len({float(key.sum()) for key, _ in handle.bake()}) == 3
    first = model(**inputs("albert"))[0]
    with torch.no_grad():
        handle.module.layers[2].value.zero_()
    assert not torch.allclose(model(**inputs("albert"))[0], first)
    model.gradient_checkpointing = True
    model.train()
    with pytest.raises(NotImplementedError, match="share a module.*turn it off"):
        model(**inputs("albert"))


def test_compiled() -> None:
    model, batch = make("bert"), inputs("bert", "right")
    prefixcore.attach(model, config())
    expected = model(**batch)[0]
    got = torch.compile(model, backend="aot_eager")(**batch)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "albert", "modernbert", "vit"])
def test_saving_and_loading(family: str, tmp_path: Any) -> None:
    head = "ForImageClassification" if family == "vit" else "ForSequenceClassification"
    model, batch = make(family, head), inputs(family, "right")
    with prefixcore.attach(model, config(modules_to_save=["classifier"])) as handle:
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
        expected = model(**batch).logits
        handle.save(tmp_path / "adapter")
    assert not torch.allclose(model(**batch).logits, expected)
    with prefixcore.load(model, tmp_path / "adapter"):
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("init", ["vocab", "zero"])
def test_starts(init: str) -> None:
    model = make("roberta")
    with prefixcore.attach(model, PrefixTuningConfig(P, init=init, seed=0)):
        assert torch.isfinite(model(**inputs("roberta"))[0]).all()


def test_what_images_cannot_have() -> None:
    model = make("vit")
    with pytest.raises(ValueError, match="starts from tokens, but ViTModel reads pixel_values"):
        prefixcore.attach(model, PrefixTuningConfig(P))
    with pytest.raises(NotImplementedError, match="soft prompts are for models that read input_ids"):
        prefixcore.attach(model, PromptTuningConfig(P, init="zero"))
    with prefixcore.attach(model, config()), pytest.raises(ValueError, match="needs pixel_values"):
        model()


def test_more_virtual_tokens_than_positions_where_none_are_moved() -> None:
    """A prefix takes none of ALBERT's positions, and all of BERT's."""
    many = PrefixTuningConfig(70, init="zero", task_type=None)
    with prefixcore.attach(make("albert"), many):
        pass
    with pytest.raises(ValueError, match="leave no room"):
        prefixcore.attach(make("bert"), many)
    model = make("bert")
    with prefixcore.attach(model, PrefixTuningConfig(60, init="zero")), pytest.raises(ValueError, match="64 positions"):
        model(**inputs("bert"))


def test_attention_weights_are_refused() -> None:
    model = make("bert")
    with prefixcore.attach(model, config()), pytest.raises(NotImplementedError, match="output_attentions"):
        model(**inputs("bert"), output_attentions=True)


@pytest.mark.parametrize("family", ENCODERS)
def test_the_check_of_an_unknown_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes for what is right, and sees an op that leaves a hundredth of the prefix's values out."""
    monkeypatch.setattr(reaching, "is_known_encoder", lambda model: False)
    monkeypatch.setitem(reaching.TESTED, "prefix", frozenset())
    with (
        pytest.warns(UserWarning, match="a prefix computed what concatenated keys and values do"),
        prefixcore.attach(make(family), config()),
    ):
        pass
    monkeypatch.setattr(interface, "prefix_attention", nine_tenths(interface.prefix_attention))
    model = make(family)
    before = state(model)
    with pytest.raises(NotImplementedError, match="not what it would be if it was concatenated"):
        prefixcore.attach(model, config())
    assert_same(before, {**state(model), "rng": before["rng"]})
    assert verify_encoder.CONCATENATED


def test_families_out_of_reach_are_refused() -> None:
    import transformers

    sizes = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    for name in ("MPNet", "DebertaV2"):
        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes))
        with pytest.raises(NotImplementedError, match="has no attention that a prefix reaches"):
            prefixcore.attach(model, config())


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_the_attention_on_the_prefix(family: str) -> None:
    """Of an encoder that reads tokens and of one that reads images; all of it where keys of the text are far off."""
    model, batch = make(family), inputs(family, "right")
    handle = prefixcore.attach(model, config())
    shares = attention_on_prefix(handle, [batch])
    assert list(shares) == [f"prefix_attention/layer_{layer}" for layer in range(3)]
    assert all(0 < share < 1 for share in shares.values())
    with torch.no_grad():
        for layer in handle.module.layers:
            layer.key.zero_()
        for name, parameter in model.named_parameters():
            if "key" in name or "k_proj" in name:
                parameter.zero_()
    [share, *_] = attention_on_prefix(handle, [batch]).values()
    seen = [P / (P + n) for n in ((9, 6, 2) if family == "bert" else (17, 17, 17))]
    weights = (9, 6, 2) if family == "bert" else (1, 1, 1)
    assert share == pytest.approx(sum(s * w for s, w in zip(seen, weights, strict=True)) / sum(weights), rel=1e-5)
