"""What the connector is told on vLLM's command line: `kv_connector_extra_config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .salt import PLACEHOLDER


@dataclass(frozen=True)
class Settings:
    """The connector's settings.

    Attributes:
        adapters: the registry, a folder of adapters. It may change while the server runs.
        baked: a folder of prefixes that `prefixcore serve --bake` has baked from the registry's soft prompts.
        placeholder: the token id that stands for a virtual token in a prompt.
        host_cache_bytes: how much memory each worker keeps prefixes in, those that were not used for longest leave it.
        unverified_models: whether a model of a family is served that has not been compared with transformers.
    """

    adapters: Path
    placeholder: int = PLACEHOLDER
    host_cache_bytes: int = 2**30
    unverified_models: bool = False
    baked: Path | None = None

    @classmethod
    def parse(cls, extra: Mapping[str, Any]) -> Settings:
        """The settings of `kv_connector_extra_config`.

        Raises:
            ValueError: one that is missing, unknown or of a wrong type; or no such folder.

        Examples:
            >>> from prefixcore.serving.settings import Settings
            >>> Settings.parse({"adapters": ".", "host_cache_bytes": 2**20}).host_cache_bytes
            1048576
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in extra:
            if name not in names:
                raise ValueError(f"kv_connector_extra_config.{name}: unknown; expected {', '.join(names)}")
        folder = extra.get("adapters")
        if not isinstance(folder, str) or not Path(folder).is_dir():
            raise ValueError(f"kv_connector_extra_config.adapters: expected a folder of adapters, got {folder!r}")
        baked = extra.get("baked")
        if baked is not None and (not isinstance(baked, str) or not Path(baked).is_dir()):
            raise ValueError(f"kv_connector_extra_config.baked: expected a folder of baked prefixes, got {baked!r}")
        for name in ("placeholder", "host_cache_bytes"):
            value = extra.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"kv_connector_extra_config.{name}: expected an integer from 0, got {value!r}")
        if not isinstance(extra.get("unverified_models", False), bool):
            raise ValueError("kv_connector_extra_config.unverified_models: expected true or false")
        folders = {"adapters": Path(folder).absolute(), "baked": None if baked is None else Path(baked).absolute()}
        return cls(**{**extra, **folders})
