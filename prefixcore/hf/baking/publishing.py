"""What is attached, as it is now, as an adapter that a server takes: a plain prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ...adapters import Manifest, adapter_digest, check_target, write_adapter
from ...adapters.reading import read_header
from ...adapters.whole import whole_module
from ...nn import LayerShape, MultitaskPrompt, Prefix, PrefixTuningConfig
from ..handle import Handle
from ..model.peft_parameters import peft_parameters
from ..reaching import find_attention_layers
from .bake_prefix import attached_to_prefix, check_can_be_exact

_TASK = "in training: what its answers are sampled from"
"""Stands in the manifest, by which such a folder is told from an adapter that someone keeps."""


class Publisher:
    """Writes what is attached again and again while it is trained; a soft prompt as the prefix that is equal to it.

    Args:
        handle: of what is attached.
        folder: where to.

    Raises:
        NotImplementedError: a soft prompt to which no prefix is equal, on this model or at all; a model in which other
            weights are trained as well, or that holds an adapter of PEFT's; virtual tokens of a PeftModel.
        AdapterError: something else than an adapter is in the folder's place.
        ValueError: what is in the folder was not written by this.
    """

    def __init__(self, handle: Handle, folder: Path) -> None:
        if not isinstance(handle, Handle):  # of `accelerate`
            raise NotImplementedError(
                "a server takes what prefixcore.attach attaches, and this model runs a PeftModel's virtual tokens: "
                "attach a configuration of prefixcore's to the model that it was made of, or load what PEFT saved "
                "(prefixcore.load, trainable=True)"
            )
        self.handle, self.folder = handle, folder
        self._check_model()
        check_target(folder)
        if folder.exists() and any(folder.iterdir()):
            manifest = read_header(folder)[0].manifest
            if manifest is None or manifest.task != _TASK:
                raise ValueError(
                    f"{folder} is an adapter that would be lost, for what is in training would take its place at each "
                    "step: give another name"
                )
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

    def write(self, *, is_writer: bool = True) -> str | None:
        """Writes it and says its digest.

        Args:
            is_writer: in several processes, which all call it together, true in one of them; the others get None.

        Raises:
            AdapterError, OSError: as of `Handle.save`.
        """
        self._check_model()
        handle = self.handle
        module = handle.module if isinstance(handle.module, Prefix) else self._equal_prefix()
        config, shapes = module.config, list(module.shapes)
        manifest = Manifest.create(
            handle.model, config, shapes, task=_TASK, tokenizer=handle.tokenizer, forced=handle.forced,
            base_model=handle._adapter.base_model,
        )  # fmt: skip
        module = whole_module(module)
        heads = {name: whole_module(head) for name, head in handle.heads.trained.items()}
        if not is_writer:
            return None
        write_adapter(self.folder, module=module, config=config, manifest=manifest, heads=heads)
        return adapter_digest(self.folder)

    def _check_model(self) -> None:
        """A server has the model as it was, so that nothing but what is attached may differ."""
        handle, own = self.handle, {id(parameter) for parameter in self.handle.parameters()}
        if not handle.is_attached:
            raise ValueError("what is served was taken off the model (detach) and no longer has part in its training")
        others = [name for name, p in handle.model.named_parameters() if p.requires_grad and id(p) not in own]
        if others:
            raise NotImplementedError(
                f"a server has the model as it was before training, and here more is trained than what is attached: "
                f"{', '.join(others[:3])}{', ...' if len(others) > 3 else ''}; freeze it (requires_grad_(False))"
            )
        if peft_parameters(handle.model):
            raise NotImplementedError(
                "a server has the model without the adapter of PEFT's (a LoRA, say) that is in it here, so its "
                "answers would be another model's: merge it into the model and serve that (merge_and_unload)"
            )

    def _equal_prefix(self) -> Prefix:
        prompt = self.handle.bake()
        assert isinstance(prompt, Tensor)
        pairs = attached_to_prefix(self.handle, prompt[0] if prompt.dim() == 3 else prompt)
        shapes = [LayerShape(key.shape[0], key.shape[2], value.shape[2]) for key, value in pairs]
        old = self.handle.config
        config = PrefixTuningConfig(init=pairs, task_type=old.task_type, modules_to_save=old.modules_to_save)
        return Prefix(shapes, config, pairs)
