"""A tiny model that reads images, with its processor: prefixes are for its text.

    python -m tests.serving.engine.image_world FAMILY

compares one family; `test_image_families` runs it where torchvision can be imported.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from tests import tiny
from tests.hf.tiny_models import tiny_config

from .compared import compare, compare_in_bfloat16
from .world import GATED_DELTA, SIZES, World

HIDDEN, HEAD_DIM = SIZES["hidden_size"], SIZES["head_dim"]

TOKENS = {
    "image_token": "<image>",
    "video_token": "<video>",
    "boi_token": "<image begins>",
    "eoi_token": "<image ends>",
    "vision_start_token": "<vision begins>",
    "vision_end_token": "<vision ends>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
    "pixtral_token": "[IMG]",
    "image_break_token": "[IMG_BREAK]",
    "image_end_token": "[IMG_END]",
}
"""What processors look for in a tokenizer, under the names by which some ask for it."""

IDS = {
    "image_token_id": "<image>",
    "image_token_index": "<image>",
    "video_token_id": "<video>",
    "video_token_index": "<video>",
    "boi_token_index": "<image begins>",
    "eoi_token_index": "<image ends>",
    "vision_start_token_id": "<vision begins>",
    "vision_end_token_id": "<vision ends>",
}
"""The fields of configurations that name tokens."""

ALL_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
"""Each token has all experts: rounding would change which of them it has, and with that its numbers as a whole."""

CHANGES: dict[str, dict[str, Any]] = {
    "qwen3_5": GATED_DELTA,
    "qwen3_5_moe": {**GATED_DELTA, **ALL_EXPERTS},
    "qwen3_5_moe_text": {**GATED_DELTA, **ALL_EXPERTS},
    "qwen3_5_text": GATED_DELTA,
    "gemma3": {"initializer_range": 0.05, "query_pre_attn_scalar": 1, "sliding_window": 1024},
}
"""What a text model's configuration has beside the sizes."""


def compare_family(path: Path, family: str) -> None:
    """Compares one in an empty folder, also a model of text whose code is beside that of one that reads images."""
    if family.endswith("_text"):
        world, options = World(path, family, **CHANGES[family]), {}
    else:
        world, options = ImageWorld(path, family), {"skip_tokenizer_init": False, "language_model_only": True}
    method = compare_in_bfloat16 if "linear_key_head_dim" in CHANGES.get(family, {}) else compare
    method(world, **options)


class ImageWorld(World):
    """A `World` whose model reads images, too."""

    def __init__(self, path: Path, family: str) -> None:
        tokenizer = make_tokenizer()
        self._write(path, AutoModelForImageTextToText, make_config(family, tokenizer), tokenizer)
        for table in (IMAGE_PROCESSOR_MAPPING_NAMES, VIDEO_PROCESSOR_MAPPING_NAMES):
            name = table.get(family)
            if name is not None:
                name = name if isinstance(name, str) else name["torchvision"]
                getattr(transformers, name)().save_pretrained(self.folder)


def make_tokenizer() -> Any:
    """That of the tiny model, with the tokens that processors look for."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["\n" * count for count in (2, 3, 4)])  # which Gemma's puts around images
    names = {"eos_token": "<end>", "pad_token": "<end>", "unk_token": "<unknown>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, extra_special_tokens=TOKENS, **names)


def make_config(family: str, tokenizer: Any) -> Any:
    """Small images, and text of the sizes that vLLM's attention on the CPU has."""
    config = tiny_config(family)
    text = config.get_text_config()
    for name, value in SIZES.items():
        if hasattr(text, name) and not isinstance(getattr(type(text), name, None), property):
            setattr(text, name, value)
    if getattr(text, "layer_types", None):
        text.layer_types = (list(text.layer_types) * SIZES["num_hidden_layers"])[: SIZES["num_hidden_layers"]]
    for name, value in CHANGES.get(family, {}).items():
        setattr(text, name, value)
    _set_rope(family, text)
    for part in vars(config).values():
        if isinstance(part, PretrainedConfig) and hasattr(part, "out_hidden_size"):
            part.out_hidden_size = HIDDEN
    for name, token in IDS.items():
        if hasattr(config, name):
            is_pixtral = family == "mistral3" and token == "<image>"
            setattr(config, name, tokenizer.convert_tokens_to_ids("[IMG]" if is_pixtral else token))
    return config


def _set_rope(family: str, text: Any) -> None:
    """Positions of three axes for those alone that have them."""
    rope = getattr(text, "rope_parameters", None) or {}
    for each in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        each.pop("mrope_section", None)
        if family.startswith(("qwen", "glm4v")):
            half = int(HEAD_DIM * each.get("partial_rotary_factor", 1.0)) // 2
            each["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        compare_family(Path(folder), sys.argv[1])
