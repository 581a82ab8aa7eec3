"""Tiny random models that read images and text, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

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


def qwen3() -> Any:
    """Qwen3-VL, whose images also go into later layers."""
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
              "patch_size": 4, "temporal_patch_size": 2, "num_position_embeddings": 16,
              "deepstack_visual_indexes": [0, 1]}  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0, "mrope_interleaved": True}
    return _build(
        "Qwen3VL",
        text_config={**_TEXT, "head_dim": 8, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=91,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


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
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)  # starts at zero
    return model


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


_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
}


def _build(name: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**fields)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


def _llava() -> Any:
    vision = {**_VISION, "model_type": "clip_vision_model", "patch_size": 8, "projection_dim": 32}
    text = {**_TEXT, "model_type": "llama"}
    return _build("Llava", text_config=text, vision_config=vision, image_token_index=IMAGE, vision_feature_layer=-1)


def _mistral3() -> Any:
    return _build(
        "Mistral3",
        text_config={**_TEXT, "model_type": "mistral", "head_dim": 8},
        vision_config={**_VISION, "model_type": "pixtral", "head_dim": 8, "patch_size": 4},
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )


def _idefics3(name: str = "Idefics3") -> Any:
    text, vision = {**_TEXT, "model_type": "llama"}, {**_VISION, "patch_size": 4}
    return _build(name, text_config=text, vision_config=vision, image_token_id=IMAGE, scale_factor=2, pad_token_id=0)


def _internvl() -> Any:
    return _build(
        "InternVL",
        text_config={**_TEXT, "model_type": "qwen2"},
        vision_config={**_VISION, "image_size": [16, 16], "patch_size": [4, 4], "layer_scale_init_value": 1.0},
        image_token_id=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
    )


def _aya_vision() -> Any:
    """Every other layer has a window, and no positions in those between."""
    kinds = ["sliding_attention", "full_attention"]
    return _build(
        "AyaVision",
        text_config={**_TEXT, "model_type": "cohere2", "head_dim": 8, "sliding_window": 64, "layer_types": kinds},
        vision_config={**_VISION, "model_type": "siglip_vision_model", "patch_size": 4, "vision_use_head": False},
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        alignment_intermediate_size=64,
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen2_vl": lambda: qwen("Qwen2VL"),
    "qwen2_5_vl": lambda: qwen("Qwen2_5_VL"),
    "qwen3_vl": qwen3,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "llava": _llava,
    "mistral3": _mistral3,
    "idefics3": _idefics3,
    "smolvlm": lambda: _idefics3("SmolVLM"),
    "internvl": _internvl,
    "aya_vision": _aya_vision,
}
"""Families that read images and text, by `model_type`."""

DECODERS = [family for family in FAMILIES if family != "paligemma"]
"""Those whose text is causal, so that they may have a prefix; PaliGemma reads its whole prompt both ways."""


def batch_of(family: str, padding: int = 0, text: Tensor | None = None) -> dict[str, Tensor]:
    """Two rows with an image each, the second padded on the left; `text` stands before both, behind the padding."""
    if family.startswith("qwen"):
        return qwen_batch(padding, text=text)
    batch = image_batch(text)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    ids[1] = torch.cat((ids.new_zeros(padding), ids[1, : ids.shape[1] - padding]))
    mask[1, :padding] = 0
    if family == "mistral3":
        batch["image_sizes"] = torch.tensor([[16, 16], [16, 16]])
    if family in ("idefics3", "smolvlm"):
        batch["pixel_values"] = batch["pixel_values"][:, None]
    if family in ("gemma3", "paligemma"):
        batch["token_type_ids"] = (ids == IMAGE).long()
    return batch


def row_of(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One of the two rows by itself, without its padding."""
    seen = batch["attention_mask"][row].bool()
    alone = {}
    for name, value in batch.items():
        if value.shape[:2] == batch["input_ids"].shape:
            alone[name] = value[row : row + 1, seen]
        else:  # of images, of which each row has one
            alone[name] = value.chunk(2)[row]
    return alone


TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}:{% for part in message.content %}"
    "{{ MARK if part.type == 'image' else part.text }}{% endfor %}.{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def processor(family: str) -> Any:
    """That of a tiny LLaVA or Gemma 3: small images, and one token a character."""
    size = {"height": 16, "width": 16}
    if family == "llava":
        images = _image_processor("Llava")(size={"shortest_edge": 16}, crop_size=size)
        template = TEMPLATE.replace("MARK", "'<image>'")
        options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return transformers.LlavaProcessor(images, _tokenizer(), chat_template=template, **options)
    assert family == "gemma3", family
    template = TEMPLATE.replace("MARK", "'<image begins>'")
    images = _image_processor("Gemma3")(size=size)
    return transformers.Gemma3Processor(images, _tokenizer(), chat_template=template, image_seq_length=4)


def _image_processor(name: str) -> Any:
    """The one that needs no torchvision, where transformers has one."""
    names = f"{name}ImageProcessorPil", f"{name}ImageProcessor"
    return next(getattr(transformers, each) for each in names if hasattr(transformers, each))


def _tokenizer() -> Any:
    characters = "abcdefghijklmnopqrstuvwxyz.:,?! "
    places = {"<pad>": 0, "<begin>": 1, "<end>": 2, "<image>": IMAGE, "<image begins>": START, "<image ends>": END}
    special = dict(places)
    places.update({character: place for place, character in enumerate(characters, start=3)})
    places["\n\n"] = len(places)  # which Gemma's puts around images
    backend = Tokenizer(models.WordLevel(places, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<pad>",
        extra_special_tokens={"image_token": "<image>", "boi_token": "<image begins>", "eoi_token": "<image ends>"},
    )
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in special} == special
    return tokenizer
