"""Say what an adapter is: method, shapes, base model, how it was trained. Needs no model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import ADAPTER, OK, adapter_folder, adapter_name
from .failures import user_errors
from .output import check_open, results, table, to_json

if TYPE_CHECKING:
    from ..adapters import Adapter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prefixcore inspect`."""
    parser.add_argument("adapter", type=adapter_name, metavar="ADAPTER", help=ADAPTER)
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Read the whole adapter, with every check that loading it makes, and print what is known."""
    check_open()
    folder = adapter_folder(arguments.adapter)

    from ..adapters import AdapterError, read_adapter, read_record

    with user_errors(AdapterError), user_errors(RecursionError, what=f"{folder}: nested too deep"):
        facts = describe(folder, read_adapter(folder), read_record(folder))
        text = to_json(facts, indent=2) if arguments.json else table(rows(facts))
    results(text)
    return OK


def describe(folder: Path, adapter: Adapter, record: dict[str, Any]) -> dict[str, Any]:
    """What is known about an adapter, as JSON can hold it."""
    from torch import Tensor

    from ..adapters.module import tensors_of
    from ..adapters.provenance import FIELDS

    tensors, manifest = adapter.tensors, adapter.manifest
    values, hidden_size = tensors_of(tensors), tensors.shape[1] if isinstance(tensors, Tensor) else None
    return {
        "folder": str(folder),
        "written_by": "PEFT" if manifest is None else f"prefixcore {manifest.libraries.get('prefixcore')}",
        "loads_in_peft": adapter.peft_config is not None,
        "method": adapter.config.method,
        "task": manifest.task if manifest else None,
        "digest": adapter.digest,
        **{name: getattr(manifest, name) if manifest else None for name in FIELDS if name != "training"},
        "settings": manifest.training if manifest else None,
        "num_virtual_tokens": adapter.config.num_virtual_tokens,
        "numbers": sum(tensor.numel() for tensor in values),
        "layers": adapter.layers or None,
        "layer_shapes": [[s.num_kv_heads, s.key_dim, s.value_dim] for s in adapter.layer_shapes] or None,
        "hidden_size": hidden_size,
        "norm": sum(float(tensor.double().square().sum()) for tensor in values) ** 0.5,
        "config": adapter.config.to_dict(),
        "can_be_resumed_exactly": adapter.training_state is not None
        or getattr(adapter.config, "reparameterization", "mlp") == "none",
        "base_model": manifest.base_model if manifest else None,
        "tokenizer": manifest.tokenizer if manifest else None,
        "libraries": manifest.libraries if manifest else None,
        "peft_config": adapter.peft_config,
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()},
        "training": record or None,
    }


def rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts that a person wants to see first, a line each."""
    config = {name: value for name, value in facts["config"].items() if value not in (None, False)}
    start = config["init"] + (f": {config['init_text']!r}" if "init_text" in config else "")
    found = [
        ("adapter", facts["folder"]),
        ("method", facts["method"] + (f", for {facts['task']}" if facts["task"] else "")),
        ("virtual tokens", f"{facts['num_virtual_tokens']}, {facts['numbers']:,} numbers in all"),
        ("where", placement(facts)),
        ("start", start),
        ("reparameterization", str(config.get("reparameterization") or config.get("encoder_reparameterization_type"))),
        (
            "written by",
            facts["written_by"] + (", PEFT can load it" if facts["loads_in_peft"] else ", PEFT cannot hold it"),
        ),
    ]
    if facts["base_model"]:
        found.append(("base model", base_model(facts["base_model"])))
        found += [("forced", text) for text in facts["base_model"].get("forced", [])]
        found += [("not known of it", text) for text in facts["base_model"].get("left_out", [])]
    elif facts["peft_config"]:
        found.append(("base model", str(facts["peft_config"].get("base_model_name_or_path"))))
    found += provenance(facts)
    if facts["libraries"]:
        found.append(("libraries", ", ".join(f"{name} {version}" for name, version in facts["libraries"].items())))
    found += trained(facts["training"] or {})
    sizes = ", ".join(f"{name} ({size:,} bytes)" for name, size in facts["files"].items())
    return [*found, ("files", sizes)]


def provenance(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Where the adapter comes from: what its manifest says, and that it says nothing."""
    found = [("digest", str(facts["digest"]))]
    if not facts["libraries"]:  # PEFT wrote it
        return found
    found += [(name.replace("_", " "), facts[name] or "not said") for name in ("date", "license", "intended_use")]
    found.append(("data", examples(facts["data"])))
    found.append(("metrics", pairs(facts["metrics"])))
    if facts["split"]:
        found.append(("split", examples(facts["split"])))
    if facts["settings"]:
        settings = facts["settings"] if facts["seed"] is None else {"seed": facts["seed"], **facts["settings"]}
        found.append(("settings", pairs(settings)))
    for parent in facts["derived_from"] or []:
        found.append(("derived from", f"{parent['digest']} of {parent['date'] or 'no known date'}"))
    return found


def examples(described: dict[str, Any] | None) -> str:
    """What is said of some examples, their digest last."""
    if described is None:
        return "not said"
    rest = {name: value for name, value in described.items() if name != "sha256"}
    digest = f"SHA-256 {described['sha256']}" if "sha256" in described else ""
    return ", ".join(part for part in (pairs(rest) if rest else "", digest) if part)


def pairs(values: dict[str, Any] | None) -> str:
    """Names and values, one after another."""
    if not values:
        return "not said"
    texts = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def placement(facts: dict[str, Any]) -> str:
    """Which layers or embeddings the virtual tokens stand in."""
    if facts["layers"] is None:
        where = "before the input"
        if facts["config"].get("virtual_token_ids") is not None:
            where = "in the text, in place of virtual_token_ids"
        return f"embeddings {where}, hidden size {facts['hidden_size']}"
    shapes = {tuple(shape) for shape in facts["layer_shapes"]}
    if len(shapes) == 1:
        heads, key, value = next(iter(shapes))
        size = f"{heads} key/value heads of {key}" + (f" and {value}" if value != key else "")
    else:
        size = "heads of several sizes"
    at_zero = facts["config"].get("position_offset") is False
    text = "; the text behind it begins at position 0" if at_zero else ""
    return f"{len(facts['layers'])} layers ({ranges(facts['layers'])}), {size}{text}"


def ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def base_model(facts: dict[str, Any]) -> str:
    """Name, class and size of the base model, from its fingerprint."""
    size = f"{facts.get('class')}, {facts.get('num_parameters', 0):,} parameters"
    name = facts.get("name_or_path")
    return f"{name} ({size})" if name else size


def trained(record: dict[str, Any]) -> list[tuple[str, str]]:
    """How the adapter was trained and how it did, from its record."""
    found = []
    losses = record.get("train_loss") or []
    if losses:
        how = "stopped early, " if record.get("interrupted") else ""
        found.append(("training", f"{how}{len(losses)} steps on {record.get('data')}; curve in curve.png"))
    for name, result in (record.get("held_out") or {}).items():
        text = f"loss {result['loss']:.3f}, exact match {result['exact_match']:.1%} of {result['examples']}"
        found.append((f"held out, {name}", text))
    return found
