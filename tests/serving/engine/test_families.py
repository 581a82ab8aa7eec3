"""Each family that the connector takes unasked, with a prefix and without, beside transformers.

Four that differ most are tried with every change; all of them by `make serve-test ARGS="-m slow"`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefixcore.serving.families import VERIFIED

from .compared import compare, compare_in_bfloat16
from .image_world import ALL_EXPERTS
from .test_image_families import OF_TEXT
from .world import GATED_DELTA, World

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
ATTENTION = {"layer_types": ["full_attention"] * 3}
WINDOWS = {"sliding_window": 1024, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
"""Windows of some layers, as these families have them, which a request does not outgrow."""

CHANGES: dict[str, dict[str, Any]] = {
    "biogpt": {"initializer_range": 0.4},
    "bloom": {"initializer_range": 0.2},
    "cohere2": WINDOWS,
    "cwm": {**WINDOWS, "bos_token_id": 1, "eos_token_id": 2},
    "dots1": {**ROUTED_EXPERTS, **ATTENTION, "n_shared_experts": 1, "sliding_window": None},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_layer_start_index": 1},
    "exaone4": WINDOWS,
    "exaone_moe": {**EXPERTS, **WINDOWS, "is_moe_layer": [False, True, True], "n_group": 1, "topk_group": 1},
    "falcon": {"tie_word_embeddings": False},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 32},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {
        **WINDOWS,
        "initializer_range": 0.05,
        "query_pre_attn_scalar": 1,
        "attn_logit_softcapping": 2.0,
        "attn_implementation": "eager",  # transformers' SDPA knows no softcap
    },
    "gemma3_text": {**WINDOWS, "initializer_range": 0.05, "query_pre_attn_scalar": 1},
    "glm4_moe": {**ROUTED_EXPERTS, "head_dim": 32, "use_qk_norm": True},
    "gpt_bigcode": {"num_key_value_heads": 1},
    "gpt_oss": {**LOCAL_EXPERTS, **WINDOWS},
    "gptj": {"rotary_dim": 16},
    "granite": {"attention_multiplier": 0.2},
    "granite_swa": WINDOWS,
    "granitemoe": {**LOCAL_EXPERTS, "attention_multiplier": 0.2},
    "granitemoe_swa": {**LOCAL_EXPERTS, **WINDOWS},
    "granitemoehybrid": {
        **LOCAL_EXPERTS,
        "layer_types": ["mamba", "attention", "mamba"],
        "attention_multiplier": 0.2,
        "shared_intermediate_size": 64,
        "position_embedding_type": "rope",
        "mamba_n_heads": 8,
    },
    "granitemoeshared": {**LOCAL_EXPERTS, "attention_multiplier": 0.2, "shared_intermediate_size": 64},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "mellum": EXPERTS,
    "mistral": {"sliding_window": 1024},  # of all layers
    "mixtral": {**LOCAL_EXPERTS, "sliding_window": None},
    "nanochat": {"initializer_range": 0.3},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 32,
        "n_groups": 2,
    },
    "olmo3": WINDOWS,
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 128, "init_std": 0.15},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**GATED_DELTA, **ALL_EXPERTS},
    "solar_open": ROUTED_EXPERTS,
    "starcoder2": {"sliding_window": None},
    "vaultgemma": {**WINDOWS, "attn_logit_softcapping": 2.0, "attn_implementation": "eager"},
}
"""What a family's configuration has beside the sizes."""

OFTEN = ("cohere", "falcon_h1", "gemma", "qwen3_moe")
"""Attention beside the MLP, interleaved rotary pairs and LayerNorm; attention and a state space in each layer; scaled
embeddings; experts and normed queries."""

HERE = [family for family in VERIFIED if family not in OF_TEXT]


def test_those_that_are_tried_often_are_among_them() -> None:
    assert set(OFTEN) <= set(VERIFIED)


@pytest.mark.parametrize(
    "family", [*OFTEN, *(pytest.param(each, marks=pytest.mark.slow) for each in HERE if each not in OFTEN)]
)
def test_a_family(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # a process for each family would import vLLM anew
    method = compare_in_bfloat16 if family == "qwen3_next" else compare
    method(World(tmp_path, family, **CHANGES.get(family, {})))
