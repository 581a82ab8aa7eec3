"""The cache has one name up to transformers 5.23 and another since; a caller may use either."""

from types import SimpleNamespace

import pytest

from prefixcore.hf.cache import cache_in, cache_of


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_either_name(name: str) -> None:
    cache = object()
    assert cache_of({name: cache, "attention_mask": None}) is cache
    assert cache_in(SimpleNamespace(**{name: cache})) is cache


def test_no_cache() -> None:
    assert cache_of({"cache": None, "past_key_values": None}) is None
    assert cache_of({}) is None
    assert cache_in(()) is None
    assert cache_in(SimpleNamespace(cache=None)) is None
