"""A tiny model that reads images, with its processor, in vLLM beside transformers: its text and its images.

    python -m tests.serving.engine.image_world FAMILY [compiled]

compares one family; `test_image_families` runs it where torchvision can be imported.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES
from vllm import SamplingParams

import prefixcore
from prefixcore.serving.families import TEXT_ALONE
from prefixcore.serving.offline import PrefixLLM
from tests import tiny
from tests.hf.tiny_models import tiny_config

from .compared import NAMES, check_closeness, compare, compare_in_bfloat16
from .world import GATED_DELTA, SIZES, World, prompts

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
    "img_patch_token": "<|IMG_PATCH|>",
    "start_of_img_token": "<|START_OF_IMG|>",
    "end_of_img_token": "<|END_OF_IMG|>",
    "img_line_break_token": "<|IMG_LINE_BREAK|>",
    "tile_token": "TILE",
    "tile_global_token": "TILE_GLOBAL",
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

OWN_IMAGE = {"aya_vision": "<|IMG_PATCH|>", "internvl": "<IMG_CONTEXT>", "mistral3": "[IMG]"}
"""The token of an image, if not "<image>"."""

IMAGE_SIZE = 16

CHANGES: dict[str, dict[str, Any]] = {
    "qwen3_5": GATED_DELTA,
    "qwen3_5_moe": {**GATED_DELTA, **ALL_EXPERTS},
    "qwen3_5_moe_text": {**GATED_DELTA, **ALL_EXPERTS},
    "qwen3_5_text": GATED_DELTA,
    "gemma3": {"initializer_range": 0.05, "query_pre_attn_scalar": 1, "sliding_window": 1024},
}
"""What a text model's configuration has beside the sizes."""


MARKS = {
    "gemma3": "<image begins>",
    "internvl": "<IMG_CONTEXT>",
    "mistral3": "[IMG]",
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl"), "<vision begins><image><vision ends>"
    ),
}
"""What stands for an image in a text, if not "<image>"."""


class ImageWorld(World):
    """A `World` whose model reads images, too."""

    def __init__(self, path: Path, family: str) -> None:
        self.family = family
        tokenizer = make_tokenizer()
        config = make_config(family, tokenizer)
        self._write(path, AutoModelForImageTextToText, config, tokenizer)
        if config.vision_config.model_type in ("siglip_vision_model", "clip_vision_model"):
            _publish(self.folder / "model.safetensors")
        self.mark = MARKS.get(family, "<image>")
        make_processor(family, config, tokenizer).save_pretrained(self.folder)
        self.processor = AutoProcessor.from_pretrained(self.folder)  # which may split texts as the family's own does

    def answer_about(self, name: str | None, text: str, image: Any, tokens: int = 16) -> list[int]:
        """What transformers generates, greedily, for a text with an image."""
        inputs = self.processor(text=[text], images=[image], return_tensors="pt")
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        with nullcontext() if name is None else prefixcore.attach(self.model, self.config_of(name)):
            return self.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()


def _publish(file: Path) -> None:
    """Gives the weights of a tower of CLIP's or SigLIP's the names of published checkpoints, which vLLM looks for."""
    weights = {
        name.replace("vision_tower.", "vision_tower.vision_model."): each for name, each in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})


