"""What limits the length of an example."""

from __future__ import annotations

import pytest

from prefixcore.cli.limits import LengthLimit, learned_positions

from ..hf.tiny_models import make


@pytest.mark.parametrize(
    ("name", "model_type", "positions"),
    [("OPTForCausalLM", "opt", 96), ("CodeGenForCausalLM", "codegen", 96), ("LlamaForCausalLM", "llama", None)],
)
def test_a_table_of_positions_is_found_whatever_it_is(name: str, model_type: str, positions: int | None) -> None:
    """A trained table with an offset, sines in a buffer, and none."""
    model = make(name, model_type)
    assert learned_positions(model) == positions
    limit = LengthLimit.of(model, 6, 1000)
    assert limit.tokens == (1000 if positions is None else positions - 6)
