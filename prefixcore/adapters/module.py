"""An adapter in memory, and the module made from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..nn import (
    Config,
    CPTConfig,
    CPTPrompt,
    LayerShape,
    MultitaskPrompt,
    MultitaskPromptTuningConfig,
    Prefix,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    SoftPrompt,
)
from .errors import AdapterError
from .manifest import Manifest
from .peft import Values

NUMBERS_AT_ONCE = 2**18
"""How many numbers of an adapter are computed again at a time to be compared."""


@dataclass(frozen=True)
class Adapter:
    """What an adapter's folder holds, read and checked.

    Attributes:
        config: what it was trained with, its `num_virtual_tokens` set. A module made from the adapter has a `config`
            of its own, which says what that module trains.
        tensors: the baked virtual tokens, fp32 on the CPU: of a prefix, one `(key [Hkv, P, D],
            value [Hkv, P, Dv])` for each layer that has one; of a soft prompt, `[P, hidden]`; of several tasks'
            prompts, what they share, `[P, hidden]` (the factors are in `training_state`).
        manifest: None for an adapter that PEFT wrote.
        training_state: the `state_dict` of a reparameterised module, by which its training goes on exactly.
        peft_config: what `adapter_config.json` says; None where PEFT can't express the adapter.
        heads: tensors of the modules that were trained along (`modules_to_save`), fp32, by their names in the model.
        digest: of the folder that was read, as `adapter_digest` says it; None of one that is not on disk.

    Examples:
        >>> from prefixcore.adapters import read_adapter
        >>> with prefixcore.attach(model, prefixcore.PromptTuningConfig(num_virtual_tokens=4)) as handle:
        ...     folder = handle.save("prompt")
        >>> adapter = read_adapter(folder)
        >>> adapter.config.method, adapter.tensors.shape
        ('prompt', torch.Size([4, 32]))
    """

    config: Config
    tensors: Values
    manifest: Manifest | None = None
    training_state: dict[str, Tensor] | None = None
    peft_config: dict[str, Any] | None = None
    heads: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    digest: str | None = None

    @property
    def layer_shapes(self) -> list[LayerShape]:
        """The shape of each layer that has a prefix; none for a soft prompt."""
        if isinstance(self.tensors, Tensor):
            return []
        return [LayerShape(key.shape[0], key.shape[2], value.shape[2]) for key, value in self.tensors]

    @property
    def layers(self) -> list[int]:
        """The indices of the layers that have a prefix; none for a soft prompt."""
        if self.manifest is not None and self.manifest.layers is not None:
            return self.manifest.layers
        return list(range(len(self.layer_shapes)))

    @property
    def base_model_name(self) -> str | None:
        """Of the model that it was trained for, what its files call it: a name on the Hub, or a path; None: nothing."""
        if self.manifest is not None:
            name = self.manifest.base_model.get("name_or_path")
        else:
            name = (self.peft_config or {}).get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None


Module: TypeAlias = Prefix | SoftPrompt | MultitaskPrompt | CPTPrompt


def make_module(adapter: Adapter, *, trainable: bool = False) -> Module:
    """The module of an adapter, on the CPU.

    Args:
        adapter: from `read_adapter`.
        trainable: True: the module that was saved, parameter for parameter and bit for bit, so that training goes
            on; for an adapter without its training state (one that PEFT wrote), a module that trains the virtual
            tokens themselves. False: a frozen module of the baked virtual tokens.

    Raises:
        AdapterError: the training state does not belong to the adapter.

    Examples:
        >>> from prefixcore.adapters import make_module, read_adapter
        >>> with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4)) as handle:
        ...     folder = handle.save("capitals")
        >>> prefix = make_module(read_adapter(folder), trainable=True)
        >>> len(prefix())  # layers
        2
    """
    return build_module(adapter, trainable=trainable, share=False)


def build_module(adapter: Adapter, *, trainable: bool, share: bool = True) -> Module:
    """`make_module`; with `share` its tensors are the adapter's own, for one that is used for nothing else."""
    state = adapter.training_state
    if isinstance(adapter.config, MultitaskPromptTuningConfig):
        return _make_multitask(adapter.config, state or {}, share=share).requires_grad_(trainable)
    if isinstance(adapter.config, CPTConfig):
        prompt = _make_cpt(adapter.config, adapter.tensors, state if trainable else None)
        return prompt if trainable else prompt.requires_grad_(False)
    if state is None or not trainable:
        config = _without_reparameterization(adapter.config)
        module = _make_sharing(config, adapter.tensors) if share else _make(config, adapter.tensors)
        return module if trainable else module.requires_grad_(False)
    # A module with initial values has them in its state; an encoder that makes everything itself has none (as in PEFT).
    needs_initial = adapter.config.init_name not in ("random", "zero")
    has_initial = needs_initial or any(name.split(".", 1)[0] == "initial" for name in state)
    _check_encoder(adapter.config, state)
    try:
        module = _make_empty(adapter.config, adapter.tensors, has_initial=has_initial)
    except (TypeError, ValueError, RuntimeError) as error:  # TypeError: torch, of a size beyond an int64
        raise AdapterError(f"config: {str(error).partition(chr(10))[0]}") from error  # a stack of C++ frames follows
    expected = module.state_dict()
    _check_state(expected, state)
    module.load_state_dict(
        {name: state[name].to(empty.dtype, copy=not share) for name, empty in expected.items()}, assign=True
    )
    _check_baked(module, adapter.tensors)
    return module


def _make_multitask(config: MultitaskPromptTuningConfig, state: dict[str, Tensor], *, share: bool) -> MultitaskPrompt:
    """The prompts of several tasks, with the numbers of the adapter's file."""
    plain = dataclasses.replace(config, init="zero", init_text=None, source_init=None)
    with torch.device("meta"):  # a module of the right shape, without memory
        module = MultitaskPrompt(state["embedding"].shape[1], plain)
    _check_state(module.state_dict(), state)
    module.load_state_dict({k: v.contiguous() if share else v.clone() for k, v in state.items()}, assign=True)
    module.config = config
    return module


