"""The page of an adapter on the Hugging Face Hub: its `README.md`, of what the manifest says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from .._text import printable
from ..nn import PrefixTuningConfig
from .module import Adapter

_TAGS = {
    "prefix": "prefix-tuning",
    "prompt": "prompt-tuning",
    "p-tuning": "p-tuning",
    "multitask-prompt": "multitask-prompt-tuning",
    "cpt": "context-aware-prompt-tuning",
}
_LICENSES = (
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc-by-2.0",
    "cc-by-3.0", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0",
    "cc-by-sa-4.0", "cc0-1.0", "epl-2.0", "eupl-1.2", "gpl-2.0", "gpl-3.0", "isc", "lgpl-2.1", "lgpl-3.0", "mit",
    "mpl-2.0", "odc-by", "openrail", "unlicense", "wtfpl", "zlib",
)  # fmt: skip
"""Licences that the Hub knows; it refuses a page that names another one without calling it "other"."""

_LONGEST = 2000

_MARK = "<!-- prefixcore writes this page with each push; take this line away to keep yours. -->"

_MARKUP = re.compile(r"[\\`*\[\]<#|~$&]")
"""Characters of which Markdown, or HTML in it, makes something else."""


def model_card(adapter: Adapter, name: str, title: str) -> str:
    """What the Hub shows of an adapter: what it does, how it is used, where it comes from.

    Args:
        adapter: which has been read.
        name: by which it is loaded, `user/repository`.
        title: what it is called.

    Returns:
        Markdown, with the Hub's fields in front.
    """
    from huggingface_hub import ModelCardData

    manifest, method = adapter.manifest, adapter.config.method
    base, task = adapter.base_model_name, manifest.task if manifest else None
    known = base is not None and _is_on_hub(base)
    fields: dict[str, Any] = _license(manifest.license if manifest else None)
    if known:
        fields["base_model_relation"] = "adapter"
    front = ModelCardData(
        library_name="prefixcore" if adapter.peft_config is None else "peft",
        base_model=base if known else None,
        tags=["prefixcore", _TAGS[method]],
        **fields,
    )
    auto_class = _auto_class(str(manifest.base_model.get("class")) if manifest else "")
    kind = "prefix" if isinstance(adapter.config, PrefixTuningConfig) else "soft prompt"
    lines = [
        "---",
        front.to_yaml(),
        "---",
        "",
        _MARK,
        "",
        f"# {title}",
        "",
        *([_text(task), ""] if task else []),
        f"A {kind} of {adapter.config.num_virtual_tokens} virtual tokens for "
        f"{_code(base) if base else 'its base model'}, whose weights stay as they are. Made with prefixcore.",
        "",
        "```python",
        "import prefixcore",
        f"from transformers import {auto_class}",
        "",
        f"model = {auto_class}.from_pretrained({json.dumps(_line(base or '...'))})",
        f'prefixcore.load(model, "{name}")',
        "```",
        "",
        "Served by vLLM:",
        "",
        "```",
        f"prefixcore add {name} adapters/",
        f"prefixcore serve --model {shlex.quote(_line(base or '...'))} --adapters adapters/",
        "```",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {what} | {_cell(value)} |" for what, value in _facts(adapter) if value not in (None, {}, "")),
        "",
    ]
    return "\n".join(lines)


def is_written_here(page: str | Path) -> bool:
    """Whether a page is one that `model_card` has written, and nobody has made their own."""
    return _MARK in Path(page).read_text(encoding="utf-8", errors="replace")


def _auto_class(model_class: str) -> str:
    """By which of transformers' auto classes a model of this class is opened."""
    from transformers.models.auto import modeling_auto as names

    def is_among(classes: Any) -> bool:
        return any(model_class in ((each,) if isinstance(each, str) else each) for each in classes.values())

    reads_images = is_among(names.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    is_causal = is_among(names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return "AutoModelForImageTextToText" if reads_images and not is_causal else "AutoModelForCausalLM"


def _is_on_hub(base: str) -> bool:
    """Whether the name of a base model can be one on the Hub, which refuses a page that links to what cannot."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return "/" in base and not Path(base).exists()


def _license(said: str | None) -> dict[str, str]:
    """The Hub's fields of a licence."""
    if not said:
        return {}
    return {"license": said.lower()} if said.lower() in _LICENSES else {"license": "other", "license_name": _line(said)}


def _facts(adapter: Adapter) -> list[tuple[str, Any]]:
    manifest = adapter.manifest
    peft = "reads it as well" if adapter.peft_config is not None else "cannot hold it"
    if manifest is None:
        return [("digest", adapter.digest), ("PEFT", peft)]
    base = manifest.base_model
    return [
        ("intended use", manifest.intended_use),
        ("license", manifest.license),
        ("base model", f"{base.get('class')}, {base.get('num_parameters', 0):,} parameters"),
        ("trained on", manifest.data),
        ("measured", manifest.metrics),
        ("on", manifest.split),
        ("settings", manifest.training),
        ("seed", manifest.seed),
        ("written", manifest.date),
        ("digest", adapter.digest),
        ("PEFT", peft),
    ]


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{name} {_number(each)}" for name, each in value.items() if each is not None)
    return _text(str(value))


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _code(text: str) -> str:
    return f"`{_line(text).replace('`', '')}`"


def _text(text: str) -> str:
    """A text on one line that Markdown shows as it is: no markup of its own, in a cell or not."""
    return _MARKUP.sub(r"\\\g<0>", _line(text))


def _line(text: str) -> str:
    return printable(" ".join(text.split())[:_LONGEST])
