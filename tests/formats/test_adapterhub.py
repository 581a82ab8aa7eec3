"""The `adapters` library: its own files give its own outputs, and ours are its files."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import prefixcore
from prefixcore.adapters import AdapterError, read_adapter
from tests.hf.models import make

from .conftest import FIXTURES, make_adapter
from .outputs import with_adapter

THEIRS = FIXTURES / "adapters"
SIZES = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 4, "vocab_size": 24, "num_hidden_layers": 3}
pytestmark = pytest.mark.filterwarnings("ignore:read as the adapters library computes it")


@pytest.fixture(scope="module")
def llama() -> Any:
    model = make("llama", **SIZES)
    model.load_state_dict(load_file(THEIRS / "model.safetensors"))
    return model


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(THEIRS / "expected.safetensors")


@pytest.mark.parametrize(("name", "tokens", "layers"), [("flat", 4, [0, 2]), ("mlp", 3, [0, 1, 2])])
def test_their_files_give_their_outputs(
    name: str, tokens: int, layers: list[int], llama: Any, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="attn_implementation='eager'"):
        folder = prefixcore.import_adapter(THEIRS / name, "adapters", tmp_path / "ours", model=llama)
    adapter = read_adapter(folder)
    assert (adapter.config.num_virtual_tokens, adapter.layers) == (tokens, layers)
    with torch.no_grad():
        torch.testing.assert_close(llama(expected["ids"]).logits, expected["bare"], atol=1e-5, rtol=0)
    assert float((expected["bare"] - expected[name]).abs().max()) > 1
    torch.testing.assert_close(with_adapter(llama, folder, expected["ids"]), expected[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["flat", "mlp"])
def test_ours_are_the_same_numbers_again(name: str, llama: Any, tmp_path: Path) -> None:
    """Back through keys of our positions: the vector that their flat prefix holds."""
    prefixcore.import_adapter(THEIRS / name, "adapters", tmp_path / "ours", model=llama)
    lost = prefixcore.export_adapter(tmp_path / "ours", "adapters", tmp_path / "theirs", model=llama)
    assert lost == ["manifest (task, base model, provenance)"]
    (written,) = torch.load(tmp_path / "theirs" / "pytorch_adapter.bin", weights_only=True).values()
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    before = json.loads((THEIRS / name / "adapter_config.json").read_text())
    assert config["config"]["leave_out"] == before["config"]["leave_out"]
    assert config["config"].keys() == before["config"].keys()
    assert config.keys() == before.keys()
    if name == "flat":
        original = torch.load(THEIRS / name / "pytorch_adapter.bin", weights_only=True)
        torch.testing.assert_close(written, next(iter(original.values())), atol=1e-6, rtol=0)
    again = prefixcore.import_adapter(tmp_path / "theirs", "adapters", tmp_path / "again", model=llama)
    for pair, other in zip(read_adapter(tmp_path / "ours").tensors, read_adapter(again).tensors, strict=True):
        for tensor, second in zip(pair, other, strict=True):
            torch.testing.assert_close(tensor, second, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_keys_turn_as_the_model_turns_them(family: str, tmp_path: Path) -> None:
    """A key at position 3 of the model is its key at position 0, moved on by 3."""
    from prefixcore.hf.attention.recording import record
    from prefixcore.hf.positions.rotary import turn

    model = make(family)
    ids = torch.tensor([[7, 7, 7, 7]])
    first = record(model, ids)[0]  # in the first layer keys depend on the token and its position alone
    pairs = [(first.key[0][:, :1], first.value[0][:, :1])]
    moved = turn(model, pairs, 3, [0])[0][0]
    torch.testing.assert_close(moved, first.key[0][:, 3:], atol=1e-5, rtol=0)
    torch.testing.assert_close(turn(model, turn(model, pairs, 3, [0]), -3, [0])[0][0], pairs[0][0], atol=1e-6, rtol=0)


def test_models_whose_positions_cannot_be_moved(tmp_path: Path) -> None:
    gpt2 = make("gpt2")
    make_adapter(gpt2, prefixcore.PrefixTuningConfig(num_virtual_tokens=3), tmp_path / "gpt2")
    with pytest.raises(AdapterError, match="has learned positions: keys cannot be moved"):
        prefixcore.export_adapter(tmp_path / "gpt2", "adapters", tmp_path / "x", model=gpt2)
    dynamic = make("llama", head_dim=8, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    make_adapter(dynamic, prefixcore.PrefixTuningConfig(num_virtual_tokens=3), tmp_path / "dynamic")
    with pytest.raises(AdapterError, match="turn by the length of the text"):
        prefixcore.export_adapter(tmp_path / "dynamic", "adapters", tmp_path / "x", model=dynamic)


def test_heads_that_the_library_has_no_word_for(model: Any, prefix: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="hidden size / heads wide, 32 / 4, but those of this model are 16 wide"):
        prefixcore.export_adapter(prefix, "adapters", tmp_path / "x", model=model)
    with pytest.raises(AdapterError, match="give the model"):
        prefixcore.export_adapter(prefix, "adapters", tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_gating": True}, "gates make the prefix depend on the text"),
        ({"architecture": "lora"}, "expected 'prefix_tuning', got 'lora'"),
        ({"prefix_length": 10**9}, "prefix_length: expected an integer from 1"),
        ({"prefix_length": 5}, "control_trans: expected shape"),
        ({"leave_out": [7]}, "leave_out: expected layers of 0 to 2"),
        ({"leave_out": [0, 1, 2]}, "leaves no layer"),
        ({"leave_out": []}, "control_trans: expected shape"),
        ({"flat": None}, "flat: expected true or false"),
        ({"flat": False}, "wte.weight: missing"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str, llama: Any, tmp_path: Path) -> None:
    shutil.copytree(THEIRS / "flat", tmp_path / "flat")
    path = tmp_path / "flat" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["config"].update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=message):
        prefixcore.import_adapter(tmp_path / "flat", "adapters", tmp_path / "x", model=llama)
    assert not (tmp_path / "x").exists()


def test_an_unknown_activation_and_a_folder_of_something_else(llama: Any, tmp_path: Path) -> None:
    shutil.copytree(THEIRS / "mlp", tmp_path / "mlp")
    path = tmp_path / "mlp" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["config"]["non_linearity"] = "swish"
    path.write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="non_linearity: expected one of tanh"):
        prefixcore.import_adapter(tmp_path / "mlp", "adapters", tmp_path / "x", model=llama)
    with pytest.raises(AdapterError, match="as save_adapter writes it"):
        prefixcore.import_adapter(tmp_path, "adapters", tmp_path / "x", model=llama)


@pytest.mark.parametrize("name", ["flat", "mlp"])
def test_their_keys_as_they_are(
    name: str, llama: Any, expected: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `position_offset=False` nothing is turned, there or back."""
    from prefixcore.hf.baking import converting

    def turn(*rest: Any) -> None:
        raise AssertionError("keys are turned")

    monkeypatch.setattr(converting, "turn", turn)
    ours = prefixcore.import_adapter(THEIRS / name, "adapters", tmp_path / "a", model=llama, position_offset=False)
    assert read_adapter(ours).config.position_offset is False
    torch.testing.assert_close(with_adapter(llama, ours, expected["ids"]), expected[name], atol=1e-5, rtol=0)
    prefixcore.export_adapter(ours, "adapters", tmp_path / "theirs", model=llama)
    (written,) = torch.load(tmp_path / "theirs" / "pytorch_adapter.bin", weights_only=True).values()
    if name == "flat":
        original = torch.load(THEIRS / name / "pytorch_adapter.bin", weights_only=True)
        assert torch.equal(written, next(iter(original.values())))


