"""Formats of others, one file each, behind one small protocol: `Format`. None of them is ever unpickled.

`FORMATS` has them by their names. `prefixcore.hf.baking.converting` reads and writes them for a model.
"""

from .adapterhub import AdapterHub
from .cartridges import Cartridges
from .embeddings import Gguf, LlamaCpp, TensorRtLlm, Vllm
from .lmcache import LmCache
from .peft_folder import PeftFolder, contents_of
from .record import PREFIX, PROMPT, Contents, Facts, Format, Written

FORMATS: dict[str, Format] = {
    each.name: each
    for each in (PeftFolder(), Cartridges(), AdapterHub(), LmCache(), Vllm(), TensorRtLlm(), LlamaCpp(), Gguf())
}
"""Every format by its name."""

__all__ = ["FORMATS", "PREFIX", "PROMPT", "Contents", "Facts", "Format", "Written", "contents_of"]