def _make_cpt(config: CPTConfig, values: Values, state: dict[str, Tensor] | None) -> CPTPrompt:
    """The prompt of some examples; without its state, what was learned is part of the embeddings."""
    assert isinstance(values, Tensor)
    module = CPTPrompt(values.shape[1], config, values)
    if state is not None:
        _check_state(module.state_dict(), state)
        module.load_state_dict(state)
        if not torch.allclose(module.bake(), values, rtol=1e-3, atol=1e-4 * max(1e-6, float(values.abs().max()))):
            raise AdapterError("the training state does not make the virtual tokens that the adapter holds")
    return module


def _make_sharing(config: PrefixTuningConfig | PromptTuningConfig, values: Values) -> Prefix | SoftPrompt:
    """A module whose parameters are `values` themselves; those of a prefix with frozen tokens are cut, so copied."""
    module = _make_empty(dataclasses.replace(config, init="zero", init_text=None), values, has_initial=False)
    if isinstance(values, Tensor):
        state = {"embedding": values.contiguous()}
    else:
        frozen, state = module.num_frozen_tokens, {}
        for i, pair in enumerate(values):
            for name, tensor in zip(("key", "value"), pair, strict=True):
                state[f"layers.{i}.{name}"] = tensor[:, frozen:].contiguous()
                if frozen:
                    state[f"frozen.{i}.{name}"] = tensor[:, :frozen].contiguous()
    module.load_state_dict(state, assign=True)
    module.config = config.resolved(module.num_virtual_tokens)
    return module


def _make_empty(config: Config, values: Values, *, has_initial: bool) -> Prefix | SoftPrompt:
    """A module of the shape of `values` that takes no memory until it is given a state."""
    with torch.device("meta"):
        if isinstance(values, Tensor):
            return _make(config, torch.empty_like(values, device="meta"), has_initial=has_initial)
        pairs = [(torch.empty_like(k, device="meta"), torch.empty_like(v, device="meta")) for k, v in values]
        return _make(config, pairs, has_initial=has_initial)


def _make(config: Config, values: Values, *, has_initial: bool = True) -> Prefix | SoftPrompt:
    """A module of the shape of `values`; `has_initial`: they are its initial values."""
    if isinstance(config, PrefixTuningConfig):
        assert not isinstance(values, Tensor)
        shapes = [LayerShape(key.shape[0], key.shape[2], value.shape[2]) for key, value in values]
        return Prefix(shapes, config, values if has_initial else None)
    assert isinstance(values, Tensor)
    assert isinstance(config, (PromptTuningConfig, PTuningConfig))
    return SoftPrompt(values.shape[1], config, values if has_initial else None)


def _without_reparameterization(config: Config) -> PrefixTuningConfig | PromptTuningConfig:
    """The configuration that trains the same virtual tokens themselves."""
    assert not isinstance(config, (MultitaskPromptTuningConfig, CPTConfig))
    if isinstance(config, PTuningConfig):
        return PromptTuningConfig(
            num_virtual_tokens=config.num_virtual_tokens,
            init="tensor",
            virtual_token_ids=config.virtual_token_ids,
            task_type=config.task_type,
            tokenizer_name_or_path=config.tokenizer_name_or_path,
            modules_to_save=config.modules_to_save,
        )
    if isinstance(config, PrefixTuningConfig):
        return dataclasses.replace(config, reparameterization="none", prefix_projection=False)
    return dataclasses.replace(config, reparameterization="none")


def _check_encoder(config: Config, state: dict[str, Tensor]) -> None:
    """Raises AdapterError if there are more layers than tensors: without numbers too, they would take memory."""
    is_lstm = isinstance(config, PTuningConfig) and config.encoder_reparameterization_type == "LSTM"
    layers = getattr(config, "encoder_num_layers", 0)
    if is_lstm and layers > len(state):
        raise AdapterError(f"config.encoder_num_layers: {layers}, but the file has fewer")


def _check_state(expected: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Raises AdapterError unless `state` has the names and shapes of `expected`."""
    for name in sorted(expected.keys() ^ state.keys()):
        what = "missing" if name in expected else "unknown tensor"
        raise AdapterError(f"{name}: {what}; the file does not belong to this adapter's config")
    for name, tensor in state.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape:
            raise AdapterError(f"{name}: expected shape {list(wanted.shape)}, got {list(tensor.shape)}")


def _check_baked(module: Prefix | SoftPrompt, values: Values) -> None:
    """What the training state makes must be what the adapter holds, up to another machine's rounding.

    Some virtual tokens at a time: all of them at once would take the memory of the adapter again.
    """
    baked = tensors_of(values)
    largest = [max(abs(float(x)) for x in tensor.aminmax()) for tensor in baked]
    tokens = module.num_virtual_tokens
    step = max(1, NUMBERS_AT_ONCE * tokens // max(1, sum(tensor.numel() for tensor in baked)))
    if isinstance(module.config, PTuningConfig):
        step = tokens
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        for got, tensor, scale in zip(tensors_of(module.bake_some(start, stop)), baked, largest, strict=True):
            expected = tensor[..., start:stop, :]
            if not torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * max(1e-6, scale)):
                raise AdapterError("the training state does not make the virtual tokens that the adapter holds")


def tensors_of(values: Values) -> list[Tensor]:
    """The tensors of an adapter's values: a soft prompt, or the key and the value of one layer after the other."""
    return [values] if isinstance(values, Tensor) else [tensor for pair in values for tensor in pair]
