"""What the teacher said, kept on disk by a digest of what it follows from."""

from __future__ import annotations

import pytest
import torch

from prefixcore.distill import DistillError
from prefixcore.distill.store import Store


def make(value):
    return lambda: {"x": torch.tensor([value])}


def test_the_same_facts_find_what_was_kept(tmp_path):
    store = Store(tmp_path / "new")
    assert store.keep("part", {"a": 1, "b": [2]}, make(1))["x"].item() == 1
    assert Store(tmp_path / "new").keep("part", {"b": [2], "a": 1}, make(2))["x"].item() == 1
    assert store.keep("part", {"a": 1, "b": [3]}, make(2))["x"].item() == 2
    assert store.keep("other", {"a": 1, "b": [2]}, make(3))["x"].item() == 3
    assert Store(None).keep("part", {"a": 1, "b": [2]}, make(4))["x"].item() == 4


def test_a_file_that_is_damaged_or_of_other_facts_is_named(tmp_path):
    store = Store(tmp_path)
    store.keep("part", {"a": 1}, make(1))
    (first,) = tmp_path.iterdir()
    store.keep("part", {"a": 2}, make(2))
    (second,) = set(tmp_path.iterdir()) - {first}
    second.replace(first)
    with pytest.raises(DistillError, match="expected the digest"):
        store.keep("part", {"a": 1}, make(1))
    first.write_bytes(b"short")
    with pytest.raises(DistillError, match=r"damaged .* remove it"):
        store.keep("part", {"a": 1}, make(1))


def test_a_number_that_was_changed_on_disk_is_found(tmp_path):
    store = Store(tmp_path)
    store.keep("part", {"a": 1}, make(1))
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-8] ^= 2
    file.write_bytes(content)
    with pytest.raises(DistillError, match=r"damaged .* remove it"):
        store.keep("part", {"a": 1}, make(1))


def test_what_is_not_finished_is_not_there(tmp_path):
    def fail():
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        Store(tmp_path).keep("part", {}, fail)
    assert not list(tmp_path.iterdir())
