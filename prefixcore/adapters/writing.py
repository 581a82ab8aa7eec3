"""Writing an adapter's folder."""

from __future__ import annotations

import copy
import dataclasses
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ..nn import (
    Config,
    CPTConfig,
    CPTPrompt,
    MultitaskPrompt,
    MultitaskPromptTuningConfig,
    Prefix,
    PrefixTuningConfig,
)
from .errors import AdapterError
from .files import MANIFEST_FILE, MODEL_FILE, PEFT_FILE, SIGNATURE_FILE, STATE_FILE, tensor_names
from .folder import read_folder
from .manifest import Manifest
from .module import Module
from .peft import COLS, HEAD, PEFT_TYPES, PROMPT_EMBEDDINGS, ROWS, Values
from .peft_writing import is_expressible, to_peft
from .provenance import inherited
from .reading import read_kept
from .record import CURVE, RECORD, record_bytes
from .replace import replace_folder
from .storage import check_path, describe, load_json, naming, to_json
from .tensors import is_finite
from .whole import one_writer, whole_module


def write_adapter(
    directory: str | Path,
    *,
    module: Module,
    config: Config,
    manifest: Manifest,
    heads: Mapping[str, nn.Module] | None = None,
    record: Mapping[str, Any] | None = None,
    curve: bytes | None = None,
    source: Manifest | None = None,
) -> Path:
    """Writes an adapter's folder, whole or not at all.

    The new folder is written beside the target, read back, and exchanged with it. An existing folder is replaced only
    if it is an adapter or empty; files of other names in it (a README, a picture) stay, but for the record of a
    training that made other values.

    Args:
        directory: the folder to write; its parents are made.
        module: what was trained.
        config: its configuration.
        manifest: from `Manifest.create`; the number of virtual tokens and the files' digests are filled in here.
        heads: modules that were trained along (`modules_to_save`), by their names in the model.
        record: how it was trained, for `training.json`.
        curve: a picture of the training, PNG, for `curve.png`.
        source: the manifest of the adapter that the values were loaded from: what still holds of it is taken over.

    Returns:
        The folder's absolute path.

    Raises:
        AdapterError: the three do not fit each other, a number is not finite, or the target is something else
            than an adapter. Nothing has been written.
        OSError: the file system refused; an adapter that was there is as it was.

    Examples:
        >>> from prefixcore.adapters import Manifest, write_adapter
        >>> from prefixcore.nn import PromptTuningConfig, SoftPrompt
        >>> config = PromptTuningConfig(num_virtual_tokens=4, init="random")
        >>> manifest = Manifest.create(model, config)
        >>> write_adapter("prompt", module=SoftPrompt(32, config), config=config, manifest=manifest).name
        'prompt'
    """
    target = Path(directory).absolute()
    if target.name == "..":
        target = target.resolve()
    check_target(target)
    _check_parts(module, config, manifest)
    given = [module, *(heads or {}).values()]
    module = whole_module(module)
    if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in module.state_dict().values()):
        # The module was cast along with its model. What is saved is computed in fp32, so that it can be checked.
        module = copy.deepcopy(module).float()
    baked = module.embedding.detach() if isinstance(module, MultitaskPrompt) else module.bake()
    values: Values = _to_cpu(baked) if isinstance(baked, Tensor) else [(_to_cpu(k), _to_cpu(v)) for k, v in baked]
    files: dict[str, bytes | None] = {STATE_FILE: None, PEFT_FILE: None, SIGNATURE_FILE: None}
    peft_config: dict[str, Any] = {}
    if is_expressible(config, manifest.make_layer_shapes(), manifest.base_model):
        peft_config, flat = to_peft(config, values, manifest.base_model)
        files[PEFT_FILE] = to_json(peft_config)
        tensors = {PROMPT_EMBEDDINGS: flat}
        if isinstance(module, MultitaskPrompt):
            tensors |= {COLS: module.prefix_task_cols, ROWS: module.prefix_task_rows}
    elif isinstance(values, Tensor):
        tensors = {PROMPT_EMBEDDINGS: values}
    else:
        tensors = {}
        for names, pair in zip(tensor_names(manifest), values, strict=True):
            tensors.update(zip(names, pair, strict=True))
    for name, head in (heads or {}).items():
        tensors.update({f"{HEAD}{name}.{key}": tensor for key, tensor in whole_module(head).state_dict().items()})
    blobs = {MODEL_FILE: _to_bytes(tensors)}
    if module.is_reparameterized:
        blobs[STATE_FILE] = _to_bytes(module.state_dict())
    described = {name: describe(data) for name, data in blobs.items()}
    digest = described[MODEL_FILE]["sha256"]
    if record is not None:
        files |= {RECORD: record_bytes(record, digest), CURVE: curve}
    else:
        files |= read_kept(target, digest)
    described |= {name: describe(data) for name, data in files.items() if data is not None}
    files |= blobs
    same_values = source is not None and source.files.get(MODEL_FILE, {}).get("sha256") == digest
    manifest = dataclasses.replace(
        inherited(manifest, source, same_values=same_values),
        config={**config.to_dict(), "num_virtual_tokens": module.num_virtual_tokens},
        peft_type=peft_config.get("peft_type"),
        hidden_size=values.shape[1] if isinstance(values, Tensor) and not peft_config else None,
        files=described,
    )
    with naming(target / MANIFEST_FILE):
        files[MANIFEST_FILE] = to_json(manifest.to_dict())
    try:
        with one_writer(given, target) as is_writer:
            if is_writer:
                replace_folder(target, files, check=read_folder)
    except OSError as error:
        if error.errno is None:
            raise
        why = f"the adapter cannot be written ({error.strerror}); give a folder with room, where files can be made"
        raise OSError(error.errno, why, str(target)) from error
    return target


