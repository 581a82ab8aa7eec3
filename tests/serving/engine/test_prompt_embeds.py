"""A soft prompt that `prefixcore convert --to vllm` has written, read as vLLM reads that of a request."""

from __future__ import annotations

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import prefixcore
from prefixcore.adapters import read_adapter

from .world import World


def test_vllm_reads_what_is_written(world: World, tmp_path: Path) -> None:
    from vllm.renderers.embed_utils import safe_load_prompt_embeds

    with prefixcore.attach(world.model, prefixcore.PromptTuningConfig(num_virtual_tokens=17, init="random")) as handle:
        handle.save(tmp_path / "soft")
    prefixcore.export_adapter(tmp_path / "soft", "vllm", tmp_path / "soft.pt")
    model = world.model.config
    config: Any = SimpleNamespace(
        enable_prompt_embeds=True,
        dtype=torch.float32,
        hf_text_config=model,
        get_hidden_size=lambda: model.hidden_size,
    )
    found = safe_load_prompt_embeds(config, base64.b64encode((tmp_path / "soft.pt").read_bytes()))
    assert torch.equal(found, read_adapter(tmp_path / "soft").tensors)
