"""Each file of examples/ is short, runs on a tiny model without a network, and leaves an adapter that was trained."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import prefixcore
from tests import tiny
from tests.examples import ROOT

FILES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return tiny.folder(tmp_path / "model")


def test_there_is_one_for_each_way_of_training() -> None:
    names = ["accelerate_loop", "bare_loop", "lightning_module", "pipeline_loop", "torchrun_loop"]
    names += ["transformers_trainer", "trl_dpo", "trl_grpo", "trl_sft"]
    assert [path.stem for path in FILES] == names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_runs_and_trains(path: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.stem.startswith("trl") and sys.version_info < (3, 11):
        pytest.skip("TRL needs Python 3.11")
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    adapters = []
    for steps in ("1", "3"):
        out = tmp_path / f"steps-{steps}"
        monkeypatch.setattr(sys, "argv", [path.name, "--model", str(model_folder), "--out", str(out), "--steps", steps])
        torch.manual_seed(0)
        runpy.run_path(str(path), run_name="__main__")
        adapters.append(load_file(out / "adapter_model.safetensors")["prompt_embeddings"])
        with prefixcore.load(tiny.model(), out) as handle:
            assert handle.num_virtual_tokens > 1
    assert not torch.equal(*adapters), "more steps lead elsewhere"
