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
