"""An adapter's folder that nobody replaces meanwhile: what its files claim and hold, its digest, its record."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..nn import MultitaskPromptTuningConfig
from .agreement import check_listing, is_description
from .digest import DIGEST, check_content, content_digest
from .errors import AdapterError, shown
from .files import CHECKPOINT, MANIFEST_FILE, MODEL_FILE, PEFT_FILE, STATE_FILE, tensor_names
from .header import Fits, claimed_config, claimed_shapes, header_of
from .manifest import Manifest
from .module import Adapter, build_module
from .peft import HEAD, PROMPT_EMBEDDINGS, from_peft, head_shapes, is_seq2seq, read_peft, seen_by_seq2seq
from .record import CURVE, RECORD, load_record
from .storage import LONGEST_JSON, check_bytes, describe, load_bytes, load_json, naming, parse_json
from .tensors import TensorFile
from .trained_for import read_base_model

LONGEST_PICTURE = 64 * 2**20
"""Bytes of a curve that is taken along."""


def read_folder(folder: Path) -> Adapter:
    """`read_adapter` of a folder that nobody replaces meanwhile; OSError: the file system refuses."""
    adapter = read_files(folder, None, True)
    if adapter.training_state is not None:
        with naming(folder / STATE_FILE):
            build_module(adapter, trainable=True)
    return adapter


def read_files(folder: Path, fits: Fits | None, state: bool) -> Adapter:
    """The adapter in the files of a folder; `fits` and `state` as of `reading.read`."""
    fields, peft_config, peft_data = _load_fields(folder)
    manifest = None
    if fields is not None:
        with naming(folder / MANIFEST_FILE):
            manifest = Manifest.from_dict(fields)
            check_listing(manifest, manifest.make_config(), peft_config)
    shapes = claimed_shapes(folder, manifest, peft_config)
    with ExitStack() as stack:
        described = {} if manifest is None else manifest.files
        model_file = stack.enter_context(_open(folder / MODEL_FILE, described.get(MODEL_FILE)))
        # Before anything is made of the sizes that the JSON files claim: a file is as large as its tensors.
        claimed = claimed_config(folder, manifest, peft_config)
        heads = head_shapes(model_file, claimed)
        model_file.check_shapes(shapes | {HEAD + name: shape for name, shape in heads.items()})
        header = replace(header_of(folder, manifest, peft_config), heads=heads)
        if manifest is None:
            header = replace(header, base_model=read_base_model(model_file.path, model_file.metadata))
        digest = None
        if fields is not None:
            with naming(folder / MANIFEST_FILE):
                digest = digest_of(fields, peft_data, None)
            if peft_data is not None and PEFT_FILE in described:
                check_bytes(folder / PEFT_FILE, peft_data, described[PEFT_FILE])
        state_file = None
        if STATE_FILE in described:
            state_file = stack.enter_context(_open(folder / STATE_FILE, described[STATE_FILE]))
        if fits is not None:
            fits(header)
        if state_file is not None and not state:
            state_file.check_digest()
        if peft_config is not None:
            values, modules, tasks = read_peft(model_file, from_peft(peft_config)[1], heads)
            if is_seq2seq(peft_config):
                values = seen_by_seq2seq(values, peft_config["num_virtual_tokens"])
                if manifest is not None and not isinstance(values, Tensor):
                    values = values[: len(header.layer_shapes)]
        else:
            assert manifest is not None
            tensors = model_file.read()
            if manifest.hidden_size is None:
                values = [(tensors[key], tensors[value]) for key, value in tensor_names(manifest)]
            else:
                values = tensors[PROMPT_EMBEDDINGS]
            modules = {name: tensors[HEAD + name] for name in heads}
        training_state = None
        if state_file is not None and state:
            training_state = state_file.read(dtype=None)
        elif isinstance(header.config, MultitaskPromptTuningConfig) and isinstance(values, Tensor):
            training_state = {"embedding": values, **tasks}
        if digest is None:
            digest = digest_of(None, peft_data, model_file)
    if manifest is not None:
        manifest = replace(manifest, digest=digest)
    return Adapter(header.config, values, manifest, training_state, peft_config, modules, digest)


def check_claims(folder: Path) -> None:
    """Raises AdapterError unless the JSON files of a folder claim an adapter that is read here; no other is opened."""
    fields, peft_config, _ = _load_fields(folder)
    with naming(folder / MANIFEST_FILE):
        manifest = None if fields is None else Manifest.from_dict(fields)
    claimed_shapes(folder, manifest, peft_config)


def _load_fields(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None, bytes | None]:
    """The fields of the manifest and of PEFT's configuration, and the latter's bytes.

    Raises:
        AdapterError: no such folder, or neither of them is in it.
    """
    try:
        is_folder = stat.S_ISDIR(folder.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_folder = False
    if not is_folder:
        if folder.is_file():
            raise AdapterError(f"{folder}: is a file; give the adapter's folder, which holds it")
        raise AdapterError(f"{folder}: no such folder")
    fields = load_json(folder / MANIFEST_FILE)
    peft_data = load_bytes(folder / PEFT_FILE, LONGEST_JSON)
    if fields is None and peft_data is None:
        banks = sorted(path.parent.name for path in folder.glob(f"{CHECKPOINT}/*/{MANIFEST_FILE}"))
        hint = f"; it is a checkpoint of a bank of {shown(banks)}: load {CHECKPOINT}/NAME in it" if banks else ""
        raise AdapterError(f"{folder}: not an adapter: expected {MANIFEST_FILE} or {PEFT_FILE} in it{hint}")
    return fields, None if peft_data is None else parse_json(folder / PEFT_FILE, peft_data), peft_data


def _open(path: Path, described: dict[str, Any] | None) -> TensorFile:
    pickled = path.name == MODEL_FILE and not os.path.lexists(path) and (path.parent / "adapter_model.bin").exists()
    if pickled:
        raise AdapterError(
            f"{path}: missing; adapter_model.bin is a pickle and never read, save it again as safetensors"
        )
    return TensorFile(path, described)


def folder_digest(folder: Path) -> str:
    """`adapter_digest` of such a folder."""
    fields, _, peft_data = _load_fields(folder)
    if fields is None:
        with TensorFile(folder / MODEL_FILE) as file:
            file.hash()
            return digest_of(None, peft_data, file)
    with naming(folder / MANIFEST_FILE):
        Manifest.from_dict(fields)
        return digest_of(fields, peft_data, None)


def digest_of(fields: dict[str, Any] | None, peft_data: bytes | None, model_file: TensorFile | None) -> str:
    """The digest of an adapter: the one in its manifest, which is checked, or one of the same kind where there is none.

    Args:
        fields: of the manifest; None where there is none.
        peft_data: PEFT's configuration, which a manifest of version 1 does not list.
        model_file: which has been read, of an adapter without a manifest.
    """
    if fields is not None and DIGEST in fields:
        check_content(fields)
        return str(fields[DIGEST])
    listed = {} if peft_data is None else {PEFT_FILE: describe(peft_data)}
    if fields is not None:
        return content_digest({**fields, "files": {**fields["files"], **listed}})
    assert model_file is not None
    return content_digest({"files": {**listed, MODEL_FILE: {"bytes": model_file.size, "sha256": model_file.sha256}}})


def folder_record(folder: Path) -> dict[str, Any]:
    """`read_record` of such a folder."""
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder")
    fields = load_json(folder / MANIFEST_FILE) or {}
    files = fields.get("files")
    files = files if isinstance(files, dict) else {}
    described = files.get(MODEL_FILE)
    digest = described.get("sha256") if isinstance(described, dict) else None
    record = load_record(folder, digest if isinstance(digest, str) else None)
    if DIGEST in fields and record:
        if RECORD not in files:  # put there by another
            return {}
        check_listed(folder, RECORD, files[RECORD])
    return record


def kept_in(folder: Path, digest: str) -> dict[str, bytes | None]:
    """`read_kept` of such a folder."""
    if not load_record(folder, digest):
        return {RECORD: None, CURVE: None}
    return {name: load_bytes(folder / name, LONGEST_PICTURE) for name in (RECORD, CURVE)}


def check_listed(folder: Path, name: str, described: Any) -> None:
    """Raises AdapterError unless a file that is not needed to read the adapter is the one that the manifest lists."""
    if not is_description(described):
        raise AdapterError(f"{folder / MANIFEST_FILE}: files.{name}: expected bytes and sha256, got {shown(described)}")
    data = load_bytes(folder / name, max(LONGEST_JSON, described["bytes"]))
    if data is None:
        raise AdapterError(f"{folder / name}: missing, but the manifest lists it")
    check_bytes(folder / name, data, described)
