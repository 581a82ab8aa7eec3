"""Tiny random models that read images and text, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

IMAGE, START, END = 90, 92, 93

_TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def qwen(version: str) -> Any:
    """Qwen2-VL ("Qwen2VL") or Qwen2.5-VL ("Qwen2_5_VL")."""
    vision: dict[str, Any] = {"depth": 1, "num_heads": 4, "patch_size": 4, "temporal_patch_size": 2}
    if version == "Qwen2VL":
        vision |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "window_size": 16}
        vision |= {"fullatt_block_indexes": [0]}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = getattr(transformers, f"{version}Config")(
        text_config={**_TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=91,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{version}ForConditionalGeneration")(config).eval()


def qwen_batch(padding: int = 0, images: bool = True, text: Tensor | None = None) -> dict[str, Tensor]:
    """Two rows with an image each, the second padded on the left; `text` stands before both, behind the padding."""
    generator = torch.Generator().manual_seed(3)
    image = [START, *[IMAGE] * 4, END] if images else []
    draw = torch.randint(3, 80, (12,), generator=generator).tolist()
    before = [] if text is None else text.tolist()
    rows = [before + draw[:2] + image + draw[2:6], before + draw[6:9] + image + draw[9 : 12 - padding]]
    rows[1] = [0] * padding + rows[1]
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if images:
        batch["mm_token_type_ids"] = (ids == IMAGE).int()
        batch["pixel_values"] = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=generator)
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4], [1, 4, 4]])
    return batch


def gemma3() -> Any:
    """Images whose tokens see each other, told by `token_type_ids`."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.Gemma3Config(
        text_config={**_TEXT, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64,
                     "layer_types": ["sliding_attention", "full_attention"]},
        vision_config={**vision, "image_size": 16, "patch_size": 4, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def paligemma() -> Any:
    """Positions count from 1."""
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.PaliGemmaConfig(
        text_config={**_TEXT, "model_type": "gemma", "head_dim": 16},
        vision_config={**vision, "num_attention_heads": 4, "image_size": 16, "patch_size": 8, "projection_dim": 32,
                       "vision_use_head": False},
        image_token_id=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.PaliGemmaForConditionalGeneration(config).eval()


def image_batch(text: Tensor | None = None, image_first: bool = False) -> dict[str, Tensor]:
    """Two rows with an image of four tokens each, which begins the row if `image_first`."""
    generator = torch.Generator().manual_seed(3)
    draw = torch.randint(3, 80, (12,), generator=generator).tolist()
    before = [] if text is None else text.tolist()
    heads = ([], []) if image_first else (draw[:2], draw[6:8])
    rows = [before + heads[0] + [IMAGE] * 4 + draw[2:6], before + heads[1] + [IMAGE] * 4 + draw[8:12]]
    ids = torch.tensor(rows)
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
