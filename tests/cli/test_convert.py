"""`prefixcore convert`."""

from __future__ import annotations

import pytest
import torch

from prefixcore.adapters import read_adapter
from prefixcore.adapters.formats import FORMATS


def test_there_and_back(prefixcore, adapter, model_folder, tmp_path):
    code, out, err = prefixcore("convert", adapter, "--to", "cartridges", "--out", tmp_path / "c.pt")
    assert code == 0
    assert out == f"{tmp_path / 'c.pt'}: written as cartridges\n"
    assert err == "not in it: manifest (task, base model, provenance)\n"
    back = ["convert", tmp_path / "c.pt", "--from", "cartridges", "--model", model_folder, "--out", tmp_path / "back"]
    code, out, err = prefixcore(*back, "--task", "letters")
    assert (code, err) == (0, "")
    assert out == f"{tmp_path / 'back'}: an adapter, read as cartridges\n"
    for pair, other in zip(read_adapter(adapter).tensors, read_adapter(tmp_path / "back").tensors, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, other, strict=True))
    assert "prefix, for letters" in prefixcore("inspect", tmp_path / "back")[1]


def test_the_list_names_every_format(prefixcore):
    code, out, _ = prefixcore("convert", "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(FORMATS)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "expected --to FORMAT, --from FORMAT or --list"),
        (["ADAPTER", "--to", "onnx", "--out", "x"], "expected one of the formats peft, cartridges"),
        (["--to", "vllm", "--out", "x"], "expected a SOURCE to read and --out PATH to write"),
        (["ADAPTER", "--to", "vllm"], "expected a SOURCE to read and --out PATH to write"),
        (["ADAPTER", "--to", "vllm", "--out", "x"], "holds a soft prompt, and this is a prefix"),
        (["ADAPTER", "--to", "adapters", "--out", "x"], "expected --model"),
        (["ADAPTER", "--from", "cartridges", "--out", "x"], "expected --model"),
        (["nowhere", "--to", "peft", "--out", "x"], "nowhere is not a folder"),
        (["nowhere", "--from", "cartridges", "--model", "MODEL", "--out", "x"], "nowhere: no such file"),
        (
            ["a", "b", "--from", "cartridges", "--model", "MODEL", "--out", "x"],
            "expected one SOURCE with --from, got 2",
        ),
        (["ADAPTER", "--to", "peft", "--out", "x", "--task", "a"], "with --from only"),
        (["ADAPTER", "--to", "peft", "--from", "peft", "--out", "x"], "not allowed with argument"),
    ],
)
def test_errors_are_one_clear_line(prefixcore, adapter, model_folder, tmp_path, monkeypatch, options, expected):
    monkeypatch.chdir(tmp_path)
    named = {"ADAPTER": adapter, "MODEL": model_folder}
    code, out, err = prefixcore("convert", *[named.get(option, option) for option in options])
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("prefixcore convert: error: ")
    assert expected in line
    assert not (tmp_path / "x").exists()


def test_what_is_read_is_never_replaced(prefixcore, adapter, model_folder, tmp_path):
    theirs = tmp_path / "theirs"
    assert prefixcore("convert", adapter, "--to", "peft", "--out", theirs)[0] == 0
    before = {path.name: path.read_bytes() for path in theirs.iterdir()}
    code, _, err = prefixcore("convert", theirs, "--from", "peft", "--model", model_folder, "--out", theirs)
    assert code == 2
    assert "would take its place; give another folder" in err
    assert {path.name: path.read_bytes() for path in theirs.iterdir()} == before


@pytest.mark.filterwarnings("ignore:read as the adapters library computes it")
def test_where_the_text_begins(prefixcore, at_zero, model_folder, tmp_path):
    """There and back with the convention of the adapters library, whose keys stay what they are."""
    ours, model = tmp_path / "ours", ["--model", model_folder]
    assert "the text behind it begins at position 0" in prefixcore("inspect", at_zero)[1]
    assert prefixcore("convert", at_zero, "--to", "cartridges", "--out", tmp_path / "c.pt")[0] == 2
    assert prefixcore("convert", at_zero, "--to", "cartridges", *model, "--out", tmp_path / "c.pt")[0] == 0
    back = ["convert", tmp_path / "c.pt", "--from", "cartridges", *model]
    assert prefixcore(*back, "--no-position-offset", "--out", ours)[0] == 0
    assert read_adapter(ours).config.position_offset is False
    for pair, other in zip(read_adapter(at_zero).tensors, read_adapter(ours).tensors, strict=True):
        torch.testing.assert_close(other, pair, rtol=0, atol=1e-6)
    assert prefixcore(*back, "--out", tmp_path / "p")[0] == 0
    assert read_adapter(tmp_path / "p").config.position_offset is True
    code, _, err = prefixcore("convert", at_zero, "--to", "peft", "--out", tmp_path / "peft")
    assert code == 2
    assert "position_offset=False (prefixcore bake makes an equal one of that)" in err
    code, _, err = prefixcore("convert", tmp_path / "c.pt", "--to", "cartridges", "--position-offset", "--out", "x")
    assert code == 2
    assert "--position-offset mean something with --from only" in err


@pytest.fixture
def at_zero(tmp_path):
    from prefixcore import PrefixTuningConfig, attach
    from tests import tiny

    config = PrefixTuningConfig(num_virtual_tokens=4, init="random", seed=0, position_offset=False)
    with attach(tiny.model(), config) as handle:
        return handle.save(tmp_path / "zero")


def test_bake_to_either_convention(prefixcore, at_zero, model_folder, tmp_path):
    prompts = ["--model", model_folder, "--prompt", "ab ->"]
    assert prefixcore("bake", at_zero, *prompts, "--out", tmp_path / "p")[0] == 0
    assert read_adapter(tmp_path / "p").config.position_offset is True
    assert prefixcore("bake", tmp_path / "p", *prompts, "--no-position-offset", "--out", tmp_path / "again")[0] == 0
    assert read_adapter(tmp_path / "again").config.position_offset is False
