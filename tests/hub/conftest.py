"""A Hub of the tests' own, a tiny model, and an adapter that was trained for it."""

from __future__ import annotations

import pytest
from huggingface_hub import constants

import prefixcore
from tests import tiny
from tests.hub.server import TOKEN, only, serve


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub where nothing is, an empty cache, and a user who has logged in."""
    with serve() as server, only(server):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # keeps the address of another
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        yield server


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture
def saved(model, tmp_path):
    """An adapter's folder."""
    config = prefixcore.PrefixTuningConfig(num_virtual_tokens=4, init="random", seed=1)
    with prefixcore.attach(model, config) as handle:
        return handle.save(
            tmp_path / "saved", task="country -> capital", license="CC-BY-4.0", metrics={"exact_match": 0.5},
            split={"sha256": "0" * 64}, training={"steps": 3}, seed=1,
        )  # fmt: skip
