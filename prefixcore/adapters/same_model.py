"""Whether a model is the one that an adapter was trained for, by the fingerprints of both."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import AdapterError, shown
from .fingerprint import COUNTS, FACTS, ROUNDED, listed
from .samples import Sample, compare_samples


@dataclass(frozen=True)
class Comparison:
    """What comparing the fingerprints of two models has found.

    Attributes:
        differences: each in words, the field's name first; none: the two are one model, or no difference was seen.
        unchecked: in words, that no weights could be compared, and why; or empty.
    """

    differences: list[str] = field(default_factory=list)
    unchecked: str = ""


def compare_fingerprints(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> None:
    """Checks that an adapter trained for `expected` may be used with `actual`.

    The same model in another form passes: another dtype, quantised or not, its files cut in another way, tokens added
    to its vocabulary, its head tied or not. What only one of the two could read is not compared.

    Warns:
        UserWarning: the architecture is right, and no weights could be compared.

    Raises:
        AdapterError: naming what differs.

    Examples:
        >>> from prefixcore.adapters import AdapterError, compare_fingerprints, fingerprint
        >>> compare_fingerprints(fingerprint(model), fingerprint(model))
        >>> try:
        ...     compare_fingerprints({**fingerprint(model), "num_hidden_layers": 12}, fingerprint(model))
        ... except AdapterError as error:
        ...     print(str(error).partition(";")[0])
        base_model.num_hidden_layers: the adapter was trained for 12, this model has 2
    """
    found = find_differences(expected, actual)
    if found.differences:
        raise AdapterError("; ".join([*found.differences, _advice(expected, actual)]))
    if found.unchecked:
        warnings.warn(found.unchecked, stacklevel=2)


def find_differences(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> Comparison:
    """Everything in which the model of `actual` is not the one of `expected`."""
    unread = [*expected.get("left_out", ()), *actual.get("left_out", ())]

    def differs(name: str) -> bool:
        return expected[name] != actual.get(name) and not any(line.startswith(f"{name}:") for line in unread)

    facts = [_difference(name, expected, actual) for name in FACTS if name not in COUNTS and differs(name)]
    counts = [_difference(name, expected, actual) for name in COUNTS if differs(name)]
    trained_for, found = expected.get("weights") or {}, actual.get("weights") or {}
    common = [dtype for dtype in trained_for if dtype in found]
    same_digests = bool(common) and all(trained_for[dtype] == found[dtype] for dtype in common)
    if same_digests and not counts:
        return Comparison(facts)
    one, other = _samples(expected), _samples(actual)
    if not one or not other:
        return _compare_digests(facts, counts, trained_for, common, same_digests, unread, is_read=bool(other))

    tables = {*expected.get("tables", ()), *actual.get("tables", ())}
    conflicts = [n for n in sorted(one.keys() & other.keys()) if not _fits(one[n], other[n], n in tables)]
    agreement = compare_samples(one, other)
    if conflicts:
        shapes = f"{conflicts[0]} is {list(one[conflicts[0]].shape)} there and {list(other[conflicts[0]].shape)} here"
        differences = counts[-1:] or ["base_model.samples: weights have other shapes"]
        return Comparison([*facts, f"{differences[0]} ({shapes})"])
    if agreement.reason:
        return Comparison([*facts, *counts, _other_weights(agreement.reason, agreement.different)])
    if not agreement.compared:
        why = f"; left out: {'; '.join(unread)}" if unread else ""
        nothing = f"base_model.weights: the architecture is compared, but no weights could be{why}"
        return Comparison([*facts, *counts], "" if facts or counts else nothing)
    bodies = expected.get("body_parameters"), actual.get("body_parameters")
    counted = not any(line.startswith("num_parameters:") for line in unread)
    if counts and bodies[0] != bodies[1] and counted:
        return Comparison([*facts, *counts])
    if common and not same_digests and not counts and _same_forms(one, other):
        return Comparison([*facts, _other_weights("their digests differ", [])])
    return Comparison(facts)


def _compare_digests(
    facts: list[str],
    counts: list[str],
    trained_for: Mapping[str, str],
    common: list[str],
    same: bool,
    unread: list[str],
    *,
    is_read: bool,
) -> Comparison:
    """The comparison where one of the two has no samples, as what version 0.1.0 wrote, or as none could be read.

    `is_read`: the weights of the model that is here could be.
    """
    if same:  # digests of every name, shape and sampled number: packed weights were counted in another way
        return Comparison(facts)
    if facts or counts:
        return Comparison([*facts, *counts])
    if common:
        return Comparison([_other_weights("their digests differ", [])])
    if trained_for and is_read:
        return Comparison(
            [
                "base_model.weights: the adapter knows its model by digests of weights rounded to "
                f"{' or '.join(trained_for)} alone, and this model's cannot be rounded so; load it in float32 or in "
                f"{next(iter(trained_for))}"
            ]
        )
    why = f"; left out: {'; '.join(unread)}" if unread else ""
    return Comparison([], f"base_model.weights: the architecture is compared, but no weights could be{why}")


def _difference(name: str, expected: Mapping[str, Any], actual: Mapping[str, Any]) -> str:
    trained_for, here = shown(expected[name]), shown(actual.get(name))
    return f"base_model.{name}: the adapter was trained for {trained_for}, this model has {here}"


def _other_weights(reason: str, names: list[str]) -> str:
    where = f": {listed(names)}" if names else ""
    return (
        "base_model.weights: the model has the right architecture but other weights than the one the adapter was "
        f"trained for ({reason}{where})"
    )


def _advice(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> str:
    """How to mend it; a model is not recommended to someone who has loaded one of this name."""
    name = expected.get("name_or_path")
    which = f"it was trained for {shown(name)}, " if name and name != actual.get("name_or_path") else ""
    return f"{which}strict=False (--force) loads it all the same"


def _samples(fingerprint: Mapping[str, Any]) -> dict[str, Sample]:
    parsed = {name: Sample.parse(text) for name, text in (fingerprint.get("samples") or {}).items()}
    return {name: sample for name, sample in parsed.items() if sample is not None}


def _fits(one: Sample, other: Sample, is_table: bool) -> bool:
    """Whether two shapes are one; a table of tokens may have fewer rows or more."""
    if one.shape == other.shape or {one.form, other.form} - {"quantized", *ROUNDED}:
        return True
    return is_table and len(one.shape) == len(other.shape) and one.shape[1:] == other.shape[1:]


def _same_forms(one: Mapping[str, Sample], other: Mapping[str, Sample]) -> bool:
    """Whether the digests of the two are of the same weights, none of them quantised in one alone."""
    if one.keys() != other.keys():
        return False
    return all((one[name].form in ROUNDED) == (other[name].form in ROUNDED) for name in one)
