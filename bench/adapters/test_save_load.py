"""Writing and reading an adapter, beside PEFT."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

import prefixcore
from bench import models
from bench.conftest import Measure
from bench.gates import gate
from bench.reference import peft_models
from bench.scale import pick
from bench.steps.check import TOLERANCE

CASES = pick(
    smoke=[(models.TINY[0], 4)],
    quick=[(models.SMALL[0], 64)],
    full=[(models.SMALL[0], 64), (models.SMOLLM2_135M, 64), (models.SMOLLM2_135M, 1024)],
)


@pytest.mark.parametrize(("shape", "virtual"), CASES, ids=lambda x: getattr(x, "name", str(x)))
@pytest.mark.parametrize("what", ["save", "load"])
def test_save_load(measure: Measure, tmp_path: Path, shape: models.Shape, virtual: int, what: str) -> None:
    """A prefix. Ours is written whole or not at all, with digests and a fingerprint of the model, and validated before
    it is used; PEFT's is not. The gate: what was read gives the logits of what was written."""
    model = models.make(shape, positions=virtual + 16)
    batch = models.batch(shape, 1, 8)
    theirs = peft_models.prefix_tuning(models.twin(model), virtual)
    ours = models.twin(model)
    handle = prefixcore.attach(ours, prefixcore.PrefixTuningConfig(init=theirs.get_prompt_embedding_to_save("default")))
    handle.save(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")

    fresh, fresh_for_peft = models.twin(model), models.twin(model)
    with torch.no_grad():
        want = {"logits": ours(**batch).logits}
        with prefixcore.load(fresh, tmp_path / "ours"):
            error = gate("a loaded adapter", {"logits": fresh(**batch).logits}, want, 1e-6)
        loaded = peft.PeftModel.from_pretrained(models.twin(model), tmp_path / "theirs")
        gate("PEFT's loaded adapter", {"logits": loaded(**batch).logits}, want, TOLERANCE)

    def load() -> None:
        prefixcore.load(fresh, tmp_path / "ours").detach()

    calls = {
        "save": (lambda: handle.save(tmp_path / "ours"), lambda: theirs.save_pretrained(tmp_path / "theirs")),
        "load": (load, lambda: peft.PeftModel.from_pretrained(fresh_for_peft, tmp_path / "theirs")),
    }
    candidate, reference = calls[what]
    measure(
        "adapter files",
        {"model": shape.name, "P": virtual, "what": what},
        candidate,
        {"PEFT": reference},
        relative_error=error,
    )
