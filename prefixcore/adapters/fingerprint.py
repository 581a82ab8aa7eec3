"""Which base model an adapter belongs to: facts of its architecture, and sampled weights.

A fingerprint never stands in the way of saving: what cannot be read is left out, and listed in it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .errors import AdapterError, shown
from .samples import Sample, take_samples
from .scaled_ids import reads_scaled_ids
from .weights import Unreadable, Weight, base_weights, is_quantized, is_repacked, is_sharded, materialized

SAMPLES = 32
"""How many numbers of each weight go into a digest, evenly from the first to the last."""

_CONFIG_FACTS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
FACTS = ("class", *_CONFIG_FACTS, "num_parameters")
"""The fields that decide whether a model has the right architecture."""

COUNTS = ("vocab_size", "num_parameters")
"""Facts that tokens added to the vocabulary, or a head that is tied or not, change, and nothing else with them."""

# A digest in this dtype exists for weights in any of these. float16 and bfloat16 cannot be rounded to each other and
# still agree, so each has a digest of its own.
_DIGESTS = {
    "bfloat16": (torch.float64, torch.float32, torch.bfloat16),
    "float16": (torch.float64, torch.float32, torch.float16),
}
ROUNDED = ("float64", "float32", "bfloat16", "float16")
_PACKED = ("qweight", "weight_packed", "W_q", "weight")
_MOST_NAMED = 3


def fingerprint(model: nn.Module, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """What identifies a base model: JSON-able, well under a second for a few hundred million parameters.

    Nothing of PEFT's that is in the model counts (a LoRA, for example), nor what `attach` has put there. No other
    process is waited for: of a sharded model, this process reads its own part.

    Args:
        model: a transformers model, or any module. A submodule `prefixcore` is left out.
        leave_out: names of modules that an adapter brings along, as in PEFT's `modules_to_save`.

    Returns:
        `name_or_path` (for people, never compared), `class`, the dimensions its config knows, `num_parameters`,
        `body_parameters` (without the `tables` that have a row for each token), `samples` of the weights, `left_out`
        (what could not be read, and why), and `weights`: SHA-256 digests of evenly sampled weights rounded to
        "bfloat16" and to "float16", as far as the model's dtypes allow.

    Examples:
        >>> from prefixcore.adapters import fingerprint
        >>> fingerprint(model)["num_hidden_layers"]
        2
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    weights = list(base_weights(model, leave_out))
    left_out: list[str] = []
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    facts = config_facts(config, left_out)
    tables = _tables(model)
    samples, unreadable = take_samples(weights)
    if packed := _packed(model):
        left_out.append(f"num_parameters: {listed(packed)} packed in a form of a quantiser's own")
    for reason, names in unreadable.items():
        left_out.append(f"{listed(names)}: {reason}")
    sizes = [(math.prod(weight.shape), id(weight.tensor) in tables) for weight in weights]
    decoder = {} if (count := _decoder_layers(model)) is None else {"decoder_layers": count}
    scaled = {"scales_ids": True} if reads_scaled_ids(model) else {}
    return {
        "name_or_path": str(getattr(model, "name_or_path", None) or "") or None,
        "class": _class_name(model),
        **facts,
        **decoder,
        **scaled,
        "num_parameters": sum(size for size, _ in sizes),
        "body_parameters": sum(size for size, is_table in sizes if not is_table),
        "tables": [weight.name for weight, (_, is_table) in zip(weights, sizes, strict=True) if is_table],
        "weights": _digests(weights, left_out),
        "samples": {name: str(sample) for name, sample in samples.items()},
        "left_out": left_out,
    }


def _decoder_layers(model: nn.Module) -> int | None:
    """Of an encoder-decoder that reads text, how many layers its decoder has; None: of all other models.

    Those with a learned bias of positions (T5) name them otherwise: PEFT's prefix, which has a place there, is another.
    """
    config: Any = getattr(model, "config", None)
    reads_text = getattr(model, "main_input_name", None) == "input_ids"
    count = getattr(config, "decoder_layers", None)
    return count if reads_text and getattr(config, "is_encoder_decoder", False) and type(count) is int else None


def check_fingerprint(value: Mapping[str, Any]) -> None:
    """Raises AdapterError, naming the field, unless `value` is one that `fingerprint` could have returned.

    Without this, an adapter whose fingerprint was cut short would fit every model. `body_parameters`,
    `tables`, `samples` and `left_out` may be missing, as in what version 0.1.0 wrote.
    """
    for name in (*FACTS, "weights"):
        if name not in value:
            raise AdapterError(f"base_model.{name}: missing")
    weights = value["weights"]
    if not isinstance(weights, dict) or not all(isinstance(digest, str) for digest in weights.values()):
        raise AdapterError("base_model.weights: expected digests by dtype")
    for name in ("num_parameters", "body_parameters"):
        if type(value.get(name, 0)) is not int:
            raise AdapterError(f"base_model.{name}: expected an integer, got {shown(value[name])}")
    if not isinstance(value.get("name_or_path"), (str, type(None))):
        raise AdapterError(f"base_model.name_or_path: expected a text, got {shown(value['name_or_path'])}")
    samples = value.get("samples", {})
    if not isinstance(samples, dict):
        raise AdapterError(f"base_model.samples: expected an object, got {type(samples).__name__}")
    for name, text in samples.items():
        if Sample.parse(text) is None:
            raise AdapterError(f"base_model.samples.{name}: expected a form, a shape and numbers, got {shown(text)}")
    for name in ("left_out", "forced", "tables"):
        lines = value.get(name, [])
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise AdapterError(f"base_model.{name}: expected a list of texts, got {shown(lines)}")


