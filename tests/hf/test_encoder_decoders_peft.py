"""Encoder-decoders beside PEFT: its prefixes and soft prompts are read, ours are written where its files hold them."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

import prefixcore
from prefixcore import PrefixTuningConfig

from .encoder_decoders import BIASED, GREEDY, TEXT, inputs, labels, make
from .encoders import P

IN_PEFT = [name for name in TEXT if name not in BIASED]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("family", IN_PEFT)
def test_a_prefix_of_peft(family: str, tmp_path: Any) -> None:
    """PEFT gives layer i of the decoder the pair 2i, counted around, and no other attention any."""
    torch.manual_seed(3)
    options: dict[str, Any] = {"num_layers": 3, "num_virtual_tokens": P, "task_type": "SEQ_2_SEQ_LM"}
    theirs = peft.get_peft_model(make(family), peft.PrefixTuningConfig(**options)).eval()
    theirs.save_pretrained(tmp_path)
    batch = {**inputs(family), "labels": labels()}
    expected = theirs(**batch)
    expected.loss.backward()
    model = make(family)
    handle = prefixcore.load(model, tmp_path, trainable=True)
    assert handle.config.where == ("decoder",)
    got = model(**batch)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-6)
    got.loss.backward()
    gradient = theirs.prompt_encoder["default"].embedding.weight.grad.view(P, 6, 4, 8)
    for layer, pair in enumerate(handle.module.layers):
        for which, one in enumerate((pair.key, pair.value)):
            wanted = gradient[:, 2 * (2 * layer % 3) + which].transpose(0, 1)
            torch.testing.assert_close(one.grad, wanted, rtol=1e-3, atol=1e-6)
    tokens = theirs.generate(**inputs(family), **GREEDY)
    assert torch.equal(model.generate(**inputs(family), **GREEDY), tokens)


def test_a_prefix_of_peft_on_t5_is_refused(tmp_path: Any) -> None:
    options: dict[str, Any] = {"num_layers": 3, "num_virtual_tokens": P, "task_type": "SEQ_2_SEQ_LM"}
    peft.get_peft_model(make("t5"), peft.PrefixTuningConfig(**options)).save_pretrained(tmp_path)
    with pytest.raises(prefixcore.AdapterError, match="adds a learned bias"):
        prefixcore.load(make("t5"), tmp_path)


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PromptEncoderConfig])
@pytest.mark.parametrize("family", TEXT)
def test_a_soft_prompt_of_peft(family: str, kind: Any, tmp_path: Any) -> None:
    torch.manual_seed(3)
    options: dict[str, Any] = {"num_virtual_tokens": P, "task_type": "SEQ_2_SEQ_LM"}
    if kind is peft.PromptEncoderConfig:
        options["encoder_hidden_size"] = 16
    theirs = peft.get_peft_model(make(family), kind(**options)).eval()
    theirs.save_pretrained(tmp_path)
    batch = {**inputs(family), "labels": labels()}
    expected = theirs(**batch)
    model = make(family)
    handle = prefixcore.load(model, tmp_path, trainable=True)
    got = model(**batch)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-6)
    got.loss.backward()
    expected.loss.backward()
    if kind is peft.PromptTuningConfig:
        gradient = theirs.prompt_encoder["default"].embedding.weight.grad
        torch.testing.assert_close(next(handle.module.parameters()).grad, gradient[:P], rtol=1e-3, atol=1e-6)
    tokens = theirs.generate(**inputs(family), **GREEDY)
    assert torch.equal(model.generate(**inputs(family), **GREEDY), tokens)
    beams = model.generate(**inputs(family), **GREEDY, num_beams=2)
    assert torch.equal(beams, theirs.generate(**inputs(family), **GREEDY, num_beams=2))
    handle.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(make(family), tmp_path / "ours").eval()
    torch.testing.assert_close(again(**batch).logits, got.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("family", IN_PEFT)
def test_a_prefix_of_the_decoder_goes_to_peft(family: str, layers: int, tmp_path: Any) -> None:
    """Its files hold a pair for each layer and an empty one behind it, so that none comes around twice."""
    model, batch = make(family, decoder_layers=layers), {**inputs(family), "labels": labels()}
    handle = prefixcore.attach(model, PrefixTuningConfig(P, init="random", seed=1, where=("decoder",)))
    folder = handle.save(tmp_path / "ours")
    with torch.no_grad():
        expected = model(**batch).logits
    beams = model.generate(**inputs(family), **GREEDY, num_beams=2)
    tokens, pairs = model.generate(**inputs(family), **GREEDY), handle.bake()
    handle.detach()
    theirs = peft.PeftModel.from_pretrained(make(family, decoder_layers=layers), folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(theirs.generate(**inputs(family), **GREEDY), tokens)
    assert torch.equal(theirs.generate(**inputs(family), **GREEDY, num_beams=2), beams)
    prefixcore.export_adapter(folder, "peft", tmp_path / "bare")
    theirs.save_pretrained(tmp_path / "again")
    for saved in (folder, tmp_path / "bare", tmp_path / "again"):  # ours, ours without a manifest, and PEFT's own
        with prefixcore.load(model, saved) as loaded:
            assert loaded.config.where == ("decoder",)
            for pair, other in zip(loaded.bake(), pairs, strict=True):
                assert torch.equal(pair[0], other[0])
                assert torch.equal(pair[1], other[1])


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("bart", {"where": ("encoder",)}),
        ("bart", {"where": ("decoder", "cross")}),
        ("bart", {"where": ("decoder",), "layers": [2]}),
        ("bart", {"where": ("decoder",), "num_frozen_tokens": 1}),
        ("bart", {"where": ("decoder",), "position_offset": False}),
        ("t5", {"where": ("decoder",)}),
    ],
    ids=str,
)
def test_what_peft_cannot_hold_is_not_written_for_it(family: str, options: Any, tmp_path: Any) -> None:
    with prefixcore.attach(make(family), PrefixTuningConfig(P, init="random", **options)) as handle:
        folder = handle.save(tmp_path / "ours")
    assert not (folder / "adapter_config.json").exists()
    with pytest.raises(prefixcore.AdapterError, match="PEFT cannot hold it"):
        prefixcore.export_adapter(folder, "peft", tmp_path / "peft")
