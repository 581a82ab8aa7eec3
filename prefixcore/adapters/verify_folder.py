"""What each check of `verify_adapter` looks at in an adapter's folder, of which nothing is taken for right."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from ..nn import MultitaskPromptTuningConfig
from .agreement import check_listing
from .digest import DIGEST, check_content
from .errors import AdapterError, shown
from .files import MANIFEST_FILE, MODEL_FILE, PEFT_FILE, SIGNATURE_FILE, STATE_FILE
from .fingerprint import fingerprint
from .folder import check_listed, read_folder
from .header import claimed_config, claimed_shapes, header_of
from .manifest import Manifest
from .peft import HEAD, head_shapes
from .provenance import is_of_text_alone
from .same_model import compare_fingerprints
from .signing import check_signature
from .storage import LONGEST_JSON, load_bytes, load_json, parse_json, to_json
from .tensors import TensorFile

NOT_SAID = "not said"
"""Detail of a check that fails because the manifest leaves a field empty."""


_STRANGE = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".py", ".safetensors", ".so")
"""Ends of names of files that hold weights or code: beside an adapter, somebody might load them for it."""


class Unchecked(Exception):
    """A check has nothing to look at; the message says why."""


class NotApplicable(Exception):
    """A check asks for what an adapter that was made in this way cannot have; the message says why."""


class Folder:
    """An adapter's folder, of which nothing is taken for right."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fields: dict[str, Any] | None = None
        self.manifest: Manifest | None = None

    def check_manifest(self) -> str:
        path = self.folder / MANIFEST_FILE
        data = load_bytes(path, LONGEST_JSON)
        if data is None:
            raise AdapterError(f"{MANIFEST_FILE}: missing; what PEFT wrote says nothing of where it comes from")
        self.fields = parse_json(path, data)
        self.manifest = Manifest.from_dict(self.fields)
        if data != to_json(self.fields):
            raise AdapterError(f"{MANIFEST_FILE}: is not as prefixcore writes it: a field twice, or written by hand")
        by = self.manifest.libraries.get("prefixcore")
        return f"format version {self.manifest.format_version}, written by prefixcore {by}"

    def check_digest(self) -> str:
        fields = self._fields()
        if DIGEST not in fields:
            raise AdapterError("none: format version 1 has no digest; load it and save it again")
        check_content(fields)
        return str(fields[DIGEST])

    def check_files(self) -> str:
        files = self._fields().get("files")
        if not isinstance(files, dict) or not files:
            raise AdapterError(f"{MANIFEST_FILE}: files: expected size and SHA-256 of each file, got {shown(files)}")
        wrong = []
        for name, described in files.items():
            try:
                if Path(name).name != name:
                    raise AdapterError(f"{MANIFEST_FILE}: files: expected names, got {shown(name)}")
                if name.endswith(".safetensors"):
                    with TensorFile(self.folder / name, described) as file:
                        file.check_digest()
                else:
                    check_listed(self.folder, name, described)
            except (AdapterError, OSError, KeyError, TypeError) as error:
                wrong.append(str(error).removeprefix(f"{self.folder}/"))
        others = sorted(path.name for path in self.folder.iterdir() if path.name not in {*files, MANIFEST_FILE})
        wrong += [
            f"{name}: holds weights or code and is not the adapter's" for name in others if name.endswith(_STRANGE)
        ]
        unlisted = [name for name in (PEFT_FILE,) if name in others]
        wrong += [f"{name}: is not in the manifest" for name in unlisted]
        if wrong:
            raise AdapterError("; ".join(wrong))
        beside = [name for name in others if name != SIGNATURE_FILE]
        return f"{', '.join(sorted(files))} are those of the manifest" + (
            f"; beside them: {', '.join(beside)}" if beside else ""
        )

    def check_tensors(self) -> str:
        """Names, shapes and finite numbers, whatever the digests say."""
        manifest, peft_config = self.manifest, load_json(self.folder / PEFT_FILE)
        if manifest is None and peft_config is None:
            raise Unchecked("nothing says which tensors there are to be")
        shapes = claimed_shapes(self.folder, manifest, peft_config)
        numbers, names = 0, []
        for name in (MODEL_FILE, STATE_FILE):
            if name == STATE_FILE and not (manifest is not None and manifest.make_config().is_reparameterized):
                continue
            with TensorFile(self.folder / name) as file:
                if name == MODEL_FILE:
                    heads = head_shapes(file, claimed_config(self.folder, manifest, peft_config))
                    file.check_shapes(shapes | {HEAD + head: shape for head, shape in heads.items()})
                file.read_pieces(lambda *_: None)
                numbers += sum(_count(shape) for shape in file.shapes.values())
                names += list(file.shapes)
        return f"{len(names)} tensors, {numbers:,} numbers, all finite and of the shapes that are stated"

    def check_peft(self) -> str:
        peft_config = load_json(self.folder / PEFT_FILE)
        if self.manifest is None:
            raise Unchecked("no manifest to compare PEFT's files with")
        check_listing(self.manifest, self.manifest.make_config(), peft_config)
        claimed_shapes(self.folder, self.manifest, peft_config)  # it knows whether PEFT's fields are there at all
        header_of(self.folder, self.manifest, peft_config)
        if peft_config is None:
            return "PEFT cannot hold it, and has no file that says it could"
        name = self.manifest.base_model.get("name_or_path")
        if peft_config.get("base_model_name_or_path") != name:
            raise AdapterError(
                f"{PEFT_FILE}: base_model_name_or_path: {shown(peft_config.get('base_model_name_or_path'))}, but the "
                f"manifest says {shown(name)}"
            )
        tokens = peft_config.get("num_virtual_tokens")
        return f"{PEFT_FILE} says the same: {peft_config.get('peft_type')}, {tokens} virtual tokens"

    def check_loads(self) -> str:
        adapter = read_folder(self.folder)
        state = "" if adapter.training_state is None else ", and the training state makes these virtual tokens"
        return f"read_adapter reads it, {adapter.config.num_virtual_tokens} virtual tokens{state}"

    def check_said(self, name: str) -> str:
        value = self._known(name)
        if value is None or value == {} or (isinstance(value, str) and not value.strip()):
            if name in ("data", "metrics", "seed") and self.manifest is not None and is_of_text_alone(self.manifest):
                text = (self.manifest.training or {})["baked_text_sha256"]
                raise NotApplicable(f"nothing was trained: it is baked from a text alone, of SHA-256 {text}")
            raise AdapterError(NOT_SAID)
        if name == "task":
            tasks = getattr(self._config(), "num_tasks", 1)
            if isinstance(self._config(), MultitaskPromptTuningConfig) and tasks != 1:
                raise AdapterError(f"task: expected one, but it holds the prompts of {tasks}")
        if name == "base_model":
            return _describe_base(value)
        if name == "metrics":
            split = self._known("split") or {}
            if not isinstance(split.get("sha256"), str):
                raise AdapterError("metrics: the split names no sha256 of the examples, so it cannot be told again")
            return f"{_listed(value)}, on {_listed(split)}"
        return _listed(value) if isinstance(value, dict) else str(value)

    def check_model(self, model: nn.Module | None) -> str:
        if model is None:
            raise Unchecked("no model was given")
        expected, config = self._known("base_model"), self._config()
        knows_heads = self.manifest is not None and "modules_to_save" in self.manifest.config
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            try:
                compare_fingerprints(expected, fingerprint(model, config.head_names if knows_heads else ()))
            except UserWarning as warning:
                raise AdapterError(str(warning)) from None
        return "is the one that the adapter was trained for"

    def check_signature(self, public_key: str | Path | None, signature: str | Path | None) -> str:
        path = self.folder / SIGNATURE_FILE if signature is None else Path(signature)
        if public_key is None:
            there = "there is one; give the public key of whoever is to have signed it" if path.exists() else "none"
            raise Unchecked(there)
        return check_signature(self.folder, Path(public_key), path)

    def _fields(self) -> dict[str, Any]:
        if self.fields is None:
            raise Unchecked("the manifest cannot be read")
        return self.fields

    def _config(self) -> Any:
        if self.manifest is None:
            raise Unchecked("the manifest cannot be read")
        return self.manifest.make_config()

    def _known(self, name: str) -> Any:
        if self.manifest is None:
            raise Unchecked("the manifest cannot be read")
        return getattr(self.manifest, name)


def _describe_base(facts: dict[str, Any]) -> str:
    if not facts.get("weights") and not facts.get("samples"):
        raise AdapterError(
            "base_model: its fingerprint knows none of the weights, so any model of this shape would pass"
        )
    forced = facts.get("forced", [])
    more = f"; forced: {'; '.join(forced)}" if forced else ""
    name = facts.get("name_or_path") or "no name"
    return f"{name}, {facts.get('class')}, {facts.get('num_parameters'):,} parameters{more}"


def _listed(values: dict[str, Any]) -> str:
    texts = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
