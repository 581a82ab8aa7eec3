"""Which families of models are served unasked."""

from __future__ import annotations

VERIFIED = (
    "apertus",
    "arcee",
    "biogpt",
    "bitnet",
    "bloom",
    "cohere",
    "cohere2",
    "cwm",
    "dots1",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "exaone_moe",
    "falcon",
    "falcon_h1",
    "flex_olmo",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granite",
    "granite_swa",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "helium",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "hyperclovax",
    "jais2",
    "llama",
    "mellum",
    "ministral3",
    "mistral",
    "mixtral",
    "nanochat",
    "nemotron",
    "nemotron_h",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "seed_oss",
    "smollm3",
    "solar_open",
    "stablelm",
    "starcoder2",
    "vaultgemma",
)
"""Model types whose greedy tokens with a prefix equal transformers' (`tests/serving/engine/test_families.py`).

Elsewhere the numbers of a key may stand in another order in vLLM's cache than in transformers', as those of Llama 4 do,
which would be wrong without a sign of it.
"""

WITH_IMAGES = (
    "aya_vision",
    "gemma3",
    "idefics3",
    "internvl",
    "lighton_ocr",
    "llava",
    "llava_next",
    "mistral3",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "smolvlm",
)
"""Model types that read images too, of whose text and images the same was found (`test_image_families.py` there)."""

TEXT_ALONE = ("gemma3",)
"""Those of them of whose text alone it was found.

The tokens of an image see each other both ways, which vLLM's attention on the CPU, where all were compared, cannot do.
"""


def why_no_images(model_type: str | None) -> str | None:
    """Why a model that reads images is served with prefixes for its text alone; None: it is not.

    Examples:
        >>> from prefixcore.serving.families import why_no_images
        >>> why_no_images("qwen3_vl"), why_no_images("gemma3")
        (None, "answers about images behind a prefix have not been compared with transformers for 'gemma3'")
    """
    if model_type not in TEXT_ALONE:
        return None
    return f"answers about images behind a prefix have not been compared with transformers for {model_type!r}"


def why_unverified(model_type: str | None) -> str | None:
    """Why prefixes on a model type are served only if somebody insists; None: they are served.

    Examples:
        >>> from prefixcore.serving.families import why_unverified
        >>> why_unverified("llama"), why_unverified("llama4_text")
        (None, "prefixes of the model type 'llama4_text' have not been compared with transformers")
    """
    if model_type in VERIFIED or model_type in WITH_IMAGES:
        return None
    return f"prefixes of the model type {model_type!r} have not been compared with transformers"
