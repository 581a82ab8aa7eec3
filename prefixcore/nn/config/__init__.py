"""What to train: the configurations of a prefix and of a soft prompt.

Names are those of PEFT where PEFT has one, so that a PEFT configuration can be carried over word by word.
Everything is checked when a configuration is made; a configuration never changes afterwards.
"""

from __future__ import annotations

from typing import TypeAlias

from .base import HEADS
from .checks import KeyValues
from .cpt import CPTConfig
from .multitask import MultitaskPromptTuningConfig
from .prefix import PLACES, PrefixTuningConfig
from .prompt import PromptTuningConfig, PTuningConfig

Config: TypeAlias = PrefixTuningConfig | PromptTuningConfig | PTuningConfig | MultitaskPromptTuningConfig | CPTConfig

__all__ = [
    "HEADS",
    "PLACES",
    "CPTConfig",
    "Config",
    "KeyValues",
    "MultitaskPromptTuningConfig",
    "PTuningConfig",
    "PrefixTuningConfig",
    "PromptTuningConfig",
]
