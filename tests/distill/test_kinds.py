"""Arguments of another kind than they are to be are told so before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefixcore.audit import audit
from prefixcore.distill import DistillOptions, distill
from tests import tiny

OPTIONS = DistillOptions(num_virtual_tokens=2, questions=0)
TEXT = "ab -> ba\ncd -> dc\n"


@pytest.mark.parametrize(
    ("context", "more", "expected"),
    [
        (Path("system.txt"), {}, "context: expected the text itself, got .*Path; of a file"),
        (b"ab -> ba", {}, "context: expected the text itself, got bytes"),
        (None, {}, "context: expected the text itself, got NoneType"),
        (TEXT, {"options": {"num_virtual_tokens": 2}}, "options: expected DistillOptions.* got dict"),
        (TEXT, {"prompts": ["ab ->", "cd ->"]}, r"prompts: expected .*Prompt\(text\).* got str"),
        (TEXT, {"held_out": ["ab ->"]}, "prompts: expected .* got str"),
    ],
)
def test_of_a_distillation(context: Any, more: dict[str, Any], expected: str) -> None:
    with pytest.raises(TypeError, match=expected):
        distill(tiny.model(), tiny.tokenizer(), context, **{"options": OPTIONS, **more})


@pytest.mark.parametrize("probes", [["ab ->"], "swap.jsonl"])
def test_of_an_audit(probes: Any) -> None:
    with pytest.raises(TypeError, match=r"probes: expected those of read_examples\(file\).* got str"):
        audit(tiny.model(), tiny.tokenizer(), "nowhere", probes)
