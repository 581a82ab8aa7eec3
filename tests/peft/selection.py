"""Which of PEFT's tests concern its prompt-learning methods, and which of those are left out, each for a reason."""

from __future__ import annotations

import inspect
import re
from typing import Any

FILES = (
    "test_cartridge.py",
    "test_config.py",
    "test_cpt.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_initialization.py",
    "test_lora_conversion.py",
    "test_mixed.py",
    "test_multitask_prompt_tuning.py",
    "test_seq_classifier.py",
    "test_tuners_utils.py",
)
"""Where they are. Left out: test_vision_models.py (its one test needs an image processor), test_gpu_examples.py,
test_common_gpu.py (GPUs)."""

_WHOLE = {"test_cartridge.py", "test_cpt.py", "test_multitask_prompt_tuning.py"}
_NAMED = re.compile(r"PrefixTuning|PromptTuning|PromptEncoder|CPTConfig|Cartridge|[pP]rompt_?[lL]earning")

_INNER_CALL = (
    "replaces the base model's forward and reads the positions that PEFT hands to it; they are moved in the decoder "
    "inside, which tests/hf/test_accelerate.py compares by its numbers"
)
_GEMMA4 = "Gemma 4: its layers have heads of different shapes and share keys, so accelerate refuses a prefix by name"

LEFT_OUT = {
    "test_from_pretrained_cache_dir": "downloads from the hub into an empty folder",
    "test_from_peft_type": "makes every configuration of PEFT, one of which imports scikit-learn",
    "test_prefix_tuning_gemma4_works": _GEMMA4,
    "test_prefix_tuning_gemma4_warns_if_some_layers_skipped": _GEMMA4,
    "test_prefix_tuning_gemma4_raises_if_all_layers_skipped": _GEMMA4,
}
"""Tests that are not run in either mode, by name."""

LEFT_OUT_ACCELERATED = {
    "test_prefix_tuning_offsets_position_ids_in_forward": _INNER_CALL,
    "test_cartridge_offsets_position_ids_in_forward": _INNER_CALL,
    "test_cartridge_gradient_checkpointing_raises": "expects gradient checkpointing to be refused, which works here",
}
"""Tests that are run without `accelerate` only."""

REFUSED = {
    ("DebertaModel", "PREFIX_TUNING"): "its attention does not go through transformers' attention interface",
    ("DebertaV2Model", "PREFIX_TUNING"): "its attention does not go through transformers' attention interface",
    ("GPTJForCausalLM", "PREFIX_TUNING"): "its attention does not go through transformers' attention interface",
    ("GPTJForCausalLM", "CARTRIDGE"): "its attention does not go through transformers' attention interface",
    (
        "T5ForConditionalGeneration",
        "PREFIX_TUNING",
    ): "PEFT's virtual tokens have a place in its learned bias of positions",
}
"""Base models and methods that `accelerate` may refuse in these tests, which then go on with PEFT alone."""


def concerns_prompt_learning(item: Any) -> bool:
    """Whether a collected test is about a prompt-learning method."""
    from peft import PeftConfig, PromptLearningConfig

    if item.path.name in _WHOLE:
        return True
    values = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    methods = [v if isinstance(v, type) else type(v) for v in _flat(values)]
    methods = [m for m in methods if issubclass(m, PeftConfig)]
    if methods:
        return any(issubclass(m, PromptLearningConfig) for m in methods)
    try:
        return bool(_NAMED.search(inspect.getsource(item.function)))
    except (OSError, TypeError):
        return False


def _flat(values: list[Any]) -> list[Any]:
    return [each for v in values for each in (v if isinstance(v, (tuple, list)) else [v])]
