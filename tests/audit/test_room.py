"""How long the texts of an audit may be."""

from __future__ import annotations

from typing import Any

import pytest

from prefixcore.audit.probes import most_tokens
from tests.hf import models, test_cached_attention


@pytest.mark.parametrize(
    ("model", "room"),
    [
        (models.make("llama"), 252),
        (models.make("gpt2"), 60),
        (test_cached_attention.make("mpt", max_seq_len=32), 28),  # which has another name for it
        (test_cached_attention.make("bloom"), None),
    ],
    ids=["llama", "gpt2", "mpt", "bloom"],
)
def test_a_text_is_no_longer_than_the_positions_that_are_left(model: Any, room: int | None) -> None:
    assert most_tokens(model, 4) == room
