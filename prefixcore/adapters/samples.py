"""Sampled numbers of a model's weights, kept in the manifest as text, and whether two samples are of the same weights.

Where in a weight the samples lie depends on its name alone as far as it can, so that a table to which rows were added,
or a model whose head was untied, still has most samples in common with what it was.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

import torch

from .weights import Unreadable, Weight, is_quantized, numbers_at

MOST_WEIGHTS = 512
"""Weights that are sampled: of a larger model those whose names have the smallest digests."""

MOST_QUANTIZED = 32
"""Quantised weights that are sampled: each is made whole to read a few numbers of it."""

LARGEST_QUANTIZED = 2**28
_NUMBERS = 2048
_FEWEST, _MOST = 4, 32
"""How many numbers: about `_NUMBERS` in all, between these of each weight."""

_ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Relative error of rounding to nearest; twice the distance at which a number is rounded."""

_SMALLEST = {"float16": 2.0**-24}
"""Absolute error of rounding, where numbers near zero lose digits."""

_EQUAL = 0.8
"""Share of numbers that must round to the same in the coarser of two dtypes. Of weights that were rounded to float16
and then to bfloat16 one in sixteen does not; of weights that were trained on by a relative 1e-2, most do not."""

_QUANTIZED_MEDIAN, _QUANTIZED_MOST = 0.35, 0.9
"""Relative error (root of the sum of squares) of quantised weights: the median of all, and of each. Four bits make
about 0.1; unrelated weights make 1.4."""

_LINE = re.compile(r"([a-z0-9_]{1,32}) \[([0-9, ]{0,200})\]((?: [0-9]{1,19}:[-+.e0-9]{1,32})*)")


@dataclass(frozen=True)
class Sample:
    """Some numbers of one weight.

    Attributes:
        form: the dtype that they were read from, or "quantized".
        shape: the weight's.
        numbers: by their index in the flattened weight.
    """

    form: str
    shape: tuple[int, ...]
    numbers: dict[int, float]

    def __str__(self) -> str:
        numbers = "".join(f" {index}:{number:.9g}" for index, number in self.numbers.items())
        return f"{self.form} [{', '.join(map(str, self.shape))}]{numbers}"

    @classmethod
    def parse(cls, text: object) -> Sample | None:
        """The inverse of `str`; None: it is no such text."""
        match = _LINE.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            return None
        try:
            shape = tuple(int(size) for size in match[2].split(", ")) if match[2] else ()
            pairs = (pair.split(":") for pair in match[3].split())
            numbers = {int(index): float(number) for index, number in pairs}
        except ValueError:
            return None
        return cls(match[1], shape, numbers) if all(map(math.isfinite, numbers.values())) else None


def take_samples(weights: Iterable[Weight]) -> tuple[dict[str, Sample], dict[str, list[str]]]:
    """Samples of the weights by name; and the names of those that cannot be read, by reason."""
    chosen = sorted(weights, key=lambda weight: hashlib.sha256(weight.name.encode()).digest())[:MOST_WEIGHTS]
    count = min(_MOST, max(_FEWEST, _NUMBERS // max(1, len(chosen))))
    samples: dict[str, Sample] = {}
    unreadable: dict[str, list[str]] = {}
    quantized = 0
    for weight in chosen:
        size = math.prod(weight.shape)
        if is_quantized(weight):
            if quantized == MOST_QUANTIZED or size > LARGEST_QUANTIZED:
                continue
            quantized += 1
        try:
            form, numbers = numbers_at(weight, _indices(weight.name, size, count))
        except Unreadable as error:
            unreadable.setdefault(str(error), []).append(weight.name)
            continue
        finite = {index: number for index, number in numbers.items() if math.isfinite(number)}
        samples[weight.name] = Sample(form, weight.shape, finite)
    return dict(sorted(samples.items())), unreadable


@lru_cache(maxsize=2 * MOST_WEIGHTS)
def _indices(name: str, size: int, count: int) -> tuple[int, ...]:
    """Up to `count` indices below `size`: half of them spread over all magnitudes, half over the largest power of two
    that fits, so that a few rows more or fewer change few of them."""
    if size <= count:
        return tuple(range(size))
    widths, places = _random(name)
    power = 1 << (size.bit_length() - 1)
    even = [place % power for place in places[: count // 2]]
    spread = [index for index in widths if index < size][: count - count // 2]
    return tuple(sorted({*even, *spread}))


def _random(name: str) -> tuple[list[int], list[int]]:
    """Numbers whose logarithm is uniform, and uniform ones; by the name alone."""
    stream = hashlib.shake_128(f"prefixcore samples {name}".encode()).digest(8 * 256)
    words = [int.from_bytes(stream[at : at + 8], "little") for at in range(0, len(stream), 8)]
    widths = [(word >> 8) % (1 << (word % 44)) for word in words[:224]]
    return list(dict.fromkeys(widths)), words[224:]


@dataclass(frozen=True)
class Agreement:
    """What comparing two models' samples has found.

    Attributes:
        compared: how many numbers.
        different: the names of weights that are not the same.
        reason: in words, what differs; empty where nothing does.
    """

    compared: int
    different: list[str]
    reason: str


def compare_samples(expected: Mapping[str, Sample], actual: Mapping[str, Sample]) -> Agreement:
    """Compares the numbers that both have, each pair within what their two forms have rounded away."""
    compared, equal, rounded = 0, 0, 0
    errors: dict[str, float] = {}
    different = []
    for name in expected.keys() & actual.keys():
        one, other = expected[name], actual[name]
        common = one.numbers.keys() & other.numbers.keys()
        pairs = [(one.numbers[index], other.numbers[index]) for index in common]
        forms = {one.form, other.form}
        if not pairs or not (len(forms) == 1 or forms <= {"quantized", *_ROUNDING}):
            continue
        compared += len(pairs)
        if "quantized" in forms:
            errors[name] = _relative_error(pairs)
        elif forms <= _ROUNDING.keys():
            if not all(_is_near(a, b, one.form, other.form) for a, b in pairs):
                different.append(name)
            rounded += len(pairs)
            equal += sum(_coarse(a, forms) == _coarse(b, forms) for a, b in pairs)
        elif any(a != b for a, b in pairs):
            different.append(name)
    reason = ""
    if different:
        reason = "numbers differ by more than rounding"
    elif rounded and equal < _EQUAL * rounded:
        reason = f"{rounded - equal} of {rounded} sampled numbers differ by a little"
        different = sorted(expected.keys() & actual.keys())
    elif errors and (median(errors.values()) > _QUANTIZED_MEDIAN or max(errors.values()) > _QUANTIZED_MOST):
        reason = "numbers differ by more than quantisation"
        different = sorted(errors, key=lambda name: -errors[name])
    return Agreement(compared, sorted(different), reason)


def _is_near(a: float, b: float, form: str, other: str) -> bool:
    relative, absolute = _ROUNDING[form] + _ROUNDING[other], _SMALLEST.get(form, 0.0) + _SMALLEST.get(other, 0.0)
    return abs(a - b) <= 1.001 * relative * max(abs(a), abs(b)) + absolute


def _coarse(number: float, forms: set[str]) -> float:
    """The number rounded to the coarsest of these dtypes."""
    form = max(forms, key=lambda name: _ROUNDING[name])
    return float(torch.tensor(number, dtype=torch.float64).to(getattr(torch, form)))


def _relative_error(pairs: list[tuple[float, float]]) -> float:
    squares = max(sum(a * a for a, _ in pairs), sum(b * b for _, b in pairs))
    return math.sqrt(sum((a - b) ** 2 for a, b in pairs) / squares) if squares else 0.0
