"""How much a cache of activations takes, and whether there is room for it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

PLACES = ("memory", "disk")
"""Where activations can be kept."""

LEFT_FREE = 0.1
"""The share of what is free that is left to others."""

_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


@dataclass(frozen=True)
class Size:
    """What is to be kept.

    Attributes:
        tokens: of all distinct texts.
        width: numbers a token, E.
        dtype: of the numbers.
    """

    tokens: int
    width: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.tokens * self.width * self.dtype.itemsize

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{in_words(self.bytes)} ({self.tokens:,} tokens of {self.width:,} numbers in {name})"


def in_words(count: int) -> str:
    """A number of bytes as people read it."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def check_room(size: Size, place: str, folder: Path | None = None) -> None:
    """Raises ValueError if activations do not fit where they are to be kept.

    Args:
        size: what is to be kept.
        place: "memory" or "disk".
        folder: on the disk, there already.
    """
    if place == "disk":
        assert folder is not None
        free: int | None = shutil.disk_usage(folder).free
        where = f"on the disk of {folder}"
    else:
        free, where = free_memory(), "in memory"
    if free is not None and size.bytes > (1 - LEFT_FREE) * free:
        other = "cache_activations='disk', " if place == "memory" else ""
        raise ValueError(
            f"the activations take {size}, but {in_words(free)} are free {where}: take {other}a smaller "
            "activation_dtype ('bfloat16'), fewer or shorter examples, or leave cache_activations out"
        )


def free_memory() -> int | None:
    """Bytes that this process may still take, as Linux says it, a container's limit included; None: it is not known."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        most = int((group / "memory.max").read_text())  # "max", no number, where there is no limit
        found.append(max(0, most - int((group / "memory.current").read_text())))
    except (OSError, ValueError):
        pass
    return min(found, default=None)
