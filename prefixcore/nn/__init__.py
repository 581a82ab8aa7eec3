"""Trainable modules: the prefix, the soft prompt, their reparameterizations and initial values. Needs torch alone."""

from .config import (
    Config,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
)
from .cpt import CPTPrompt, cpt_labels, cpt_loss
from .initialization import (
    LayerShape,
    fit_ids,
    join_layers,
    split_layers,
    tensor_init,
    vocab_ids,
    vocab_init,
)
from .multitask import MultitaskPrompt
from .prefix import Prefix
from .soft_prompt import SoftPrompt

__all__ = [
    "CPTConfig",
    "CPTPrompt",
    "Config",
    "LayerShape",
    "MultitaskPrompt",
    "MultitaskPromptTuningConfig",
    "PTuningConfig",
    "Prefix",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "SoftPrompt",
    "cpt_labels",
    "cpt_loss",
    "fit_ids",
    "join_layers",
    "split_layers",
    "tensor_init",
    "vocab_ids",
    "vocab_init",
]
