"""A tiny random model of any class of transformers, from its default configuration with every size cut down.

Nothing is written for a class where a rule does: a field of a configuration has a name, and a name has a size.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCABULARY = 128
HIDDEN = 64
HEADS = 4
HEAD_DIM = HIDDEN // HEADS
EXPERTS = 4

_SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        (
            "hidden_size",
            "d_model",
            "n_embd",
            "out_hidden_size",
            "embed_dim",
            "word_embed_proj_dim",
            "embedding_size",
            "projection_dim",
            "vision_output_dim",
            "text_hidden_size",
            "vision_hidden_size",
            "output_dim",
            "encoder_hidden_size",
            "projector_output_dim",
            "input_embedding_size",
            "attention_hidden_size",
            "lru_width",
            "mamba_d_ssm",
            "emb_dim",
            "image_token_embed_dim",
            "decoder_hidden_size",
            "image_text_hidden_size",
            "backbone_hidden_size",
            "embedding_dim",
            "projector_hidden_size",
            "projection_hidden_size",
        ),
        HIDDEN,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "moe_intermediate_size",
            "n_inner",
            "shared_expert_intermediate_size",
            "ffn_hidden_size",
            "shared_intermediate_size",
            "intermediate_size_mlp",
            "d_ff",
            "dff",
            "dim_ff",
            "mlp_dim",
            "expert_ffn_hidden_size",
            "d_inner",
            "feed_forward_size",
            "dense_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "shared_experts_intermediate_size",
            "projection_intermediate_size",
            "alignment_intermediate_size",
            "share_expert_dim",
            "router_hidden_size",
            "moe_hidden_size",
        ),
        2 * HIDDEN,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "num_heads",
            "n_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
            "attention_heads",
            "num_query_groups",
            "swa_num_attention_heads",
            "num_sliding_attention_heads",
            "num_encoder_attention_heads",
            "num_decoder_attention_heads",
            "linear_num_heads",
            "conf_num_attention_heads",
            "resampler_n_heads",
            "resampler_heads",
            "mamba_n_heads",
            "mamba_num_heads",
            "index_n_heads",
        ),
        HEADS,
    ),
    **dict.fromkeys(
        (
            "head_dim",
            "kv_channels",
            "d_kv",
            "swa_head_dim",
            "global_head_dim",
            "qk_rope_head_dim",
            "qk_nope_head_dim",
            "v_head_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_head_dim",
            "index_head_dim",
            "d_head",
            "dim_head",
            "attention_head_dim",
            "attention_head_size",
            "mamba_d_head",
            "mamba_head_dim",
            "resampler_head_dim",
            "resampler_dim_head",
            "hidden_size_per_layer_input",
            "query_pre_attn_scalar",
            "rotary_dim",
        ),
        HEAD_DIM,
    ),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(
        (
            "num_local_experts",
            "n_routed_experts",
            "num_experts",
            "moe_num_experts",
        ),
        EXPERTS,
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_target_positions", "n_ctx", "max_seq_len", "context_length"),
        96,
    ),
    **dict.fromkeys(("original_max_position_embeddings",), 64),
    **dict.fromkeys(("image_size", "crop_size", "resolution", "img_size"), 16),
    "patch_size": 4,
}
"""The size of every field of this name, in every configuration inside a model's."""

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "encoder_layers", "decoder_layers",
           "num_encoder_layers", "num_decoder_layers", "num_blocks", "layers", "conf_num_hidden_layers")  # fmt: skip
_KV_HEADS = (
    "num_key_value_heads",
    "swa_num_key_value_heads",
    "num_global_key_value_heads",
    "kv_n_heads",
    "num_kv_heads",
)
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "decoder_start_token_id": 1}


_ALSO: dict[str, dict[str, Any]] = {
    "apertus1p5_vision_tokenizer": {"base_channels": 32, "channel_multiplier": [1, 1], "codebook_size": VOCABULARY},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "blt": {"encoder_hash_byte_group_vocab": 40},
    "blt_patcher": {"vocab_size": 128},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "chameleon": {"vocabulary_map": {"<image>": 90, "IMGIMGA": 91}, "image_token_id": 90},
    "deepseek_v3": {"qk_head_dim": 2 * HEAD_DIM},  # read in transformers 5.13; computed since
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma_text": {"num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": 64},
    "dots1": {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "esm": {"vocab_size": VOCABULARY},
    "esmc": {"vocab_size": VOCABULARY},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 16},
    "mobilebert": {"initializer_range": 0.02},  # has no layer norms, so that larger weights make numbers of 1e7
    "emu3": {"vocabulary_map": {"<image>": 90, "<|extra_200|>": 95, "<|visual token 000001|>": 91}},
    "mistral4": {"qk_rope_head_dim": 8, "qk_head_dim": 24},
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "dots3_note_text": {"qk_rope_head_dim": 4},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
    },
    "step3p5": {"sliding_window": 64},
    "rwkv": {"attention_hidden_size": 64},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 93, "vision_end_token_id": 94},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 93, "vision_end_token_id": 94},
    **dict.fromkeys(("lfm2", "lfm2_moe"), {"layer_types": ["conv", "full_attention"]}),
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "falcon_h1": {"mamba_d_ssm": 2 * HIDDEN, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "vocab_size_per_layer_input": 100,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 8, "mamba_d_head": 16},
    "hrm_text": {"num_hidden_layers": 16, "num_layers_per_stack": 2},
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "longcat_flash": {
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "qk_head_dim": 16,
        "head_dim": 8,
        "zero_expert_num": 4,
    },
    "mamba2": {"num_heads": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "roc_bert": {"shape_vocab_size": 128, "pronunciation_vocab_size": 128, "pronunciation_embed_dim": 16,
                 "shape_embed_dim": 16},
    "granite4_vision": {"deepstack_layer_map": [], "downsample_rate": "2/4"},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "embed_dim": 32, "latent_channels": 32},
    "dots3_note_audio_encoder": {"adapter_out_dim": HIDDEN, "downsample_hidden_size": 32},
    "dots3_note_vision_encoder": {"merged_hidden_size": 4 * HIDDEN},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 32,
        "mamba_headdim": 16,
    },
}  # fmt: skip
"""What the rules do not find out, by the `model_type` of a configuration."""