def test_learned_positions_there_and_back(tmp_path: Path) -> None:
    """What cannot be turned stays as it is: GPT-2, which heads as wide as this library takes them."""
    gpt2, ids = make("gpt2"), torch.tensor([[5, 6, 7, 8]])
    config = prefixcore.PrefixTuningConfig(num_virtual_tokens=3, position_offset=False)
    folder = make_adapter(gpt2, config, tmp_path / "gpt2")
    prefixcore.export_adapter(folder, "adapters", tmp_path / "theirs", model=gpt2)
    back = prefixcore.import_adapter(tmp_path / "theirs", "adapters", tmp_path / "back", model=gpt2)
    assert read_adapter(back).config.position_offset is False
    assert torch.equal(with_adapter(gpt2, back, ids), with_adapter(gpt2, folder, ids))
    with pytest.raises(AdapterError, match="has learned positions: keys cannot be moved"):
        prefixcore.import_adapter(tmp_path / "theirs", "adapters", tmp_path / "p", model=gpt2, position_offset=True)
    assert not (tmp_path / "p").exists()


Change = Callable[[dict[str, torch.Tensor]], Any]
LEAF = "model.prefix_tuning.prefix_tunings.flat.self_prefix."


def their_flat(folder: Path, change: Change = lambda weights: None, **said: Any) -> Path:
    """Their flat prefix, with other tensors and facts of the model in its files."""
    shutil.copytree(THEIRS / "flat", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **said}))
    weights = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    change(weights)
    torch.save(weights, folder / "pytorch_adapter.bin")
    return folder


