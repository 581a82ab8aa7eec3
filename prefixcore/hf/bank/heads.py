"""Modules that are trained whole beside virtual tokens, above all a classification head: PEFT's `modules_to_save`.

A copy of each takes its place in the model, under its name, and is what is trained, saved and loaded; the model's own
is kept aside, computes inside `Handle.disabled()`, and comes back with `Handle.detach()`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...adapters import AdapterError
from ...nn import Config, Prefix
from ...nn.config import HEADS
from ..attention.disabled import is_disabled
from ..attention.patch import MODULE, Patch
from .attached import AnyPrompt

_CLASSIFIERS = tuple(dict.fromkeys(name for names in HEADS.values() for name in names))


class Heads:
    """The modules that a handle trains beside its virtual tokens.

    Plain data, so that a copy of the model has copies of its own.

    Attributes:
        model: the model.
        trained: the modules that stand in the model while it is attached, by their names in it.
        own: the model's own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.trained: dict[str, nn.Module] = {}
        self.own: dict[str, nn.Module] = {}

    def attach(self, names: list[str], patch: Patch, *, trainable: bool) -> None:
        """Puts a copy in place of each of these modules."""
        for name in [called for each in names for called in _called(self.model, each)]:
            own = self.model.get_submodule(name)
            trained = copy.deepcopy(own).requires_grad_(trainable)
            trained.__dict__["forward"] = _Forward(patch, trained, own)
            self.own[name], self.trained[name] = own, trained
            _put(self.model, name, trained)
        if names:
            patch.wrap_method("tie_weights", self.tie_weights)
            patch.wrap_method("resize_token_embeddings", self.resize_token_embeddings)

    def tie_weights(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Ties the model's weights, but none of a module that is trained, which has numbers of its own.

        Trainer asks for it when it has loaded a checkpoint.
        """
        trained = {id(parameter) for _, parameter in self.named_parameters()}
        before = [(module, dict(module._parameters)) for module in self.model.modules()]
        result = method(*args, **kwargs)
        for module, parameters in before:
            for name, own in parameters.items():
                tied = module._parameters.get(name)
                if tied is not own and {id(own), id(tied)} & trained:
                    module._parameters[name] = own
        return result

    def resize_token_embeddings(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Refuses to resize an output head that is trained: transformers would put another one in its place."""
        size = args[0] if args else kwargs.get("new_num_tokens")
        head = self.model.get_output_embeddings()
        for name, module in self.trained.items():
            if size is not None and head is not None and any(inner is head for inner in module.modules()):
                raise ValueError(
                    f"{name} is trained along (modules_to_save), and transformers would put another one in its place, "
                    "which nothing trains: resize the embeddings before you attach"
                )
        return method(*args, **kwargs)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the numbers of every attached module, by their names in the model."""
        for name, module in self.trained.items():
            state = {key: tensors[f"{name}.{key}"] for key in module.state_dict()}
            module.load_state_dict(state)

    def detach(self) -> None:
        """Puts the model's own modules back."""
        for name, own in self.own.items():
            trained = self.trained[name]
            if self.model.get_submodule(name) is trained:
                _follow(own, trained)
                _put(self.model, name, own)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, with its names in the model."""
        for name, module in self.trained.items():
            for key, parameter in module.named_parameters():
                yield f"{name}.{key}", parameter


def _called(model: nn.Module, name: str) -> Iterator[str]:
    """The names of the modules that are called where `name` is: of a list of modules those in it."""
    module = model.get_submodule(name)
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        for child in module._modules:
            yield from _called(model, f"{name}.{child}")
    else:
        yield name


class _Forward:
    """The forward of a module in place of the model's own, which computes while virtual tokens are disabled."""

    def __init__(self, patch: Patch, trained: nn.Module, own: nn.Module) -> None:
        self.patch, self.trained, self.own = patch, trained, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_disabled(self.patch):
            _follow(self.own, self.trained)
            return self.own(*args, **kwargs)
        return type(self.trained).forward(self.trained, *args, **kwargs)


def find_heads(model: PreTrainedModel, module: Prefix | AnyPrompt) -> list[str]:
    """The names of the modules that `modules_to_save` means: those whose names end so, as in PEFT, outermost only.

    Warns:
        UserWarning: the model has a classification head that nothing was said about, which stays as it is.

    Raises:
        ValueError: one that is asked for is not there, holds the whole decoder, or is one that a soft prompt cannot
            train.
    """
    config: Config = module.config
    wanted = config.head_names
    names: list[str] = []
    for name, _ in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in names) or name.split(".")[0] == MODULE
        if name and not inside and any(name.endswith(each) for each in wanted):
            names.append(name)
    missing = [each for each in config.modules_to_save or () if not any(name.endswith(each) for name in names)]
    if set(missing) - set(HEADS.get(config.task_type or "", ())):
        raise ValueError(
            f"modules_to_save: {type(model).__name__} has no module whose name ends with {missing[0]!r}; its own are "
            f"{', '.join(name for name, _ in model.named_children() if name != MODULE)}"
        )
    bodies = [body for body in (model.base_model, model.get_decoder()) if body is not None and body is not model]
    whole = [name for name in names if any(inner in bodies for inner in model.get_submodule(name).modules())]
    if whole:
        raise ValueError(
            f"modules_to_save: {whole[0]} is or holds the whole decoder, which virtual tokens are put into and which "
            "stays frozen: name modules inside of it, such as 'norm' or 'layers.1.mlp', or train without virtual tokens"
        )
    if not isinstance(module, Prefix):
        embed = model.get_input_embeddings()
        tables = [name for name in names if any(inner is embed for inner in model.get_submodule(name).modules())]
        if tables:
            raise ValueError(
                f"modules_to_save: {tables[0]} is or holds the embeddings that a soft prompt is put beside, and they "
                "get no gradient; leave it out, or take a prefix"
            )
    if config.modules_to_save is None and not names:
        _warn_of_frozen_head(model)
    return names


