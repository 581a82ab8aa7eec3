"""Where an adapter comes from: the fields of the manifest that an organisation asks for.

Who trained it says them, `prefixcore train` for itself: the data by its digest, held-out metrics with their split, the
settings, the seed; and from the author the licence and the intended use.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from .digest import is_sha256
from .errors import AdapterError, shown
from .record import is_number

if TYPE_CHECKING:
    from .manifest import Manifest

AUTHOR_FIELDS = ("task", "license", "intended_use")
"""What its author says of it, whatever its values are."""

MEASURED_FIELDS = ("data", "metrics", "split", "training", "seed")
"""What is true of one set of values, and of no other."""

FIELDS = ("date", "license", "intended_use", *MEASURED_FIELDS, "derived_from")

_MOST_NUMBERS = 2**63


def now() -> str:
    """The time in UTC, as ISO 8601 writes it, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def check_provenance(values: Mapping[str, Any]) -> None:
    """Raises AdapterError, naming the field, unless these fields of a manifest are what they stand for.

    Args:
        values: a manifest's fields; one that is missing or None says nothing.
    """
    for name in ("license", "intended_use"):
        _check_text(name, values.get(name))
    _check_date("date", values.get("date"))
    _check_data("data", values.get("data"))
    _check_metrics(values.get("metrics"), values.get("split"))
    _check_settings(values.get("training"))
    seed = values.get("seed")
    if seed is not None and (type(seed) is not int or not 0 <= seed < _MOST_NUMBERS):
        raise AdapterError(f"seed: expected an integer from 0, got {shown(seed)}")
    _check_ancestors(values.get("derived_from"))


def is_of_text_alone(manifest: Manifest) -> bool:
    """Whether the record says that an adapter was baked from a text, and that nothing was trained before or after.

    What `bake` writes of the way it went stands in `training`, each name with `baked_` in front; a training writes its
    own settings there, and leaves `baked_method` out.
    """
    made = manifest.training or {}
    return (
        made.get("baked_method") == "text"
        and is_sha256(made.get("baked_text_sha256"))
        and all(name.startswith("baked_") for name in made)
        and not manifest.derived_from
    )


def inherited(manifest: Manifest, source: Manifest | None, *, same_values: bool) -> Manifest:
    """`manifest` with what still holds of the adapter that its values were loaded from, where it says nothing itself.

    What the author said holds on. What was measured holds of the same values on the same model alone: of others, the
    adapter that they come from is named, with the digest of its data, and none of its metrics.

    Args:
        manifest: of the adapter that is written.
        source: of the adapter that was loaded; None: the values are new.
        same_values: whether both hold the same virtual tokens.
    """
    if source is None:
        return manifest
    kept = {name: getattr(source, name) for name in AUTHOR_FIELDS if getattr(manifest, name) is None}
    same = same_values and manifest.base_model.get("forced", []) == source.base_model.get("forced", [])
    if same:
        if all(getattr(manifest, name) is None for name in MEASURED_FIELDS):
            kept |= {name: getattr(source, name) for name in MEASURED_FIELDS}
        kept["derived_from"] = source.derived_from
    elif source.digest is not None:
        data = None if source.data is None else source.data["sha256"]
        parent = {"digest": source.digest, "date": source.date, "data": data}
        kept["derived_from"] = [*(source.derived_from or []), parent]
    return dataclasses.replace(manifest, **kept)


def _check_text(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise AdapterError(f"{name}: expected a text or None, got {shown(value)}")


def _check_date(name: str, value: Any) -> None:
    if value is None:
        return
    try:
        if not isinstance(value, str) or not value.endswith("Z"):
            raise ValueError
        datetime.strptime(value, "%Y-%m-%dT%H:%M:%SZ")
    except ValueError:
        raise AdapterError(f"{name}: expected a time like 2026-01-31T12:00:00Z, got {shown(value)}") from None


def _check_data(name: str, value: Any) -> None:
    """The digest of some examples, and what more is said of them."""
    if value is None:
        return
    if not isinstance(value, Mapping) or not is_sha256(value.get("sha256")):
        raise AdapterError(
            f"{name}.sha256: expected the SHA-256 of the data, as describe_data makes it, got {shown(value)}"
        )
    _check_facts(name, value)


def _check_metrics(metrics: Any, split: Any) -> None:
    if split is not None:
        if not isinstance(split, Mapping) or not split:
            raise AdapterError(f"split: expected an object that says which examples were held out, got {shown(split)}")
        if "sha256" in split:
            _check_data("split", split)
        _check_facts("split", split)
    if metrics is None:
        return
    if not isinstance(metrics, Mapping) or not metrics:
        raise AdapterError(f"metrics: expected numbers by their names, got {shown(metrics)}")
    for name, value in metrics.items():
        if not isinstance(name, str) or not _is_finite(value):
            raise AdapterError(f"metrics.{name}: expected a finite number, got {shown(value)}")
    if split is None:
        raise AdapterError(
            'split: missing; metrics say nothing without it: say what was held out, such as {"name": "test", '
            '"examples": 100}'
        )


def _check_settings(settings: Any) -> None:
    if settings is None:
        return
    if not isinstance(settings, Mapping):
        raise AdapterError(f"training: expected settings by their names, got {shown(settings)}")
    _check_facts("training", settings)


def _check_ancestors(ancestors: Any) -> None:
    if ancestors is None:
        return
    if not isinstance(ancestors, (list, tuple)):
        raise AdapterError(f"derived_from: expected a list of adapters, got {shown(ancestors)}")
    for index, parent in enumerate(ancestors):
        name = f"derived_from[{index}]"
        if not isinstance(parent, Mapping) or parent.keys() != {"digest", "date", "data"}:
            raise AdapterError(f"{name}: expected digest, date and data, got {shown(parent)}")
        if not is_sha256(parent["digest"]) or not (parent["data"] is None or is_sha256(parent["data"])):
            raise AdapterError(f"{name}: expected SHA-256 of 64 hex digits, got {shown(parent)}")
        _check_date(f"{name}.date", parent["date"])


def _check_facts(name: str, facts: Mapping[Any, Any]) -> None:
    """Raises AdapterError unless each is a text, a number, a truth value or None."""
    for key, value in facts.items():
        plain = value is None or isinstance(value, (str, bool)) or _is_finite(value)
        if not isinstance(key, str) or not plain:
            raise AdapterError(
                f"{name}.{key}: expected a text, a finite number, true, false or null, got {shown(value)}"
            )


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)
