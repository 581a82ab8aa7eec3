"""Which base model an adapter belongs to: facts of its architecture and a digest of sampled weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import AdapterError, shown

SAMPLES = 32
"""How many numbers of each weight are sampled, evenly from the first to the last."""

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

# A digest in this dtype exists for weights in any of these. float16 and bfloat16 cannot be rounded to each other and
# still agree, so each has a digest of its own.
_DIGESTS = {
    "bfloat16": (torch.float64, torch.float32, torch.bfloat16),
    "float16": (torch.float64, torch.float32, torch.float16),
}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What identifies a base model: JSON-able, well under a second for a few hundred million parameters.

    Args:
        model: a transformers model, or any module. A submodule `prefixcore` is left out.

    Returns:
        `name_or_path` (for people, never compared), `class`, the dimensions its config knows, `num_parameters`,
        and `weights`: SHA-256 digests of evenly sampled weights rounded to "bfloat16" and to "float16", as far
        as the model's dtypes allow. The same weights loaded in float32 or in bfloat16 share a digest.

    Raises:
        AdapterError: a weight has no data (it is on the meta device).

    Examples:
        >>> from prefixcore.adapters import fingerprint
        >>> fingerprint(model)["num_hidden_layers"]
        2
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    weights = list(_base_weights(model))
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return {
        "name_or_path": str(getattr(model, "name_or_path", None) or "") or None,
        "class": type(model).__name__,
        **{name: getattr(config, name, None) for name in _CONFIG_FACTS},
        "num_parameters": sum(weight.numel() for _, weight in weights),
        "weights": _digests(weights),
    }


def check_fingerprint(value: Mapping[str, Any]) -> None:
    """Raises AdapterError, naming the field, unless `value` is one that `fingerprint` could have returned.

    Without this, an adapter whose fingerprint was cut short would fit every model.
    """
    for field in (*FACTS, "weights"):
        if field not in value:
            raise AdapterError(f"base_model.{field}: missing")
    weights = value["weights"]
    if not isinstance(weights, dict) or not all(isinstance(digest, str) for digest in weights.values()):
        raise AdapterError("base_model.weights: expected digests by dtype")
    if type(value["num_parameters"]) is not int:
        raise AdapterError(f"base_model.num_parameters: expected an integer, got {shown(value['num_parameters'])}")
    if not isinstance(value.get("name_or_path"), (str, type(None))):
        raise AdapterError(f"base_model.name_or_path: expected a text, got {shown(value['name_or_path'])}")


def compare_fingerprints(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> None:
    """Checks that an adapter trained for `expected` may be used with `actual`.

    Raises:
        AdapterError: naming the first field that differs.

    Examples:
        >>> from prefixcore.adapters import AdapterError, compare_fingerprints, fingerprint
        >>> compare_fingerprints(fingerprint(model), fingerprint(model))
        >>> try:
        ...     compare_fingerprints({**fingerprint(model), "num_hidden_layers": 12}, fingerprint(model))
        ... except AdapterError as error:
        ...     print(str(error).partition(";")[0])
        base_model.num_hidden_layers: the adapter was trained for 12, this model has 2
    """
    for field in FACTS:
        if expected[field] != actual.get(field):
            raise AdapterError(
                f"base_model.{field}: the adapter was trained for {shown(expected[field])}, this model has "
                f"{shown(actual.get(field))}; load the model it was trained for ({_name(expected)})"
            )
    trained_for, found = expected.get("weights") or {}, actual.get("weights") or {}
    common = [dtype for dtype in trained_for if dtype in found]
    if trained_for and not common:
        raise AdapterError(
            f"base_model.weights: the adapter knows its model by weights rounded to {' or '.join(trained_for)}, but "
            f"this model was loaded in another dtype; load it in float32 or in {next(iter(trained_for))}"
        )
    for dtype in common:
        if trained_for[dtype] != found[dtype]:
            raise AdapterError(
                "base_model.weights: the model has the right architecture but other weights than the one the "
                f"adapter was trained for ({_name(expected)})"
            )


def _name(fingerprint: Mapping[str, Any]) -> str:
    name = fingerprint.get("name_or_path")
    return shown(name) if isinstance(name, str) and name else "its name is not known"


def _base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, weight in model.named_parameters():
        if name.split(".", 1)[0] == "prefixcore":
            continue
        if weight.is_meta:
            raise AdapterError(f"{name} is on the meta device: load the model's weights before taking a fingerprint")
        yield name, weight.detach()


def _digests(weights: list[tuple[str, Tensor]]) -> dict[str, str]:
    dtypes = {weight.dtype for _, weight in weights if weight.is_floating_point()}
    names = [name for name, allowed in _DIGESTS.items() if dtypes <= set(allowed)]
    hashes = {name: hashlib.sha256() for name in names}
    for name, weight in weights:
        sample = _sample(weight)
        for dtype, digest in hashes.items():
            digest.update(f"{name} {list(weight.shape)}".encode())
            rounded = sample.to(getattr(torch, dtype)) if sample.is_floating_point() else sample
            digest.update(rounded.contiguous().view(torch.uint8).numpy().tobytes())
    return {name: digest.hexdigest() for name, digest in hashes.items()}


def _sample(weight: Tensor) -> Tensor:
    """Up to SAMPLES numbers of a weight, on the CPU."""
    count = min(SAMPLES, weight.numel())
    indices = torch.arange(count, device=weight.device) * (weight.numel() - 1) // max(count - 1, 1)
    return weight.reshape(-1)[indices].cpu()
