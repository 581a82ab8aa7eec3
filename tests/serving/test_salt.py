"""The salt: what vLLM's server takes, and nothing that two adapters could share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixcore.serving.salt import LONGEST_SALT, Salt, make_salt, parse_salt

DIGEST = "0123456789abcdef" * 4
NAMES = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="/\\@:"), min_size=1, max_size=35)


@given(NAMES.filter(lambda name: name not in (".", "..")), st.none() | st.text(max_size=200))
def test_it_is_read_as_it_was_made_and_vllm_takes_it(name: str, own: str | None) -> None:
    salt = make_salt(name, DIGEST, own)
    assert len(salt) <= LONGEST_SALT
    assert not set("@/\\\0") & set(salt)
    found = parse_salt(salt)
    assert found is not None
    assert (found.name, found.digest) == (name, DIGEST)
    assert (found.own is None) == (own is None)
    assert str(found) == salt


def test_callers_with_long_salts_are_told_apart() -> None:
    assert make_salt("a", DIGEST, "x" * 200) != make_salt("a", DIGEST, "x" * 199 + "y")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a@b", "a:b", "a\nb", "a" * 53])
def test_names_that_cannot_stand_in_it(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        make_salt(name, DIGEST)


@pytest.mark.parametrize("digest", ["", DIGEST[1:], DIGEST + "0", DIGEST.upper()])
def test_digests(digest: str) -> None:
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        make_salt("a", digest)


def test_a_long_name_leaves_no_room_for_a_salt_of_ones_own() -> None:
    with pytest.raises(ValueError, match="at most 35 characters"):
        make_salt("a" * 52, DIGEST, "x" * 52)
    assert parse_salt(make_salt("a" * 52, DIGEST)) == Salt("a" * 52, DIGEST)


@pytest.mark.parametrize("salt", [None, "", "tenant 7", "prefixcore"])
def test_salts_of_others(salt: str | None) -> None:
    assert parse_salt(salt) is None


@pytest.mark.parametrize("salt", ["prefixcore:", "prefixcore:a", "prefixcore:a:", f"prefixcore:a/b:{DIGEST}"])
def test_salts_that_only_begin_as_ours(salt: str) -> None:
    with pytest.raises(ValueError, match="cache_salt: expected prefixcore:NAME:DIGEST"):
        parse_salt(salt)
