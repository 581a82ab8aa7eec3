"""Numbers of a checkpoint's weights, read where they lie: a few bytes of files of any size."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapters.samples import Sample

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LONGEST_HEADER = 100 * 2**20
_WRAPPERS = ("model.", "transformer.", "language_model.", "model.language_model.")


@dataclass(frozen=True)
class _Place:
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


class Checkpoint:
    """The floating-point weights of a folder's safetensors files, by name.

    Raises:
        OSError, ValueError: a file cannot be read, or is no safetensors file.
    """

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, _Place] = {}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            files = [folder / name for name in names]
        else:
            files = sorted(folder.glob("*.safetensors"))
        for file in files:
            self._places.update(_places(file))

    def __len__(self) -> int:
        return len(self._places)

    def sample(self, name: str, indices: Iterable[int], shape: tuple[int, ...]) -> Sample | None:
        """Some numbers of a weight; None: there is none of this name, or only in a form that is not a plain one.

        Args:
            name: the weight's in the transformers model. Checkpoints leave the name of the decoder in it out, or add
                one, so names that differ by that are tried too.
            indices: which numbers, in the flattened weight; those beyond its end are left out.
            shape: the shape that is expected, which decides between several such names.
        """
        place = self._find(name, shape)
        if place is None:
            return None
        size = math.prod(place.shape)
        width = place.dtype.itemsize
        numbers = {}
        with place.file.open("rb") as file:
            for index in indices:
                if index < size:
                    raw = os.pread(file.fileno(), width, place.start + index * width)
                    numbers[index] = float(torch.frombuffer(bytearray(raw), dtype=place.dtype).double())
        return Sample(str(place.dtype).removeprefix("torch."), place.shape, numbers)

    def _find(self, name: str, shape: tuple[int, ...]) -> _Place | None:
        bare = [name.removeprefix(wrapper) for wrapper in _WRAPPERS if name.startswith(wrapper)]
        names = [name, *bare, *(wrapper + each for each in (name, *bare) for wrapper in _WRAPPERS)]
        found = [self._places[each] for each in names if each in self._places]
        return next((place for place in found if place.shape == shape), found[0] if found else None)


def local_folder(name: str, *, cache_dir: str | None = None, revision: str | None = None) -> Path | None:
    """Where a model's files lie on this machine; None: they are not here.

    Args:
        name: a folder of a transformers model, or its id.
        cache_dir, revision: of the hub's cache; None: the usual ones.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _places(file: Path) -> dict[str, _Place]:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > _LONGEST_HEADER:
            raise ValueError(f"{file}: not a safetensors file: a header of {length} bytes")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return {
        name: _Place(file, _DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if entry["dtype"] in _DTYPES
    }