def check_target(target: Path) -> None:
    """Raises AdapterError unless the target is nothing, an empty folder, or an adapter that can be replaced.

    Examples:
        >>> from pathlib import Path
        >>> from prefixcore.adapters import AdapterError, check_target
        >>> check_target(Path("capitals"))  # nothing is there: fine
        >>> Path("notes").mkdir()
        >>> _ = Path("notes/todo.txt").write_text("")
        >>> try:
        ...     check_target(Path("notes"))
        ... except AdapterError as error:
        ...     print(error)
        notes: holds 'todo.txt' and is no adapter, so it is not replaced; give another folder
    """
    try:
        _check_target(target)
    except OSError as error:
        raise AdapterError(f"{error.filename or target}: cannot be read: {error.strerror or error}") from error


def check_apart(source: Path, target: Path) -> None:
    """Raises AdapterError if what is made of an adapter would take its place: it could not be made back from that."""
    if os.path.lexists(target) and source.exists() and os.path.samefile(source, target):
        raise AdapterError(
            f"{target}: is what is read, and what is made of it would take its place; give another folder"
        )


def check_outside(target: Path) -> None:
    """Raises AdapterError if the target would be in an adapter's folder: with it, that is none that can be replaced."""
    for parent in Path(os.path.realpath(target)).parents:
        if (parent / MANIFEST_FILE).is_file():
            raise AdapterError(
                f"{target}: would be in {parent}, which is an adapter and has no subfolders; give a folder beside it"
            )


def _check_target(target: Path) -> None:
    check_path(target)
    try:
        found = target.lstat()
        if stat.S_ISLNK(found.st_mode):
            raise AdapterError(f"{target}: is a symbolic link; give the folder that it points to ({target.resolve()})")
        if not stat.S_ISDIR(found.st_mode):
            raise AdapterError(f"{target}: is a file; give a folder of its own for the adapter")
        with os.scandir(target) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except FileNotFoundError:  # nothing is there, or a writer is between its two renames
        return
    if os.path.samestat(found, os.stat(os.curdir)):
        raise AdapterError(
            f"{target}: is the working directory, which would lose its name when a new folder takes its place; "
            "give another folder, or save from elsewhere"
        )
    if not entries:
        return
    has_manifest = any(entry.name == MANIFEST_FILE and entry.is_file() for entry in entries)
    if not has_manifest and not _is_peft_folder(target):
        raise AdapterError(
            f"{target}: holds {entries[0].name!r} and is no adapter, so it is not replaced; give another folder"
        )
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            raise AdapterError(f"{entry.path}: an adapter has no subfolders, so {target} is not replaced")
        if not entry.is_file(follow_symlinks=False) and not entry.is_symlink():
            raise AdapterError(f"{entry.path}: is neither a file nor a link, so {target} is not replaced")


def _is_peft_folder(folder: Path) -> bool:
    try:
        peft_config = load_json(folder / PEFT_FILE)
    except (AdapterError, OSError):
        return False
    return peft_config is not None and peft_config.get("peft_type") in PEFT_TYPES


def _check_parts(module: Module, config: Config, manifest: Manifest) -> None:
    """Raises AdapterError unless module, configuration and manifest belong to the same adapter."""
    if manifest.method != config.method or isinstance(module, Prefix) != isinstance(config, PrefixTuningConfig):
        raise AdapterError(
            f"method: the manifest says {manifest.method!r}, the configuration {config.method!r}, and the module is "
            f"a {type(module).__name__}"
        )
    if module.is_reparameterized != config.is_reparameterized:
        raise AdapterError("config.reparameterization: the module was not built with this configuration")
    if config.num_virtual_tokens not in (None, module.num_virtual_tokens):
        raise AdapterError(
            f"config.num_virtual_tokens: {config.num_virtual_tokens}, but the module has {module.num_virtual_tokens}"
        )
    for cls, kind in ((MultitaskPrompt, MultitaskPromptTuningConfig), (CPTPrompt, CPTConfig)):
        if isinstance(module, cls) != isinstance(config, kind):
            raise AdapterError(f"config: a {type(module).__name__} is not what a {type(config).__name__} describes")
    if isinstance(module, Prefix) and list(module.shapes) != manifest.make_layer_shapes():
        raise AdapterError(f"layer_shapes: {manifest.layer_shapes}, but the module has {list(module.shapes)}")


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)


def _to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise AdapterError(
                f"{name}: holds a number that is NaN or infinite (the training has diverged); nothing is written"
            )
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return to_bytes(whole, {"format": "pt"})
