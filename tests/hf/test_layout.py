"""Where virtual tokens go: against a row-by-row construction."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefixcore.hf.batch.layout import Layout


@st.composite
def masks(draw: st.DrawFn) -> torch.Tensor:
    """[B, T] with any padding on the left, on the right and in between, rows of nothing but padding included."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    return torch.tensor(draw(st.lists(st.lists(st.integers(0, 1), min_size=length, max_size=length),
                                      min_size=rows, max_size=rows)))  # fmt: skip


@settings(suppress_health_check=[HealthCheck.too_slow])  # of the machine, where it has other work
@given(masks(), st.integers(1, 4), st.sampled_from([(), (2,)]))
def test_insert_and_cut(mask: torch.Tensor, virtual: int, inner: tuple[int, ...]) -> None:
    rows, length = mask.shape
    layout = Layout.from_mask(mask, rows, length, virtual)
    values = torch.arange(1, rows * length + 1).view(rows, length, *(1 for _ in inner)).expand(rows, length, *inner)
    prompt = -torch.arange(1, virtual + 1).view(1, virtual, *(1 for _ in inner)).expand(rows, virtual, *inner)
    got = layout.insert(values, prompt)
    for row in range(rows):
        seen = mask[row].nonzero()
        lead = int(seen[0]) if len(seen) else length
        assert torch.equal(got[row], torch.cat((values[row, :lead], prompt[row], values[row, lead:])))
    assert torch.equal(layout.remove(got), values)
    assert torch.equal(layout.insert(values, torch.full_like(prompt, 7)), layout.insert_value(values, 7))


def test_without_left_padding_nothing_is_gathered() -> None:
    assert Layout.from_mask(None, 2, 3, 4).left_padding is None
    assert Layout.from_mask(torch.tensor([[1, 1, 0], [1, 1, 1]]), 2, 3, 4).left_padding is None
    assert Layout.from_mask(torch.tensor([[0, 1, 0], [1, 1, 1]]), 2, 3, 4).left_padding is not None


@given(masks())
def test_first(mask: torch.Tensor) -> None:
    rows, length = mask.shape
    values = torch.arange(rows * length).view(rows, length)
    got = Layout.from_mask(mask, rows, length, 2).first_of_text(values)
    for row in range(rows):
        seen = mask[row].nonzero()
        assert int(got[row]) == int(values[row, int(seen[0]) if len(seen) else -1])
