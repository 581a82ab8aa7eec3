"""What is attached, as it is now, as an adapter that a server takes: a plain prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ...adapters import Manifest, adapter_digest, write_adapter
from ...nn import LayerShape, MultitaskPrompt, Prefix, PrefixTuningConfig
from ..handle import Handle
from ..reaching import find_attention_layers
from .bake_prefix import attached_to_prefix, check_can_be_exact


class Publisher:
    """Writes what is attached again and again while it is trained; a soft prompt as the prefix that is equal to it.

    Args:
        handle: of what is attached.

    Raises:
        NotImplementedError: a soft prompt to which no prefix is equal, on this model or at all.
    """

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        if isinstance(handle.module, Prefix):
            return
        config: Any = handle.config
        tasks = handle.module.num_tasks if isinstance(handle.module, MultitaskPrompt) else 1
        in_text = getattr(config, "virtual_token_ids", None) is not None
        if in_text or tasks > 1 or handle.model.config.is_encoder_decoder:
            raise NotImplementedError(
                f"a server takes prefixes, and no prefix is equal to the virtual tokens of this "
                f"{type(config).__name__}: they are an encoder's, stand in the text, or are those of several tasks"
            )
        with handle.disabled():
            check_can_be_exact(handle.model, find_attention_layers(handle.model)[0])

    def write(self, folder: Path) -> str:
        """Writes it and says its digest; in several processes all of them call it, as of `Handle.save`.

        Raises:
            AdapterError, OSError: as of `Handle.save`.
        """
        if isinstance(self.handle.module, Prefix):
            self.handle.save(folder)
        else:
            self._write_as_prefix(folder)
        return adapter_digest(folder)

    def _write_as_prefix(self, folder: Path) -> None:
        handle = self.handle
        prompt = handle.bake()
        assert isinstance(prompt, Tensor)
        pairs = attached_to_prefix(handle, prompt[0] if prompt.dim() == 3 else prompt)
        shapes = [LayerShape(key.shape[0], key.shape[2], value.shape[2]) for key, value in pairs]
        config = PrefixTuningConfig(
            init=pairs, task_type=handle.config.task_type, modules_to_save=handle.config.modules_to_save
        )
        write_adapter(
            folder,
            module=Prefix(shapes, config, pairs),
            config=config,
            manifest=Manifest.create(handle.model, config, shapes, tokenizer=handle.tokenizer, forced=handle.forced),
            heads=handle.heads.trained,
        )
