"""Cartridges: their own files, their layout, the model's outputs, and files that are none."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import prefixcore
from prefixcore.adapters import AdapterError, read_adapter
from prefixcore.adapters.formats import FORMATS, Facts

from .conftest import FIXTURES, P
from .outputs import behind_keys, with_adapter

READ = FORMATS["cartridges"].read


def theirs(seed: int = 0) -> list[torch.Tensor]:
    """The numbers of the fixtures, as they were drawn."""
    torch.manual_seed(seed)
    return [torch.randn(1, 2, 4, 8).to(torch.bfloat16).float()[0] for _ in range(4)]


@pytest.mark.parametrize("name", ["cartridge-2025-06.pt", "cartridge-2025-10.pt"])
def test_what_their_own_code_wrote(name: str) -> None:
    contents = READ(FIXTURES / name, Facts())
    keys_and_values = theirs()
    assert contents.prefix is not None
    assert (contents.num_virtual_tokens, contents.num_frozen_tokens, len(contents.prefix)) == (4, 1, 2)
    for layer, (key, value) in enumerate(contents.prefix):
        assert torch.equal(key, keys_and_values[layer])
        assert torch.equal(value, keys_and_values[2 + layer])


def test_ours_has_the_layout_that_their_loader_reads(prefix: Path, tmp_path: Path) -> None:
    """As `TrainableCache.from_pretrained` of both versions: these names, frozen tokens apart, [1, Hkv, tokens, D]."""
    prefixcore.export_adapter(prefix, "cartridges", tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=False)
    pairs = read_adapter(prefix).tensors
    for names in (("frozen_keys", "frozen_values"), ("fixed_keys", "fixed_values")):
        for i, (frozen, trained) in enumerate(zip(names, ("trainable_keys", "trainable_values"), strict=True)):
            assert isinstance(saved[frozen], nn.ParameterList)
            assert len(saved[frozen]) == len(saved[trained]) == 2
            for layer, pair in enumerate(pairs):
                assert saved[frozen][layer].shape == (1, 2, 1, 16)
                assert torch.equal(torch.cat((saved[frozen][layer], saved[trained][layer]), 2)[0], pair[i])


def test_outputs_are_those_of_the_cache_that_they_make(
    prefix: Path, model: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    """Their cache is `DynamicCache` with these in front: the text begins at position P."""
    prefixcore.export_adapter(prefix, "cartridges", tmp_path / "c.pt")
    contents = READ(tmp_path / "c.pt", Facts())
    assert contents.prefix is not None
    expected = behind_keys(model, contents.prefix, ids)
    torch.testing.assert_close(with_adapter(model, prefix, ids), expected, atol=1e-5, rtol=0)


def save(path: Path, **changes: Any) -> Path:
    keys = [torch.randn(1, 2, P, 16) for _ in range(2)]
    lists: dict[str, Any] = {
        "trainable_keys": keys, "trainable_values": [key.clone() for key in keys],
        "frozen_keys": [], "frozen_values": [],
    }  # fmt: skip
    lists.update(changes)
    torch.save({name: found for name, found in lists.items() if found is not ...}, path)
    return path


def test_plain_lists_of_tensors_are_read_too(tmp_path: Path) -> None:
    assert READ(save(tmp_path / "c.pt"), Facts()).num_virtual_tokens == P


class Evil:
    def __reduce__(self) -> Any:
        return (Path("/tmp/prefixcore-was-here").touch, ())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable_keys": ...}, "trainable_keys: missing"),
        ({"trainable_keys": []}, "expected one tensor a layer, got none"),
        ({"trainable_values": [torch.randn(1, 2, P, 16)]}, "trainable_values: 1 tensors, but trainable_keys has 2"),
        ({"trainable_keys": [torch.randn(1, 2, P, 16), torch.randn(1, 2, P + 1, 16)]}, "different numbers of virtual"),
        ({"trainable_keys": [torch.randn(2, P, 16)] * 2}, "expected shape \\[1, 'any', 'any', 'any'\\]"),
        ({"trainable_keys": [torch.randn(1, 2, P, 0)] * 2}, "holds no numbers"),
        ({"trainable_keys": [torch.full((1, 2, P, 16), torch.nan)] * 2}, "NaN or infinite"),
        ({"trainable_keys": [torch.ones(1, 2, P, 16, dtype=torch.int64)] * 2}, "floating-point numbers"),
        ({"trainable_keys": [torch.ones(1).expand(1, 2, 2**30, 16)] * 2}, "claims .* numbers, but holds 1"),
        ({"trainable_keys": ["no", "no"]}, "expected a tensor, got str"),
        ({"trainable_keys": 3}, "expected a list of tensors, got int"),
        (
            {"frozen_keys": [torch.randn(1, 3, 1, 16)] * 2, "frozen_values": [torch.randn(1, 2, 1, 16)] * 2},
            "frozen_keys",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        READ(save(tmp_path / "c.pt", **changes), Facts())


def test_what_needs_unpickling_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"needs unpickling, .* refused: it names getattr; ask whoever"):
        READ(save(tmp_path / "c.pt", trainable_keys=Evil()), Facts())
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(AdapterError, match="not a file of torch.save"):
        READ(tmp_path / "plain.pt", Facts())
    torch.save({}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(AdapterError, match="not a file of torch.save"):
        READ(tmp_path / "old.pt", Facts())
    assert not Path("/tmp/prefixcore-was-here").exists()


def test_cut_off_compressed_and_other_archives(tmp_path: Path) -> None:
    whole = save(tmp_path / "c.pt").read_bytes()
    for end in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:end])
        with pytest.raises(AdapterError, match=r"cut\.pt: not a "):
            READ(tmp_path / "cut.pt", Facts())
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**7)
    (tmp_path / "bomb.pt").write_bytes(bomb.getvalue())
    with pytest.raises(AdapterError, match="is compressed, which torch.save never does"):
        READ(tmp_path / "bomb.pt", Facts())
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("notes.txt", "mine")
    (tmp_path / "notes.pt").write_bytes(other.getvalue())
    with pytest.raises(AdapterError, match="not a whole file of torch.save"):
        READ(tmp_path / "notes.pt", Facts())
    with pytest.raises(AdapterError, match="no such file"):
        READ(tmp_path / "nowhere.pt", Facts())
    with pytest.raises(AdapterError, match="not a file but a folder"):
        READ(tmp_path, Facts())