def _warn_of_frozen_head(model: PreTrainedModel) -> None:
    for name, child in model.named_children():
        if name in _CLASSIFIERS and any(True for _ in child.parameters()):
            warnings.warn(
                f"{name} of {type(model).__name__} stays as it is: if it is new, it is random and nothing trains it; "
                f"give modules_to_save=[{name!r}] (or the task_type of PEFT), or modules_to_save=[] if it is trained",
                stacklevel=5,
            )


def check_heads(model: PreTrainedModel, shapes: Mapping[str, list[int]]) -> list[str]:
    """The names of the modules that an adapter brings along, checked to be the model's.

    Args:
        model: the model.
        shapes: of the tensors that the adapter brings, by their names in the model.

    Raises:
        AdapterError: the model has no such module, or tensors of other names or shapes in it.
    """
    names: list[str] = []
    left = dict(shapes)
    for name, module in model.named_modules():
        keys = [key for key in left if key.startswith(f"{name}.")] if name else []
        if not keys:
            continue
        expected = {f"{name}.{key}": list(tensor.shape) for key, tensor in module.state_dict().items()}
        if expected.keys() <= left.keys():
            for key, shape in expected.items():
                if left[key] != shape:
                    raise AdapterError(f"{key}: expected shape {shape}, as the model has it, got {left[key]}")
                del left[key]
            names.append(name)
    if left:
        raise AdapterError(f"{next(iter(left))}: the adapter brings it along, but {type(model).__name__} has none")
    return names


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module


def _follow(own: nn.Module, trained: nn.Module) -> None:
    """Moves a module that stands aside to where the one in its place was moved."""
    for mine, other in zip(own.parameters(), trained.parameters(), strict=True):
        if mine.device != other.device or mine.dtype != other.dtype:
            own.to(other.device, other.dtype)
            return
