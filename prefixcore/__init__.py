"""prefixcore: the kernel core for soft prompting and prefix tuning.

Three front doors:

* a transformers model: `attach`, `load`, `accelerate`, `PromptBank`, the `*Config` classes, `PackedCollator`,
  `PromptCallback`, `measure`;
* a framework of your own: `prefix_attention` and `soft_embedding`;
* the command line: `prefixcore --help` lists its commands, from `train` to `serve` and `audit`.

Importing the package needs torch alone; everything that needs transformers, PEFT or safetensors is
imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _interrupt as _interrupt  # before torch, whose import takes seconds
from .ops import prefix_attention, soft_embedding, use_backend, which_backend
from .version import __version__

if TYPE_CHECKING:
    from .adapters import AdapterError
    from .hf import (
        Accelerated,
        Baked,
        Handle,
        ModelStage,
        PackedCollator,
        PromptBank,
        accelerate,
        attach,
        bake,
        export_adapter,
        import_adapter,
        load,
        pipeline_stage,
    )
    from .hf.callback import PromptCallback
    from .hf.measures import measure
    from .nn import CPTConfig, MultitaskPromptTuningConfig, PrefixTuningConfig, PromptTuningConfig, PTuningConfig
    from .serving.rollouts import ServedRollouts

# Public name -> the room it is imported from at first use.
_LAZY = {
    "CPTConfig": "nn",
    "MultitaskPromptTuningConfig": "nn",
    "PrefixTuningConfig": "nn",
    "PromptTuningConfig": "nn",
    "PTuningConfig": "nn",
    "accelerate": "hf",
    "Accelerated": "hf",
    "attach": "hf",
    "bake": "hf",
    "Baked": "hf",
    "export_adapter": "hf",
    "import_adapter": "hf",
    "load": "hf",
    "measure": "hf.measures",
    "pipeline_stage": "hf",
    "Handle": "hf",
    "ModelStage": "hf",
    "PackedCollator": "hf",
    "PromptBank": "hf",
    "PromptCallback": "hf.callback",
    "ServedRollouts": "serving.rollouts",
    "AdapterError": "adapters",
}

__all__ = [
    "Accelerated",
    "AdapterError",
    "Baked",
    "CPTConfig",
    "Handle",
    "ModelStage",
    "MultitaskPromptTuningConfig",
    "PTuningConfig",
    "PackedCollator",
    "PrefixTuningConfig",
    "PromptBank",
    "PromptCallback",
    "PromptTuningConfig",
    "ServedRollouts",
    "__version__",
    "accelerate",
    "attach",
    "bake",
    "export_adapter",
    "import_adapter",
    "load",
    "measure",
    "pipeline_stage",
    "prefix_attention",
    "soft_embedding",
    "use_backend",
    "which_backend",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'prefixcore' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