def make_image(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_processor(family: str, config: Any, tokenizer: Any) -> Any:
    """For images of the model's size, as one tile."""
    size, patch = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, config.vision_config.patch_size
    images: dict[str, Any] = {"size": size}
    own: dict[str, Any] = {}
    if family.startswith("qwen"):
        area = {"shortest_edge": IMAGE_SIZE**2, "longest_edge": IMAGE_SIZE**2}
        images = {"patch_size": patch, "size": area}
    elif family == "gemma3":
        own = {"image_seq_length": config.mm_tokens_per_image}
    elif family in ("llava", "llava_next"):
        images = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": size}
        own = {"patch_size": patch, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        if family == "llava_next":
            images["image_grid_pinpoints"] = config.image_grid_pinpoints
    elif family in ("mistral3", "lighton_ocr"):
        images = {"size": {"longest_edge": IMAGE_SIZE}, "patch_size": patch}
        own = {"patch_size": patch, "spatial_merge_size": config.spatial_merge_size}
    elif family in ("idefics3", "smolvlm"):
        images = {"size": {"longest_edge": IMAGE_SIZE}, "max_image_size": {"longest_edge": IMAGE_SIZE}}
        own = {"image_seq_len": (IMAGE_SIZE // patch) ** 2 // config.scale_factor**2}
    elif family == "internvl":
        images |= {"crop_to_patches": False}
        own = {"image_seq_length": config.image_seq_length}
    elif family == "aya_vision":
        images |= {"crop_to_patches": False}
        own = {"patch_size": patch, "img_size": IMAGE_SIZE, "downsample_factor": config.downsample_factor}
    parts = [getattr(transformers, IMAGE_PROCESSOR_MAPPING_NAMES[family]["torchvision"])(**images), tokenizer]
    if family in VIDEO_PROCESSOR_MAPPING_NAMES:
        made = getattr(transformers, VIDEO_PROCESSOR_MAPPING_NAMES[family]["torchvision"])
        own["video_processor"] = made(**images) if family.startswith("qwen") else made()
    return getattr(transformers, PROCESSOR_MAPPING_NAMES[family])(*parts, **own)


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
    _set_images(family, config)
    for part in vars(config).values():
        if isinstance(part, PretrainedConfig) and hasattr(part, "out_hidden_size"):
            part.out_hidden_size = HIDDEN
    for name, token in IDS.items():
        if hasattr(config, name):
            token = OWN_IMAGE.get(family, token) if token == "<image>" else token
            setattr(config, name, tokenizer.convert_tokens_to_ids(token))
    return config


def _set_rope(family: str, text: Any) -> None:
    """Positions of three axes for those alone that have them."""
    rope = getattr(text, "rope_parameters", None) or {}
    for each in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        each.pop("mrope_section", None)
        if family.startswith(("qwen", "glm4v")):
            half = int(HEAD_DIM * each.get("partial_rotary_factor", 1.0)) // 2
            each["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
            each["mrope_interleaved"] = family.startswith("qwen3")


def _set_images(family: str, config: Any) -> None:
    """Few tokens of an image."""
    vision = config.vision_config
    if family == "qwen2_vl":
        vision.hidden_size = HIDDEN
    elif family == "qwen3_vl":
        vision.deepstack_visual_indexes = [0, 1]
    elif family in ("qwen3_5", "qwen3_5_moe"):
        vision.initializer_range = 0.02  # in bfloat16 rounding would be most of a tower of large weights
    elif family == "gemma3":
        config.mm_tokens_per_image = 4
    elif family == "internvl":
        vision.image_size, vision.patch_size, config.image_seq_length = [IMAGE_SIZE] * 2, [4, 4], 4
    elif family == "llava_next":
        config.image_grid_pinpoints = [[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE]]


BEFORE = "the quick brown fox jumps over the dog: "
"""More than a block of the cache, so that what is in a request's later blocks is found by what came before."""


def compare_family(world: ImageWorld, *, compiled: bool = False) -> None:
    """Compares texts and texts with images, as far as vLLM's layers on the CPU go."""
    if "linear_key_head_dim" in CHANGES.get(world.family, {}):
        compare_in_bfloat16(world, skip_tokenizer_init=False)
        compare_images_in_bfloat16(world)
        return
    if world.family in TEXT_ALONE:
        compare(world, skip_tokenizer_init=False, language_model_only=True)
    compare_images(world, compiled=compiled)


def compare_images_in_bfloat16(world: ImageWorld) -> None:
    """Asserts that log-probabilities of answers about images are equal but for rounding."""
    texts = [f"{world.mark}?", f"{BEFORE}{world.mark} what is it?"]
    asked = [(name, (text, make_image(seed))) for name in NAMES for text in texts for seed in (1, 2)]
    requests = [{"prompt": text, "multi_modal_data": {"image": image}} for _, (text, image) in asked]
    options: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 512, "enforce_eager": True}
    # So few tokens a step that prompts are computed in pieces, which end before images and behind them.
    llm = PrefixLLM(world.folder, world.registry, max_num_batched_tokens=64, max_num_seqs=32, **options)
    no_image = {world.model.config.image_token_id: -100.0}  # an answer with that token could not be read again
    options = {"max_tokens": 16, "ignore_eos": True, "detokenize": False, "logprobs": 0, "logit_bias": no_image}
    greedy = SamplingParams(temperature=0, **options)
    try:
        made = llm.generate(requests, greedy, adapter=[name for name, _ in asked], use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()

    def score(name: str | None, prompt: tuple[str, Any], answer: list[int]) -> Any:
        inputs = dict(world.processor(text=[prompt[0]], images=[prompt[1]], return_tensors="pt"))
        ids, kinds = inputs.pop("input_ids"), inputs.pop("mm_token_type_ids")
        inputs["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(1, len(answer))], 1)
        del inputs["attention_mask"]
        return world.score(name, ids, answer, **inputs)

    check_closeness(asked, [output.outputs[0] for output in made], score)


def compare_images(world: ImageWorld, *, compiled: bool = False) -> None:
    """Asserts that greedy tokens are equal, of texts and of texts with images, with prefixes and without.

    The same text has two images, and each of these is read with two adapters: none may be answered from cached blocks
    of another. The second time all are answered from their own.
    """
    for size in (17, 64):
        world.add(f"family-{size}", size, seed=size)
    names = [None, "family-17", "family-64"]
    texts = [f"{world.mark}?", f"{BEFORE}{world.mark} what is it?"]
    readers = [] if world.family in TEXT_ALONE else names
    about = [(name, text, make_image(seed)) for name in readers for text in texts for seed in (1, 2)]
    plain = [(name, ids) for name in names for ids in prompts(3, seed=8)]
    expected = [world.answer(*each) for each in plain] + [world.answer_about(*each) for each in about]
    assert len(set(map(tuple, expected))) == len(expected)
    requests: list[Any] = [{"prompt_token_ids": ids} for _, ids in plain]
    requests += [{"prompt": text, "multi_modal_data": {"image": image}} for _, text, image in about]
    options: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 512,
        "enforce_eager": not compiled,
        "block_size": 32,
    }
    # So few tokens a step that prompts are computed in pieces, which end before images and behind them.
    llm = PrefixLLM(world.folder, world.registry, max_num_batched_tokens=64, max_num_seqs=32, **options)
    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    asked = [each[0] for each in (*plain, *about)]
    try:
        for is_again in (False, True):
            made = llm.generate(requests, greedy, adapter=asked, use_tqdm=False)
            found = [list(output.outputs[0].token_ids) for output in made]
            wrong = [i for i, answer in enumerate(expected) if found[i] != answer]
            assert not wrong, [(asked[i], requests[i], expected[i], found[i]) for i in wrong]
            assert any(output.num_cached_tokens for output in made) or not is_again
        if not about:
            image = {"prompt": world.mark, "multi_modal_data": {"image": make_image(1)}}
            with pytest.raises(ValueError, match="have not been compared with transformers"):
                llm.generate([image], greedy, adapter="family-17", use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        family, path = sys.argv[1], Path(folder)
        if family.endswith("_text"):
            compare_in_bfloat16(World(path, family, **CHANGES[family]))
        else:
            compare_family(ImageWorld(path, family), compiled="compiled" in sys.argv)
