"""`bake` on a tiny model of every class of transformers that a soft prompt can be attached to: equal, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import prefixcore
from prefixcore.adapters import AdapterError

from . import tiny_models

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


def bake(name: str, folder: Path) -> str:
    """What comes of it: "equal", "refused", or "no soft prompt" where none can be attached."""
    try:
        model = tiny_models.make(name, CLASSES[name])
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
    found = [bake(name, tmp_path / name) for name in sorted(CLASSES)]
    assert found.count("equal") >= 140
