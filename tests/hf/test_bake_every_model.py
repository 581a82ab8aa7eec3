"""`bake` on a tiny model of every class of transformers that a soft prompt can be attached to: equal, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import prefixcore
from prefixcore.adapters import AdapterError

from . import tiny_models
from .models_page import BAKED, WRITTEN_WITH, page_rows, said_by

SAMPLE = {
    "CohereForCausalLM": "equal",
    "FalconForCausalLM": "equal",
    "MuseSparkForConditionalGeneration": "refused",
    "OPTForCausalLM": "equal",
    "Phi3ForCausalLM": "equal",
    "Qwen3NextForCausalLM": "refused",
    "StableLmForCausalLM": "equal",
}
CLASSES = tiny_models.every_class()
pytestmark = pytest.mark.filterwarnings("ignore")


def bake(name: str, folder: Path, **changes: Any) -> str:
    """What comes of it: "equal", "refused", or "no soft prompt" where none can be attached."""
    try:
        model = tiny_models.make(name, CLASSES[name], **changes)
        with prefixcore.attach(model, prefixcore.PromptTuningConfig(num_virtual_tokens=3)) as handle:
            with torch.no_grad():
                handle.module.embedding.add_(0.3 * torch.randn(handle.module.embedding.shape))
            handle.save(folder / "prompt")
    except Exception:
        return "no soft prompt"
    try:
        comparison = prefixcore.bake(model, folder / "prompt", folder / "baked").comparison
    except (NotImplementedError, AdapterError):
        assert not (folder / "baked").exists()
        return "refused"
    assert comparison.num_ties == 0
    assert comparison.largest_difference < 1e-4
    return "equal"


@pytest.mark.parametrize("name", SAMPLE)
def test_some(name: str, tmp_path: Path) -> None:
    if name not in CLASSES:
        pytest.skip(f"this transformers has no {name}")
    assert bake(name, tmp_path / name) == SAMPLE[name]


@pytest.mark.slow
def test_every_class(tmp_path: Path) -> None:
    """As many as the guide says; encoders are tried as decoders, as in `docs/models.md`."""
    found = []
    for name in sorted(CLASSES):
        is_decoder = "works with `is_decoder=True`" in page_rows().get(name, "")
        found.append(bake(name, tmp_path / name, **({"is_decoder": True} if is_decoder else {})))
    baked, refused = said_by(*BAKED)[2:]
    assert found.count("equal") >= 0.9 * baked  # another transformers has some other classes
    if transformers.__version__.startswith(WRITTEN_WITH):
        assert [found.count("equal"), found.count("refused")] == [baked, refused]
