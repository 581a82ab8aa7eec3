"""What needs keys at other positions, on families whose keys turn in ways of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import prefixcore
from prefixcore import PrefixTuningConfig
from prefixcore.adapters import read_adapter
from prefixcore.distill import compose
from prefixcore.hf.baking.bake_prefix import ids_to_prefix
from prefixcore.hf.positions.rotary import turn

from .models import Tokenizer, tokens
from .test_rotary import build, cached_keys

TEXT = "hello"
P = len(TEXT)
close = {"rtol": 1e-4, "atol": 1e-4}


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def text_ids() -> list[int]:
    return Tokenizer()(TEXT)["input_ids"]


def attach(model: Any, **options: Any) -> prefixcore.Handle:
    return prefixcore.attach(model, PrefixTuningConfig(init_text=TEXT, **options), tokenizer=Tokenizer())


@pytest.mark.parametrize(
    "family", ["phi", "glm", "cohere2", "smollm3", "gemma3", "qwen3-moe", "deepseek-v3", "gpt-j", "ernie-vl"]
)
def test_a_start_from_a_text_at_position_0_has_the_effect_of_the_text(family: str) -> None:
    model, rest = build(family), tokens(2, 7)
    expected = logits(model, torch.cat((torch.tensor([text_ids()]).expand(2, -1), rest), 1))[:, P:]
    with attach(model, position_offset=False):
        torch.testing.assert_close(logits(model, rest), expected, **close)
    with prefixcore.attach(model, PrefixTuningConfig(init=ids_to_prefix(model, text_ids()), position_offset=False)):
        assert not torch.allclose(logits(model, rest), expected, rtol=1e-2, atol=1e-2), "without a turn it is another"


def test_a_start_in_some_layers_is_turned_by_their_table() -> None:
    """Gemma 3's second layer, of a table of its own."""
    model = build("gemma3")
    with attach(model, position_offset=False) as handle:
        expected = handle.bake()[1]
    with attach(model, position_offset=False, layers=[1]) as handle:
        ((key, value),) = handle.bake()
    torch.testing.assert_close(key, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(value, expected[1], rtol=0, atol=0)
    ((moved, _),) = turn(model, [(key, value)], P, [1])
    torch.testing.assert_close(moved, ids_to_prefix(model, text_ids())[1][0], **close)


@pytest.mark.parametrize(
    ("family", "layers"), [("phi", None), ("glm", None), ("ernie-vl", None), ("gemma3", [1]), ("smollm3", [1, 2])]
)
def test_bake_and_conversion_turn_to_either_side(family: str, layers: list[int] | None, tmp_path: Path) -> None:
    model, ids = build(family), tokens(2, 6)
    config = PrefixTuningConfig(num_virtual_tokens=P, init="random", layers=layers, position_offset=False)
    with prefixcore.attach(model, config) as handle:
        handle.save(tmp_path / "zero")
        expected = logits(model, ids)
    prefixcore.bake(model, tmp_path / "zero", tmp_path / "p")
    prefixcore.bake(model, tmp_path / "p", tmp_path / "again", position_offset=False)
    prefixcore.export_adapter(tmp_path / "p", "adapters", tmp_path / "theirs", model=model)
    with pytest.warns(UserWarning, match="read as the adapters library computes it"):
        prefixcore.import_adapter(tmp_path / "theirs", "adapters", tmp_path / "ours", model=model)
    assert [read_adapter(tmp_path / name).config.position_offset for name in ("p", "again", "ours")] == [
        True, False, True]  # fmt: skip
    for name in ("p", "again", "ours"):
        with prefixcore.load(model, tmp_path / name):
            torch.testing.assert_close(logits(model, ids), expected, **close)
    before, after = (read_adapter(tmp_path / name).tensors for name in ("zero", "again"))
    for pair, other in zip(before, after, strict=True):
        torch.testing.assert_close(other, pair, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("family", "layers"), [("glm", None), ("gemma3", [1]), ("gemma3", None), ("bloom", None), ("smollm3", [1])]
)
def test_composed_prefixes_stand_behind_each_other(family: str, layers: list[int] | None, tmp_path: Path) -> None:
    """The second one's keys are those of its text where it begins behind the first one's tokens."""
    model = build(family)
    for name, ids in (("one", text_ids()), ("other", [7, 8])):
        pairs = ids_to_prefix(model, ids)
        init = pairs if layers is None else [pairs[layer] for layer in layers]
        with prefixcore.attach(model, PrefixTuningConfig(init=init, layers=layers)) as handle:
            handle.save(tmp_path / name, task=name)
    with prefixcore.load(model, compose(model, [tmp_path / "one", tmp_path / "other"], tmp_path / "both")) as handle:
        found = handle.bake()
    expected = behind(model, [7, 8], P)
    for (key, _), layer in zip(found, range(len(expected)) if layers is None else layers, strict=True):
        torch.testing.assert_close(key[:, P:], expected[layer], **close)


def behind(model: Any, ids: list[int], first: int) -> list[Tensor]:
    """The keys of a text that begins at position `first`."""
    return [key for key, _ in cached_keys(model, torch.tensor([ids]), first)]


class _Words(Tokenizer):
    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def test_the_vocabulary_of_a_prefix_before_position_0(tmp_path: Path) -> None:
    """What is compared with each token stands where a token can stand, whichever part of a key turns."""
    from prefixcore.audit.running import FrozenRun
    from prefixcore.audit.virtual import virtual_tokens
    from prefixcore.audit.vocabulary import nearest_to_prefix

    model = build("glm")
    with attach(model, position_offset=False) as handle:
        handle.save(tmp_path / "start")
    virtual = virtual_tokens(read_adapter(tmp_path / "start"))
    found = nearest_to_prefix(FrozenRun(model), _Words(), virtual, text_ids(), lambda steps, what: steps)
    for kind in found["kinds"].values():
        assert [row[0]["id"] for row in kind["tokens"]] == text_ids()
        assert min(kind["cosine_with_start"]) > 0.999
