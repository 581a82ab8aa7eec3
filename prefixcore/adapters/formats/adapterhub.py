"""The `adapters` library (AdapterHub): a folder with `adapter_config.json` and `pytorch_adapter.bin` (or safetensors).

Its prefix is one vector, `control_trans` ("flat") or made by an MLP of its own, laid out `[P, L*2, Hkv, D]` as PEFT's.
Keys meet queries as they are, but the text behind them begins at position 0, not P: our `position_offset=False`. Rotary
keys moved on by P are those of the other convention, exactly. With learned positions nothing can be moved, as the
text's own embeddings would change.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...nn import LayerShape, join_layers, split_layers
from ..errors import AdapterError, shown
from ..storage import load_json, naming
from .files import load_safetensors, load_torch, save_torch
from .record import PREFIX, Contents, Facts, Written, as_numbers, one_shape, rounded

CONFIG, WEIGHTS, SAFE_WEIGHTS, HEAD = (
    "adapter_config.json", "pytorch_adapter.bin", "adapter.safetensors", "head_config.json",
)  # fmt: skip
_PREFIX = ".self_prefix."
_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}
_HOW = {True: "flat", False: "made by an MLP"}
_MOST_TOKENS = 2**24
_CAUSAL = (
    "read as the adapters library computes it with attn_implementation='eager': with its default (sdpa) and no "
    "padding, version 1.3.0 takes prefix and text for one causal square, and the first tokens of a text see a part of "
    "the prefix alone"
)


class AdapterHub:
    """Folders of https://github.com/adapter-hub/adapters, 1.x."""

    name = "adapters"
    title = "the adapters library"
    kinds: tuple[str, ...] = (PREFIX,)
    is_folder = True
    position_offset = False
    needs_model = True
    layout = "folder: adapter_config.json, pytorch_adapter.bin: control_trans [P*L*2*Hkv*D], the text at position 0"
    lost = "manifest, heads; float32 rounding of the rotation, where the text began at position P"

    def read(self, source: Path, facts: Facts) -> Contents:
        """A prefix without gates, flat or made by an MLP."""
        shapes = _need(facts)
        warnings.warn(_CAUSAL, stacklevel=2)
        config = load_json(source / CONFIG) if source.is_dir() else None
        if config is None:
            raise AdapterError(f"{source}: expected a folder with {CONFIG}, as save_adapter writes it")
        with naming(source / CONFIG):
            _check_model(config, facts)
            inner, tokens, left_out = _check(config, len(shapes))
        if (source / HEAD).exists():
            warnings.warn(
                f"{source / HEAD}: a head was trained along, which is not read: the model's own is used", stacklevel=2
            )
        is_safe = not (source / WEIGHTS).exists() and (source / SAFE_WEIGHTS).exists()
        file = source / (SAFE_WEIGHTS if is_safe else WEIGHTS)
        weights = load_safetensors(file) if is_safe else load_torch(file)
        with naming(file):
            tensors = _own_tensors(weights, str(config.get("name")))
            layers = [layer for layer in range(len(shapes)) if layer not in left_out]
            chosen = [shapes[layer] for layer in layers]
            width = sum(shape.width for shape in chosen)
            flat = _flat(tensors, tokens, width) if inner["flat"] else _made_by_mlp(tensors, inner, tokens, width)
            if unknown := sorted(tensors):
                raise AdapterError(f"{shown(unknown[0])}: not known of a prefix that is {_HOW[inner['flat']]}")
            pairs = [(key.contiguous(), value.contiguous()) for key, value in split_layers(flat, chosen)]
        return Contents(prefix=pairs, layers=layers if left_out else None, position_offset=False)

    def write(self, contents: Contents, facts: Facts, dtype: torch.dtype) -> Written:
        """A flat prefix."""
        shapes = _need(facts)
        assert contents.prefix is not None
        prefix = contents.prefix
        shape = one_shape(prefix, self.title)
        assert facts.num_attention_heads is not None
        assert facts.hidden_size is not None
        if shape.key_dim * facts.num_attention_heads != facts.hidden_size:
            raise AdapterError(
                f"{self.title} takes heads to be hidden size / heads wide, {facts.hidden_size} / "
                f"{facts.num_attention_heads}, but those of this model are {shape.key_dim} wide"
            )
        layers = contents.layers if contents.layers is not None else list(range(len(shapes)))
        flat = join_layers(prefix)
        inner = {
            "architecture": "prefix_tuning",
            "bottleneck_size": 512,
            "cross_prefix": True,
            "dropout": 0.0,
            "encoder_prefix": True,
            "flat": True,
            "init_weights_seed": None,
            "leave_out": [layer for layer in range(len(shapes)) if layer not in layers],
            "non_linearity": "tanh",
            "prefix_length": contents.num_virtual_tokens,
            "shared_gating": True,
            "use_gating": False,
        }
        config = {
            "config": inner,
            "hidden_size": facts.hidden_size,
            "model_class": facts.class_name,
            "model_name": facts.name or "",
            "model_type": facts.model_type,
            "name": "prefixcore",
            "version": "adapters.1.3.0",
        }
        name = "model.prefix_tuning.prefix_tunings.prefixcore.self_prefix.control_trans"
        state = {name: rounded("control_trans", flat.reshape(-1), dtype).clone()}
        return Written({CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(), WEIGHTS: save_torch(state)})


