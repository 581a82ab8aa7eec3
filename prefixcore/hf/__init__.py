"""Prefixes and soft prompts on transformers models: attach, train, generate, save, load, detach."""

from .attaching import attach
from .baking.baking import Baked, bake
from .baking.converting import export_adapter, import_adapter
from .batch.packing import PackedCollator
from .families import ENCODER_DECODERS, ENCODERS, FAMILIES
from .handle import Handle, attached
from .loading import load
from .peft import Accelerated, accelerate
from .pipeline import ModelStage, pipeline_stage
from .prompt_bank import PromptBank

__all__ = [
    "ENCODERS",
    "ENCODER_DECODERS",
    "FAMILIES",
    "Accelerated",
    "Baked",
    "Handle",
    "ModelStage",
    "PackedCollator",
    "PromptBank",
    "accelerate",
    "attach",
    "attached",
    "bake",
    "export_adapter",
    "import_adapter",
    "load",
    "pipeline_stage",
]
