"""Trainable modules: the prefix, the soft prompt, their reparameterizations and initial values. Needs torch alone."""

from .config import Config, PrefixTuningConfig, PromptTuningConfig, PTuningConfig
from .initialization import (
    LayerShape,
    fit_ids,
    join_layers,
    split_layers,
    tensor_init,
    vocab_ids,
    vocab_init,
)
from .prefix import Prefix
from .soft_prompt import SoftPrompt

__all__ = [
    "Config",
    "LayerShape",
    "PTuningConfig",
    "Prefix",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "SoftPrompt",
    "fit_ids",
    "join_layers",
    "split_layers",
    "tensor_init",
    "vocab_ids",
    "vocab_init",
]
