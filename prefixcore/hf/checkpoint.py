"""`model.save_pretrained` of a model with virtual tokens attached, which is also what Trainer writes a checkpoint by.

The base model is not written: a folder that looks like it would be loaded as the bare model by anyone who knows nothing
of the virtual tokens. What is written is

- `prefixcore/`: the adapter, as of `Handle.save`; `prefixcore.load` finds it there;
- `model.safetensors`: every tensor that is trained, by its name in the model: what Trainer resumes from;
- `adapter_model.safetensors` and `adapter_config.json`: the LoRA of transformers' `add_adapter`, if there is one, for
  `load_adapter`;
- `config.json`: of no model. Without one, a class such as `LlamaForCausalLM` makes a model of its default
  configuration, seven billion random weights, and the Auto classes say nothing that helps. With this one both fail at
  once, in words.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ..adapters import Manifest, write_adapter
from ..adapters.files import CHECKPOINT, MODEL_FILE, PEFT_FILE
from ..adapters.hub_upload import upload_files
from ..adapters.whole import whole_module
from .attention.patch import MODULE

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from .bank.bank import Bank

_METHOD, _PUSH = "save_pretrained", "push_to_hub"
_NOT_SAVED = "_keys_to_ignore_on_save"
_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"
_HINT = "prefixcore's virtual tokens and no model: load the base model, then call prefixcore.load(model, this folder)"
_NO_MODEL = {"model_type": _HINT, "transformers_weights": _HINT}
"""transformers quotes the first where it knows no such model, and the second where it knows no such file of weights."""


class SavePretrained:
    """The method in place of the model's own. Plain data, so that a copy of the model has one of its own."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Writes what was trained, and no base model.

        Args:
            save_directory: the folder; what else is in it stays.
            is_main_process: whether this process writes.
            state_dict: the model's, where another has gathered it.
            push_to_hub: whether what is written goes to the Hugging Face Hub, to `repo_id` (the folder's name), as
                `private`, `revision`, `create_pr`, `commit_message` and `token` say.
            kwargs: these, and the other arguments of transformers' method, which are about the base model's files.

        Raises:
            AdapterError, OSError: as of `Handle.save`, and of `prefixcore.adapters.upload`.
        """
        if not is_main_process:
            return
        folder = Path(save_directory)
        self.write_adapters(folder, state_dict)
        _save_added_adapter(self.bank.model, folder, state_dict)
        save_file(_trained(self.bank, state_dict), folder / _WEIGHTS, {"format": "pt"})
        (folder / _CONFIG).write_text(json.dumps(_NO_MODEL, indent=2) + "\n", encoding="utf-8")
        if push_to_hub:
            _upload(folder, **{"repo_id": folder.absolute().name, **kwargs})

    def write_adapters(
        self, folder: Path, state_dict: Mapping[str, Tensor] | None = None, only: str | None = None
    ) -> None:
        """Writes what is attached to `folder`/prefixcore, or one without a name to `only` in it.

        Args:
            folder: the checkpoint.
            state_dict: the model's, where another has gathered it.
            only: a folder for the only adapter, where what it is written beside allows none right there.
        """
        bank = self.bank
        if bank.stage is not None:
            bank.stage.check_summed()
        folder.mkdir(parents=True, exist_ok=True)
        for name, adapter in bank.adapters.items():
            handle, module, heads = adapter.handle, adapter.module, adapter.handle.heads.trained
            if state_dict is not None:
                module = _with(module, state_dict, _place(name))
                heads = {head: _with(each, state_dict, f"{head}.") for head, each in heads.items()}
            manifest = Manifest.create(
                bank.model,
                handle.config,
                handle._layer_shapes or None,
                tokenizer=handle.tokenizer,
                forced=handle.forced,
                base_model=adapter.base_model,
            )
            target = folder / CHECKPOINT / (name or only or "")
            target.parent.mkdir(exist_ok=True)
            write_adapter(
                target, module=module, config=handle.config, manifest=manifest, heads=heads, source=handle.source
            )


class PushToHub:
    """`push_to_hub` in place of the model's own, which takes a bank's folders, in a folder of their own, for files."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank

    def __call__(self, repo_id: str, **kwargs: Any) -> CommitInfo:
        """Puts what `save_pretrained` writes on the Hugging Face Hub.

        Args:
            repo_id, kwargs: as of `save_pretrained` with `push_to_hub=True`.

        Returns:
            huggingface_hub's record of the commit.
        """
        with TemporaryDirectory() as folder:
            self.bank.model.save_pretrained(folder)
            return _upload(Path(folder), repo_id, **kwargs)


def _upload(folder: Path, repo_id: str, **kwargs: Any) -> CommitInfo:
    """Puts what was written to a folder, and nothing else that is in it, on the Hub."""
    files = [folder / name for name in (_CONFIG, _WEIGHTS, MODEL_FILE, PEFT_FILE)]
    files += (folder / CHECKPOINT).rglob("*")
    return upload_files(folder, [path for path in files if path.is_file()], repo_id, **kwargs)


def _save_added_adapter(model: Any, folder: Path, state_dict: Mapping[str, Tensor] | None) -> None:
    """Writes what `add_adapter` or `load_adapter` of transformers put into the model; of several active ones, none."""
    if getattr(model, "_hf_peft_config_loaded", False) and len(model.active_adapters()) == 1:
        type(model).save_pretrained(model, folder, state_dict=state_dict)


def _place(name: str | None) -> str:
    """What names of the tensors of an adapter begin with in its model."""
    return f"{MODULE}." if name is None else f"{MODULE}.{name}."


def check_state(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Before tensors are loaded into a model: ValueError if those of virtual tokens are of another kind or number.

    Trainer resumes with `strict=False`, which passes over them: a training would begin anew in silence, or end in words
    of the optimizer's.
    """
    method, start = model.__dict__.get(_METHOD), f"{prefix}{MODULE}."
    held = {name: tensor.shape for name, tensor in state_dict.items() if name.startswith(start)}
    if not held or not isinstance(method, SavePretrained):
        return
    adapters, found = method.bank.adapters, False
    for name, adapter in adapters.items():
        place = prefix + _place(name)
        given = {key: shape for key, shape in held.items() if key.startswith(place)}
        own = {place + key: tensor.shape for key, tensor in adapter.module.state_dict().items()}
        own = {key: shape if shape.numel() else given.get(key) for key, shape in own.items()}  # elsewhere, as of ZeRO-3
        if any(own.get(key) != shape for key, shape in given.items()):
            break
        found |= bool(given)  # a bank may have more adapters than were saved, or fewer
    else:
        if found:
            return
    saved = ", ".join(f"{name} {list(shape)}" for name, shape in list(held.items())[:4])
    raise ValueError(
        f"other virtual tokens were saved than are attached: saved are {saved}, attached "
        f"{', '.join(repr(adapter.handle) for adapter in adapters.values()) or 'none'}; attach what the checkpoint was "
        "trained with, or go on from its values by prefixcore.load(model, checkpoint, trainable=True), without resuming"
    )


class NotSaved:
    """The names of the tensors that a checkpoint leaves out, in place of the model's `_keys_to_ignore_on_save`.

    Where just these are missing in a checkpoint, Trainer resumes from it without a warning that names every weight.
    """

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.own = bank.model._keys_to_ignore_on_save

    def __iter__(self) -> Iterator[str]:
        keep = _kept(self.bank)
        return (name for name in self.bank.model.state_dict() if not keep(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def install(bank: Bank) -> None:
    """Puts the methods in place of the model's own, and looks at what is loaded into the model."""
    if not isinstance(bank.model.__dict__.get(_METHOD), SavePretrained):
        bank.state_hook = bank.model.register_load_state_dict_pre_hook(check_state)
    bank.model.__dict__[_METHOD] = SavePretrained(bank)
    bank.model.__dict__[_PUSH] = PushToHub(bank)
    bank.model.__dict__[_NOT_SAVED] = NotSaved(bank)


def uninstall(bank: Bank) -> None:
    """Lets the model have its own method again, where nothing is attached any longer."""
    found = bank.model.__dict__.get(_METHOD)
    if isinstance(found, SavePretrained) and found.bank is bank and not bank.is_attached:
        del bank.model.__dict__[_METHOD]
        del bank.model.__dict__[_PUSH]
        bank.state_hook.remove()
        bank.model._keys_to_ignore_on_save = bank.model.__dict__[_NOT_SAVED].own


def _with(module: Any, state_dict: Mapping[str, Tensor], prefix: str) -> Any:
    """A copy of a module whose tensors are those of a state dict, where it has them."""
    memo: dict[int, Any] = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if (given := state_dict.get(prefix + name)) is not None:
            given = given.detach().cpu().clone()
            memo[id(tensor)] = nn.Parameter(given, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else given
    return copy.deepcopy(module, memo)


def _trained(bank: Bank, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """What is attached and whatever else of the model requires a gradient, whole, by its name in the model."""
    model, keep = bank.model, _kept(bank)
    if state_dict is None:
        state_dict = {}
        for name, adapter in bank.adapters.items():
            if adapter.is_kept:
                whole = whole_module(adapter.module).state_dict()
                state_dict |= {_place(name) + key: tensor for key, tensor in whole.items()}
        for name, tensor in model.state_dict().items():
            if not name.startswith(f"{MODULE}."):
                state_dict[name] = tensor
    kept = {name: tensor for name, tensor in state_dict.items() if keep(name)}
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in kept.items()}


def _kept(bank: Bank) -> Callable[[str], bool]:
    """Whether a checkpoint holds the tensor of a name in the model."""
    names = {name for name, parameter in bank.model.named_parameters() if parameter.requires_grad}
    heads = [f"{name}." for adapter in bank.adapters.values() for name in adapter.handle.heads.trained]
    starts = (f"{MODULE}.", *heads)
    return lambda name: name in names or name.startswith(starts)