def _class_name(model: nn.Module) -> str:
    """The name of the model's class, also after `fully_shard` has made it a class of its own."""
    classes = type(model).__mro__
    return next(each for each in classes if not any(base.__name__ == "FSDPModule" for base in each.__mro__)).__name__


def config_facts(config: Any, left_out: list[str]) -> dict[str, Any]:
    """What the configuration of a text model states of its architecture; what it cannot say goes to `left_out`."""
    return {name: _fact(config, name, left_out) for name in _CONFIG_FACTS}


def _fact(config: Any, name: str, left_out: list[str]) -> Any:
    """A number or name of the configuration; None where it has none, or cannot say it in one."""
    try:
        value = getattr(config, name, None)
    except Exception as error:  # a configuration raises errors of its own, for example where layers differ
        left_out.append(f"{name}: the configuration has not one ({type(error).__name__})")
        return None
    if isinstance(value, (str, int, type(None))):
        return value
    left_out.append(f"{name}: a {type(value).__name__}")
    return None


def _packed(model: nn.Module) -> list[str]:
    """Modules whose weight a quantiser (GPTQ, AWQ, compressed-tensors, HQQ) keeps in a buffer or under another name."""
    return [
        name
        for name, module in model.named_modules()
        if module._parameters.get("weight") is None
        and any(packed in module._buffers or module._parameters.get(packed) is not None for packed in _PACKED)
    ]


def _tables(model: nn.Module) -> set[int]:
    """The ids of the parameters that have one row a token."""
    found = set()
    for name in ("get_input_embeddings", "get_output_embeddings"):
        method: Callable[[], Any] | None = getattr(model, name, None)
        try:
            module = method() if method is not None else None
        except (AttributeError, NotImplementedError):  # models without a table
            continue
        if isinstance(module, nn.Module):
            found |= {id(parameter) for parameter in module.parameters()}
    return found


def _digests(weights: list[Weight], left_out: list[str]) -> dict[str, str]:
    """A digest by dtype; none where a weight is in pieces, away, or of a kind that is not a plain tensor's."""
    if any(is_sharded(weight.tensor) for weight in weights):
        left_out.append("weights: sharded over processes, so no digest")
        return {}
    dtypes = {weight.tensor.dtype for weight in weights if weight.tensor.is_floating_point()}
    names = [name for name, allowed in _DIGESTS.items() if dtypes <= set(allowed)]
    hashes = {name: hashlib.sha256() for name in names}
    try:
        for weight in weights:
            if is_quantized(weight) and weight.tensor.is_floating_point():
                raise Unreadable(f"{weight.name} is quantised")
            if is_repacked(weight):
                raise Unreadable(f"{weight.name} is laid out for a CPU's kernel")
            sample = _sample(materialized(weight))
            for dtype, digest in hashes.items():
                digest.update(f"{weight.name} {list(weight.tensor.shape)}".encode())
                rounded = sample.to(getattr(torch, dtype)) if sample.is_floating_point() else sample
                digest.update(rounded.contiguous().view(torch.uint8).numpy().tobytes())
    except Exception as error:  # what a tensor subclass does not support is for its author to say
        left_out.append(f"weights: no digest ({error if isinstance(error, Unreadable) else type(error).__name__})")
        return {}
    return {name: digest.hexdigest() for name, digest in hashes.items()}


def _sample(weight: Tensor) -> Tensor:
    """Up to SAMPLES numbers of a weight, on the CPU."""
    return weight.reshape(-1)[_places(weight.numel()).to(weight.device)].cpu()


@lru_cache(maxsize=64)
def _places(size: int) -> Tensor:
    """Where the samples of a weight of `size` numbers lie; a model has few different sizes."""
    count = min(SAMPLES, size)
    with torch.inference_mode(False):  # it is kept, whatever mode and default device the first call has
        return torch.arange(count, device="cpu") * (size - 1) // max(count - 1, 1)


def listed(names: list[str]) -> str:
    """A few of these names, and how many there are."""
    few = ", ".join(names[:_MOST_NAMED])
    return few if len(names) <= _MOST_NAMED else f"{few} and {len(names) - _MOST_NAMED} more"
