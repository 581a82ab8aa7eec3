"""`PromptBank`: many adapters on one model, of which each row of a batch sees its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..adapters.hub import local_folder
from ..adapters.weights import is_named
from ..nn import Config, CPTConfig, Prefix, PrefixTuningConfig
from .attaching import (
    check_config,
    check_model,
    check_position_limit,
    check_tokenizer,
    make_prefix,
    make_prompt,
)
from .attention.refusals import warn_of_dropout
from .bank.attached import Attached
from .bank.bank import Bank
from .bank.beside_peft import warn_of_frozen_peft
from .checkpoint import install, uninstall
from .handle import Handle
from .loading import Target
from .model.devices import device_of
from .model.undone import UndoneAfterBlock
from .reaching import find_attention_layers, find_hidden_size

_LONGEST_NAME = 200
"""Below what file systems have for a name (255 bytes), as a folder is written beside its place first."""


class PromptBank(UndoneAfterBlock):
    """Several adapters on a model: prefixes and soft prompts, of any lengths.

    Every call says by `task_ids` which adapter each batch row is for: `model(**batch, task_ids=["capitals", None])`,
    `model.generate(**batch, task_ids=...)`, a `task_ids` column of numbers in a dataset for Trainer. A task is a name,
    or a number (`bank.number("capitals")`, which stays while it is attached); -1, or None in a list, stands for no
    virtual tokens, and one task by itself for all rows. A packed batch has one a sequence. Each row gets what it would
    get alone, and only the adapters that are named get gradients.

    A frozen adapter is kept on the CPU, and a copy on the model's device is made anew after a change in place, but not
    after one through a parameter's `.data`, which torch does not count: change values under `torch.no_grad()`.

    Args:
        model: a transformers model, not wrapped, with nothing attached. It is frozen.
        memory: how many bytes the frozen adapters may take on the model's device. They are kept on the CPU, and the
            least recently used give way on the device. None: no limit.

    Raises:
        ValueError: `memory` is no number of bytes.
        TypeError, ValueError, NotImplementedError: as of `attach`.

    Examples:
        >>> bank = prefixcore.PromptBank(model)
        >>> capitals = bank.attach("capitals", prefixcore.PrefixTuningConfig(num_virtual_tokens=4))
        >>> sums = bank.attach("sums", prefixcore.PromptTuningConfig(num_virtual_tokens=6))
        >>> ids = torch.tensor([[5, 6, 7]] * 3)
        >>> out = model(ids, task_ids=["capitals", None, "sums"])
        >>> out.logits.shape[:2]
        torch.Size([3, 3])
        >>> bank.remove("sums")
        >>> bank.names
        ['capitals']
        >>> bank.detach()
    """

    def __init__(self, model: PreTrainedModel, *, memory: int | None = None) -> None:
        if memory is not None and (type(memory) is not int or memory < 0):
            raise ValueError(f"memory: expected a number of bytes of at least 0, or None, got {memory!r}")
        check_model(model)
        self._target = Target(model)
        self._layers = _attempt(find_attention_layers, model)
        self._hidden_size = _attempt(find_hidden_size, model)
        if isinstance(self._layers, Exception) and isinstance(self._hidden_size, Exception):
            raise self._layers
        warn_of_frozen_peft(model)
        self._bank = Bank(model)
        self._bank.stays = True
        self._bank.residency.budget = memory
        install(self._bank)
        if isinstance(self._layers, Exception):
            self._bank.set_decoder(str(self._layers), [])
        else:
            calls, backbone = self._layers
            self._bank.set_decoder(backbone, calls)

    @property
    def model(self) -> PreTrainedModel:
        """The model, changed in place."""
        return self._bank.model

    @property
    def names(self) -> list[str]:
        """The names of the adapters, in the order in which they came."""
        return [name for name in self._bank.adapters if name is not None]

    def number(self, name: str) -> int:
        """The number of an adapter, or of the first of its tasks. It stays, and is given to no other one later.

        Raises:
            KeyError: no adapter has this name.
        """
        return self._find(name).first_task

    def attach(self, name: str, config: Config, *, tokenizer: Any = None, replace: bool = False) -> Handle:
        """Attaches virtual tokens that are to be trained.

        Args:
            name: of the adapter, and of its folder in a checkpoint: a text without a dot or a slash.
            config, tokenizer: as of `prefixcore.attach`.
            replace: whether it may take the place of one that has this name.

        Returns:
            Its handle: `parameters()`, `save(directory)`, `detach()`.

        Raises:
            ValueError: the name is taken, or none.
            TypeError, ValueError, NotImplementedError: as of `prefixcore.attach`.
        """
        self._check_name(name, replace)
        check_config(config)
        check_tokenizer(tokenizer)
        if isinstance(config, CPTConfig):
            raise NotImplementedError(
                "context-aware prompt tuning has a loss of its own, in which rows of a bank cannot differ: train it "
                "by itself (prefixcore.attach), save it, and load it into the bank"
            )
        trained = [own for own, _ in self.model.named_modules() if any(is_named(own, n) for n in config.head_names)]
        if trained:
            raise NotImplementedError(
                f"{trained[0]} is to be trained along (modules_to_save, or a task_type that means it), which the rows "
                "of a bank cannot differ in: give modules_to_save=[] to leave it as it is, or attach it by itself"
            )
        with self._bank.disabled(), torch.inference_mode(False):
            if isinstance(config, PrefixTuningConfig):
                calls, _ = _result(self._layers)
                module, layers = make_prefix(self.model, config, calls, tokenizer)
                return self._add(name, module, layers, tokenizer)
            prompt = make_prompt(self.model, config, _result(self._hidden_size), tokenizer)
        return self._add(name, prompt, None, tokenizer)

    def load(
        self,
        name: str,
        directory: str | Path,
        *,
        trainable: bool = False,
        replace: bool = False,
        strict: bool = True,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Handle:
        """Attaches an adapter that was saved, frozen unless it is `trainable`.

        Args:
            name: of the adapter, and of its folder in a checkpoint: a text without a dot or a slash.
            directory, trainable, strict, revision, token: as of `prefixcore.load`.
            replace: whether it may take the place of one that has this name; where reading it fails, that one stays.

        Raises:
            ValueError: the name is taken, or none.
            AdapterError: as of `prefixcore.load`.
        """
        self._check_name(name, replace)
        folder = local_folder(directory, revision=revision, token=token)
        for what, found in (("attention_layers", self._layers), ("hidden_size", self._hidden_size)):
            if not isinstance(found, Exception):
                self._target.__dict__[what] = found
        with self._bank.disabled(), torch.inference_mode(False):
            found = self._target.read(folder, trainable, strict)
        if found.heads:
            raise NotImplementedError(
                f"{directory}: the adapter brings {found.heads[0]} along, which the rows of a bank cannot differ in; "
                "load it by itself"
            )
        handle = self._add(name, found.module, found.layers if isinstance(found.module, Prefix) else None)
        handle.forced, handle.source = found.forced, found.manifest
        return handle

    def remove(self, name: str) -> None:
        """Takes an adapter away, and touches no other.

        Raises:
            KeyError: no adapter has this name.
        """
        self._bank.remove(self._find(name))

    def detach(self) -> None:
        """Puts the model back to what it was. Handles keep their values.

        Calls that go on giving `task_ids` are then calls of the bare model, most of which ignore the argument.
        """
        self._bank.adapters.clear()
        self._bank.patch.undo()
        uninstall(self._bank)

    def __getitem__(self, name: str) -> Handle:
        return self._find(name).handle

    def __contains__(self, name: object) -> bool:
        return name in self._bank.adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self._bank.adapters)

    def _take_back(self) -> None:
        self.detach()

    def __repr__(self) -> str:
        shown = ", ".join(self.names[:5]) + (", ..." if len(self) > 5 else "")
        return f"PromptBank({len(self)} adapters on {type(self.model).__name__}: {shown or 'none'})"

    def _find(self, name: str) -> Attached:
        if name not in self._bank.adapters:
            raise KeyError(f"no adapter is named {name!r}; there are {', '.join(self.names) or 'none'}")
        return self._bank.adapters[name]

    def _check_name(self, name: str, replace: bool) -> None:
        if not _is_name(name):
            raise ValueError(
                "name: expected a text without a dot, a slash or what cannot be printed, of at most "
                f"{_LONGEST_NAME} bytes and not 'training', which torch has for itself, as it names a module and a "
                f"folder; got {name!r}"
            )
        if name in self._bank.adapters and not replace:
            raise ValueError(f"an adapter is named {name!r} already: pass replace=True, or remove it first")

    def _add(self, name: str, module: Any, layers: list[int] | None, tokenizer: Any = None) -> Handle:
        """Attaches a module under a name, in place of what has it."""
        if module.config.modules_to_save:
            raise NotImplementedError(
                "modules_to_save: rows of a bank cannot differ in whole modules: leave it out, or attach it by itself"
            )
        adapter = Attached(module, layers, name)
        check_position_limit(self.model, adapter.shift)
        shapes = []
        if layers is not None:
            calls, _ = _result(self._layers)
            shapes = [calls[layer].shape for layer in layers]
        if adapter.trains:
            with torch.inference_mode(False):  # what is made inside of it can never be trained
                module.to(device_of(self.model)).train(self.model.training)
            if layers is not None and not self._bank.cache_layers:
                warn_of_dropout(self.model)
        else:
            module.to("cpu")
            adapter.is_kept = False
        return Handle(self._bank, self._bank.add(adapter), shapes, tokenizer)


def _is_name(name: Any) -> bool:
    """Whether a name can be that of a module, and of its folder in what `save_pretrained` writes."""
    if not isinstance(name, str) or not name.isprintable() or name in ("", "training"):
        return False
    return not set("./\\") & set(name) and len(name.encode()) <= _LONGEST_NAME


def _attempt(function: Any, model: PreTrainedModel) -> Any:
    """What `function` returns, or the error that says why a kind of virtual tokens cannot be attached."""
    try:
        return function(model)
    except (NotImplementedError, ValueError) as error:
        return error


def _result(attempted: Any) -> Any:
    if isinstance(attempted, Exception):
        raise attempted
    return attempted
