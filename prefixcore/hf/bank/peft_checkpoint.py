"""Checkpoints of a PeftModel (a LoRA, say) around a model with virtual tokens: they hold the virtual tokens too.

Trainer with a PeftModel saves by `PeftModel.save_pretrained` and resumes by `PeftModel.load_adapter`. Neither asks the
model inside, so both are extended, for all PeftModels, by what happens only where virtual tokens are attached. So is
`push_to_hub`, which takes folders in folders, as these are, for files.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ...adapters import AdapterError, read_adapter
from ...adapters.files import BESIDE_PEFT, CHECKPOINT, MANIFEST_FILE
from ...adapters.hub_upload import upload_files
from ...adapters.module import build_module

if TYPE_CHECKING:
    from .attached import Attached
    from .bank import Bank

_EXTENDED = "_prefixcore_extended"


def extend_peft_checkpoints() -> None:
    """Extends PEFT's two methods, once, where PEFT is imported."""
    if "peft" not in sys.modules:
        return
    from peft import PeftModel

    _extend(PeftModel, "save_pretrained", _save)
    _extend(PeftModel, "load_adapter", _load)
    if not hasattr(PeftModel.push_to_hub, _EXTENDED):
        setattr(PeftModel, "push_to_hub", _pushing(PeftModel.push_to_hub))  # noqa: B010


def _extend(cls: Any, name: str, after: Callable[..., None]) -> None:
    method = getattr(cls, name)
    if hasattr(method, _EXTENDED):
        return

    @functools.wraps(method)
    def extended(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        after(self, *args, **kwargs)
        return result

    setattr(extended, _EXTENDED, True)
    setattr(cls, name, extended)


def _bank_inside(peft_model: Any) -> tuple[Any, Bank | None]:
    """The model inside, and what `attach` put on it; None: nothing, or virtual tokens of PEFT's own (`accelerate`)."""
    base = peft_model.get_base_model()
    return base, getattr(base.__dict__.get("save_pretrained"), "bank", None)


def _save(
    peft_model: Any,
    save_directory: str | os.PathLike[str],
    safe_serialization: bool = True,
    selected_adapters: Any = None,
    save_embedding_layers: Any = "auto",
    is_main_process: bool = True,
    *args: Any,
    state_dict: Any = None,
    **kwargs: Any,
) -> None:
    """After `PeftModel.save_pretrained`: the virtual tokens beside PEFT's files."""
    base, bank = _bank_inside(peft_model)
    if bank is None or not is_main_process:
        return
    if state_dict is not None:
        inside = next(f"{name}." for name, module in peft_model.named_modules() if module is base)
        state_dict = {k.removeprefix(inside): v for k, v in state_dict.items() if k.startswith(inside)}
    base.save_pretrained.write_adapters(Path(save_directory), state_dict, BESIDE_PEFT)


def _load(peft_model: Any, model_id: Any, adapter_name: str, is_trainable: bool = False, *args: Any, **_: Any) -> None:
    """After `PeftModel.load_adapter`: virtual tokens that are trained go on from what stands beside PEFT's files.

    Others were loaded by `prefixcore.load`, and keep their values.
    """
    _, bank = _bank_inside(peft_model)
    adapters = [] if bank is None else [each for each in bank.adapters.values() if each.is_kept and each.trains]
    for adapter in adapters:
        folder = Path(str(model_id)) / CHECKPOINT / (adapter.name or BESIDE_PEFT)
        if (folder / MANIFEST_FILE).exists():
            _put(adapter, folder)
        elif is_trainable and adapter_name in peft_model.active_adapters:
            warnings.warn(
                f"{model_id} holds PEFT's adapter and no virtual tokens ({folder} is not there), so those that are "
                "attached keep the values that they have",
                stacklevel=4,
            )


def _pushing(method: Any) -> Any:
    """`PeftModel.push_to_hub`, by our own hands where there are virtual tokens."""

    @functools.wraps(method)
    def push_to_hub(self: Any, repo_id: str, **kwargs: Any) -> Any:
        if _bank_inside(self)[1] is None:
            return method(self, repo_id, **kwargs)
        with TemporaryDirectory() as parent:
            folder = Path(parent)
            self.save_pretrained(folder)
            files = [path for path in folder.rglob("*") if path.is_file()]
            return upload_files(folder, files, repo_id, **kwargs)

    setattr(push_to_hub, _EXTENDED, True)
    return push_to_hub


def _put(adapter: Attached, folder: Path) -> None:
    """Gives an attached adapter the numbers of a saved one.

    Raises:
        AdapterError: the folder is damaged, or its adapter is not as the attached one is.
    """
    saved = read_adapter(folder)
    found = build_module(saved, trainable=True).state_dict()
    module, heads = adapter.module, adapter.handle.heads
    wanted = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    got = {name: list(tensor.shape) for name, tensor in found.items()}
    if wanted != got:
        raise AdapterError(
            f"{folder}: its virtual tokens ({saved.config.method}, {saved.config.num_virtual_tokens} of them) are not "
            f"made as those that are attached ({module.config.method}, {module.num_virtual_tokens}): attach with the "
            "configuration that the checkpoint was trained with"
        )
    module.load_state_dict(found)
    heads.load(saved.heads)