def _need(facts: Facts) -> list[LayerShape]:
    if facts.shapes is None:
        raise AdapterError(
            "the adapters library's files do not say enough of layers and heads: give the model (--model)"
        )
    return list(facts.shapes)


def _check_model(config: dict[str, Any], facts: Facts) -> None:
    """Raises AdapterError if the file is for a model of another type; warns if it is for one of another name."""
    kind, name = config.get("model_type"), config.get("model_name")
    if isinstance(kind, str) and facts.model_type and kind != facts.model_type:
        raise AdapterError(f"model_type: it is for a model of type {shown(kind)}, and this one is {facts.model_type!r}")
    if isinstance(name, str) and name and facts.name and Path(name).name != Path(facts.name).name:
        warnings.warn(
            f"the files say that they are for {shown(name)} and know none of that model's weights; the adapter is "
            f"written as one for {shown(facts.name)}, whose shapes fit",
            stacklevel=3,
        )


def _check(config: dict[str, Any], num_layers: int) -> tuple[dict[str, Any], int, list[int]]:
    """What the configuration says of a prefix, P, and the layers that have none."""
    inner = config.get("config")
    if not isinstance(inner, dict) or inner.get("architecture") != "prefix_tuning":
        got = inner.get("architecture") if isinstance(inner, dict) else inner
        raise AdapterError(f"config.architecture: expected 'prefix_tuning', got {shown(got)}")
    if inner.get("use_gating"):
        raise AdapterError(
            "config.use_gating: its gates make the prefix depend on the text, which no plain prefix does"
        )
    tokens, left_out = inner.get("prefix_length"), inner.get("leave_out") or []
    if type(tokens) is not int or not 1 <= tokens <= _MOST_TOKENS:
        raise AdapterError(f"config.prefix_length: expected an integer from 1, got {shown(tokens)}")
    if not isinstance(left_out, list) or not all(type(i) is int and 0 <= i < num_layers for i in left_out):
        raise AdapterError(f"config.leave_out: expected layers of 0 to {num_layers - 1}, got {shown(left_out)}")
    if len(set(left_out)) == num_layers:
        raise AdapterError("config.leave_out: leaves no layer")
    if type(inner.get("flat")) is not bool:
        raise AdapterError(f"config.flat: expected true or false, got {shown(inner.get('flat'))}")
    return inner, tokens, left_out


def _own_tensors(weights: Any, name: str) -> dict[str, Tensor]:
    """The tensors of the prefix by their last names; the file names them once and once more for each layer."""
    if not isinstance(weights, dict):
        raise AdapterError(f"expected a dictionary of tensors, got {type(weights).__name__}")
    found: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise AdapterError(f"{shown(key)}: expected a tensor by its name")
        if f".prefix_tunings.{name}." not in key:
            raise AdapterError(f"{shown(key)}: not of the prefix {shown(name)}")
        if _PREFIX not in key:
            raise AdapterError(
                f"{shown(key)}: a prefix of an encoder, or of cross-attention; a decoder's is self_prefix"
            )
        last = key.rpartition(_PREFIX)[2]
        numbers = as_numbers(shown(key), tensor, [None] * tensor.dim())
        if last in found and not (found[last].shape == numbers.shape and torch.equal(found[last], numbers)):
            raise AdapterError(f"{shown(key)}: not the same in every layer, which share one prefix")
        found[last] = numbers
    return found


def _take(tensors: dict[str, Tensor], name: str, shape: list[int | None]) -> Tensor:
    """The tensor of this name, which leaves `tensors`."""
    if name not in tensors:
        raise AdapterError(f"{name}: missing; there is {shown(sorted(tensors))}")
    return as_numbers(name, tensors.pop(name), shape)


def _flat(tensors: dict[str, Tensor], tokens: int, width: int) -> Tensor:
    return _take(tensors, "control_trans", [tokens * width]).view(tokens, width)


def _made_by_mlp(tensors: dict[str, Tensor], inner: dict[str, Any], tokens: int, width: int) -> Tensor:
    activation = _ACTIVATIONS.get(str(inner.get("non_linearity")).lower())
    if activation is None:
        raise AdapterError(
            f"config.non_linearity: expected one of {', '.join(_ACTIVATIONS)}, got {shown(inner.get('non_linearity'))}"
        )
    table = _take(tensors, "wte.weight", [tokens, None])
    first = _take(tensors, "control_trans.0.weight", [None, table.shape[1]])
    hidden = nn.functional.linear(table, first, _take(tensors, "control_trans.0.bias", [first.shape[0]]))
    last = _take(tensors, "control_trans.2.weight", [width, first.shape[0]])
    return nn.functional.linear(activation(hidden), last, _take(tensors, "control_trans.2.bias", [width]))
