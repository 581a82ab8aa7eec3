"""The cache has one name up to transformers 5.23 and another since; a caller may use either."""

from types import SimpleNamespace

import pytest

from prefixcore.hf.positions.cache import cache_argument, cache_output


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_either_name(name: str) -> None:
    cache = object()
    assert cache_argument({name: cache, "attention_mask": None}) is cache
    assert cache_output(SimpleNamespace(**{name: cache})) is cache


def test_no_cache() -> None:
    assert cache_argument({"cache": None, "past_key_values": None}) is None
    assert cache_argument({}) is None
    assert cache_output(()) is None
    assert cache_output(SimpleNamespace(cache=None)) is None
