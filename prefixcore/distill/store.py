"""What the teacher has said, kept on disk: each part by a digest of all that it follows from.

A part is a file whose name is the digest of the model's weights, the text, the prompts and the options that decide it.
So a distillation that was stopped goes on where it was, another one of the same text begins with what is there, and
nothing of another model or text is ever taken for this one's.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.storage import naming_errors_of
from .errors import DistillError

VERSION = 2
"""Of what the files hold."""

KEY, CONTENT = "prefixcore_distill", "sha256"
"""In a file's header: the digest of what it follows from, and that of its tensors."""


def digest_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 of facts as JSON, whatever their order."""
    text = json.dumps({"version": VERSION, **facts}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """A folder of parts.

    Args:
        folder: where; None: nothing is kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def keep(self, kind: str, facts: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` returns for these facts, from the folder where it is there.

        Args:
            kind: the first word of the file's name.
            facts: all that the part follows from, as JSON can hold it.
            make: computes it.

        Raises:
            DistillError: a file that is damaged.
        """
        if self.folder is None:
            return dict(make())
        digest = digest_of({"kind": kind, **facts})
        path = self.folder / f"{kind}-{digest[:32]}.safetensors"
        if path.exists():
            return self._read(path, digest)
        tensors = dict(make())
        self._write(path, tensors, digest)
        return tensors

    def _read(self, path: Path, digest: str) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DistillError(f"{path}: damaged ({error}); remove it to compute it again") from error
        if header.get(KEY) != digest:
            raise DistillError(
                f"{path}: expected the digest {digest}, got {header.get(KEY)}; remove it to compute it again"
            )
        if header.get(CONTENT) != _sha256(tensors):
            raise DistillError(f"{path}: damaged (a number is not what was written); remove it to compute it again")
        return tensors

    def _write(self, path: Path, tensors: dict[str, Tensor], digest: str) -> None:
        from safetensors.torch import save

        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with naming_errors_of(path):
                unfinished.write_bytes(save(tensors, {KEY: digest, CONTENT: _sha256(tensors)}))
                unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def _sha256(tensors: dict[str, Tensor]) -> str:
    """Of tensors with their names, types and shapes: safetensors writes them in one way."""
    from safetensors.torch import save

    return hashlib.sha256(save(tensors)).hexdigest()