WITH_IMAGES = {
    "Florence2ForConditionalGeneration": "florence2",
    "T5Gemma2ForConditionalGeneration": "t5gemma2",
    "UdopForConditionalGeneration": "udop",
    "VisionEncoderDecoderModel": "vision-encoder-decoder",
}
"""Encoder-decoders among the classes that read images and text."""


def every_class() -> dict[str, str]:
    """The classes with a causal head, and those that read images and text, with their `model_type`."""
    found: dict[str, str] = {}
    for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for model_type, classes in names.items():
            for name in (classes,) if isinstance(classes, str) else classes:
                if name not in WITH_IMAGES:
                    found.setdefault(name, model_type)
    return found


def make(name: str, model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A model of the class `name`, in evaluation mode; `changes`: fields of its configuration."""
    config = tiny_config(model_type)
    config.update(changes)
    torch.manual_seed(seed)
    model_class = getattr(transformers, name)
    if not isinstance(config, model_class.config_class):  # one text model of several
        config = config.get_text_config(decoder=True)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class._from_config(config).parameters())
    if size > 100_000_000:
        raise ValueError(f"{name} has {size:,} parameters: a size of its configuration is not cut down")
    torch.manual_seed(seed)
    model = model_class(config).eval()
    for module in model.modules():  # a padding token whose embedding is zero would hide what is done with it
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            torch.nn.init.normal_(module.weight.data[module.padding_idx], std=0.2)
        if type(module).__name__ == "ZayaQKNorm":  # starts at keys of zero, which would hide all that is done with keys
            torch.nn.init.uniform_(module.temp, 0.5, 1.5)
    return model


def tiny_config(model_type: str) -> Any:
    """The default configuration with its sizes cut down."""
    config = getattr(transformers, CONFIG_MAPPING_NAMES[model_type])()
    shrink(config)
    return config


def shrink(config: PretrainedConfig) -> None:
    """Cuts every size in `config`, and in the configurations inside it, in place."""
    fields = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    count = next((fields[name] for name in _LAYERS if isinstance(fields.get(name), int)), 0)
    kept = _kept_layers(getattr(config, "layer_types", None), count)
    heads = next((fields[name] for name in ("num_attention_heads", "n_head", "n_heads") if fields.get(name)), None)
    for name, value in fields.items():
        if isinstance(value, PretrainedConfig):
            shrink(value)
        elif isinstance(value, dict) and name in config.sub_configs:
            raise TypeError(name)
        elif name in _TOKENS:
            setattr(config, name, _TOKENS[name])
        elif name == "head_dim" and value is None:
            setattr(config, name, HEAD_DIM)
        elif name in _KV_HEADS and value is None:
            setattr(config, name, HEADS)
        elif name in _LAYERS and isinstance(value, int):
            setattr(config, name, len(kept) if value == count else min(value, 2))
        elif name in _KV_HEADS and isinstance(value, int):
            setattr(config, name, 1 if value == 1 else HEADS if value == heads else 2)
        elif isinstance(value, (list, tuple)) and count and len(value) == count:
            setattr(config, name, type(value)(value[i] for i in kept))
        elif name in _SIZES and isinstance(value, int) and not isinstance(value, bool) and value > _SIZES[name]:
            setattr(config, name, _SIZES[name])
        elif name == "initializer_range":
            setattr(config, name, 0.2)
        elif name == "rope_parameters" and isinstance(value, dict):
            _shrink_rope(value, HEAD_DIM)
        elif (name.endswith(("_token_id", "_token_index")) or name in ()) and isinstance(value, int):
            setattr(config, name, _special(name))

    for name, value in _ALSO.get(config.model_type or type(config).__name__, {}).items():
        setattr(config, name, value)


def _special(name: str) -> int:
    """An id for a special token: the same for the same name, at the end of the vocabulary."""
    return VOCABULARY - 1 - sum(map(ord, name)) % 40


def _shrink_rope(rope: dict[str, Any], head_dim: int) -> None:
    inner = [value for value in rope.values() if isinstance(value, dict)]
    for each in inner:
        _shrink_rope(each, head_dim)
    if not inner:  # read by those alone that have positions of three axes
        half = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]


def _kept_layers(layer_types: Any, count: int) -> list[int]:
    """Which layers stay: the first of each kind, and two in all at least."""
    if not layer_types:
        return list(range(min(count, 2)))
    kept = {kind: i for i, kind in reversed(list(enumerate(layer_types)))}
    chosen = sorted(kept.values())
    if len(chosen) == 1 and count > 1:
        chosen.append(1)
    return sorted(set(chosen))