def test_files_for_a_model_of_another_type(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose keys stand elsewhere, so that shapes that fit say nothing."""
    other = their_flat(tmp_path / "gpt2", model_type="gpt2")
    with pytest.raises(AdapterError, match="adapter_config.json: model_type: .* type 'gpt2', and this one is 'llama'"):
        prefixcore.import_adapter(other, "adapters", tmp_path / "x", model=llama)
    assert not (tmp_path / "x").exists()
    named = their_flat(tmp_path / "named", model_name="somebody/llama-2")
    monkeypatch.setattr(llama.config, "_name_or_path", "/models/llama-3")
    with pytest.warns(UserWarning, match="are for 'somebody/llama-2' .* written as one for '/models/llama-3'"):
        prefixcore.import_adapter(named, "adapters", tmp_path / "x", model=llama)
    monkeypatch.setattr(llama.config, "_name_or_path", "/models/llama-2")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*are for")
        prefixcore.import_adapter(named, "adapters", tmp_path / "y", model=llama)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.update({f"{LEAF}gate": torch.ones(1)}), "'gate': not known of a prefix that is flat"),
        (
            lambda weights: weights.update({f"{LEAF}control_trans": torch.empty(128, device="meta")}),
            "no numbers at all",
        ),
    ],
)
def test_tensors_that_no_prefix_has(change: Change, message: str, llama: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        prefixcore.import_adapter(their_flat(tmp_path / "a", change), "adapters", tmp_path / "x", model=llama)


def test_a_head_that_was_trained_along_is_said_to_be_left_out(llama: Any, tmp_path: Path) -> None:
    (their_flat(tmp_path / "a") / "head_config.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"head_config.json: a head was trained along, which is not read"):
        prefixcore.import_adapter(tmp_path / "a", "adapters", tmp_path / "x", model=llama)


def test_their_safetensors(llama: Any, tmp_path: Path) -> None:
    """`save_adapter(..., use_safetensors=True)` writes no other file of tensors."""
    folder = their_flat(tmp_path / "a")
    weights = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    (folder / "pytorch_adapter.bin").unlink()
    save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "adapter.safetensors")
    ours = prefixcore.import_adapter(folder, "adapters", tmp_path / "x", model=llama)
    same = prefixcore.import_adapter(THEIRS / "flat", "adapters", tmp_path / "y", model=llama)
    for pair, other in zip(read_adapter(ours).tensors, read_adapter(same).tensors, strict=True):
        assert all(map(torch.equal, pair, other))
    (folder / "adapter.safetensors").write_bytes(b"cut off")
    with pytest.raises(AdapterError, match="adapter.safetensors: not a whole safetensors file"):
        prefixcore.import_adapter(folder, "adapters", tmp_path / "z", model=llama)


def test_keys_are_turned_by_the_adapters_own_model_alone(tmp_path: Path) -> None:
    model, other = (
        make("llama", head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": x}) for x in (1e4, 7)
    )
    folder = make_adapter(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=3), tmp_path / "own")
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(2)
    for name in ("adapters", "vllm", "peft"):
        with pytest.raises(AdapterError, match="other weights than the one the adapter was trained for|holds a soft"):
            prefixcore.export_adapter(folder, name, tmp_path / "theirs", model=other)
    assert not (tmp_path / "theirs").exists()
