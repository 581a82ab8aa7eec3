"""Reading and writing an adapter's folder.

- `adapter_model.safetensors`: the baked virtual tokens, as PEFT stores them where PEFT can express them, else
  `layers.N.key` [Hkv, P, D] and `layers.N.value` [Hkv, P, Dv] for each layer N that has a prefix;
- `adapter_config.json`: PEFT's configuration; absent where PEFT can't express the adapter;
- `prefixcore_manifest.json`: our manifest; absent in an adapter that PEFT wrote;
- `training_state.safetensors`: what a reparameterised prefix or soft prompt is trained by; absent otherwise;
- `training.json` and `curve.png`: how it was trained (`record`), where whoever saves it says so.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from ..nn import Config, Prefix, PrefixTuningConfig, SoftPrompt
from .errors import AdapterError
from .manifest import Manifest
from .module import Adapter, make_module
from .peft import PEFT_TYPES, PROMPT_EMBEDDINGS, Values, from_peft, is_expressible, peft_tensor_shape, to_peft
from .record import CURVE, RECORD, belongs, load_record, record_bytes
from .replace import recover, replace_folder
from .storage import check_file, describe, load_json, load_tensors, naming, to_json

MODEL_FILE = "adapter_model.safetensors"
PEFT_FILE = "adapter_config.json"
MANIFEST_FILE = "prefixcore_manifest.json"
STATE_FILE = "training_state.safetensors"

_READS = 100


def write_adapter(
    directory: str | Path,
    *,
    module: Prefix | SoftPrompt,
    config: Config,
    manifest: Manifest,
    record: Mapping[str, Any] | None = None,
    curve: bytes | None = None,
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
        record: how it was trained, for `training.json`.
        curve: a picture of the training, PNG, for `curve.png`.

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
    check_target(target)
    _check_parts(module, config, manifest)
    if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in module.state_dict().values()):
        # The module was cast along with its model. What is saved is computed in fp32, so that it can be checked.
        module = copy.deepcopy(module).float()
    baked = module.bake()
    values: Values = _to_cpu(baked) if isinstance(baked, Tensor) else [(_to_cpu(k), _to_cpu(v)) for k, v in baked]
    files: dict[str, bytes | None] = {STATE_FILE: None, PEFT_FILE: None}
    peft_config: dict[str, Any] = {}
    if is_expressible(config, manifest.make_layer_shapes(), manifest.base_model):
        peft_config, flat = to_peft(config, values, manifest.base_model)
        files[PEFT_FILE] = to_json(peft_config)
        tensors = {PROMPT_EMBEDDINGS: flat}
    else:
        assert not isinstance(values, Tensor)
        tensors = {}
        for names, pair in zip(_tensor_names(manifest), values, strict=True):
            tensors.update(zip(names, pair, strict=True))
    blobs = {MODEL_FILE: _to_bytes(tensors)}
    if module.is_reparameterized:
        blobs[STATE_FILE] = _to_bytes(module.state_dict())
    manifest = dataclasses.replace(
        manifest,
        config={**config.to_dict(), "num_virtual_tokens": module.num_virtual_tokens},
        peft_type=peft_config.get("peft_type"),
        files={name: describe(blob) for name, blob in blobs.items()},
    )
    digest = manifest.files[MODEL_FILE]["sha256"]
    files |= {**blobs, MANIFEST_FILE: to_json(manifest.to_dict())}
    if record is not None:
        files |= {RECORD: record_bytes(record, digest), CURVE: curve}
    elif not belongs(target, digest):
        files |= {RECORD: None, CURVE: None}
    replace_folder(target, files, check=_read_adapter)
    return target


def read_adapter(directory: str | Path) -> Adapter:
    """Reads an adapter's folder, ours or PEFT's, and checks all of it before anything is returned.

    Nothing is ever unpickled. A folder that is replaced while it is read is read again.

    Raises:
        AdapterError: naming the file and the field that is missing, foreign, truncated, of a wrong shape or type,
            or not finite.

    Examples:
        >>> from prefixcore.adapters import read_adapter
        >>> with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4)) as handle:
        ...     folder = handle.save("capitals")
        >>> read_adapter(folder).layer_shapes[0]
        LayerShape(num_kv_heads=2, key_dim=16, value_dim=16)
    """
    folder = Path(directory)
    recover(folder.absolute(), check=_read_adapter)
    for _ in range(_READS):
        before = _identity(folder)
        try:
            adapter = _read_adapter(folder)
        except AdapterError:
            if _identity(folder) == before:
                raise
        else:
            if _identity(folder) == before:
                return adapter
    raise AdapterError(f"{folder}: was replaced again and again while it was read")


def read_record(directory: str | Path) -> dict[str, Any]:
    """How the adapter in a folder was trained, as `write_adapter` was told; empty where nobody said so.

    Raises:
        AdapterError: the record or the manifest is damaged.

    Examples:
        >>> from prefixcore.adapters import read_record
        >>> with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4)) as handle:
        ...     folder = handle.save("capitals", record={"data": "capitals.jsonl", "held_out": {}})
        >>> read_record(folder)["data"]
        'capitals.jsonl'
    """
    folder = Path(directory)
    manifest = load_json(folder / MANIFEST_FILE) or {}
    files = manifest.get("files")
    described = files.get(MODEL_FILE) if isinstance(files, dict) else None
    digest = described.get("sha256") if isinstance(described, dict) else None
    try:
        return load_record(folder, digest if isinstance(digest, str) else None)
    except OSError as error:
        raise AdapterError(f"{folder / RECORD}: cannot be read: {error.strerror or error}") from error


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells the folder from one that has taken its name."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _read_adapter(folder: Path) -> Adapter:
    try:
        return _read_folder(folder)
    except OSError as error:
        raise AdapterError(f"{error.filename or folder}: cannot be read: {error.strerror or error}") from error


def _read_folder(folder: Path) -> Adapter:
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder")
    fields = load_json(folder / MANIFEST_FILE)
    peft_config = load_json(folder / PEFT_FILE)
    if fields is None:
        if peft_config is None:
            raise AdapterError(f"{folder}: not an adapter: expected {MANIFEST_FILE} or {PEFT_FILE} in it")
        return _read_peft(folder, peft_config)
    with naming(folder / MANIFEST_FILE):
        manifest = Manifest.from_dict(fields)
        config = manifest.make_config()
        _check_listing(manifest, config, peft_config)
    for name, described in manifest.files.items():
        check_file(folder / name, described)
    if peft_config is not None:
        values = _read_peft(folder, peft_config).tensors
    else:
        assert config.num_virtual_tokens is not None
        tensors = load_tensors(folder / MODEL_FILE, _tensor_shapes(manifest, config.num_virtual_tokens))
        values = [(tensors[key], tensors[value]) for key, value in _tensor_names(manifest)]
    with naming(folder / MANIFEST_FILE):
        _check_values(manifest, config, values)
    if STATE_FILE not in manifest.files:
        return Adapter(config, values, manifest, None, peft_config)
    adapter = Adapter(config, values, manifest, load_tensors(folder / STATE_FILE), peft_config)
    with naming(folder / STATE_FILE):
        make_module(adapter, trainable=True)
    return adapter


def _read_peft(folder: Path, peft_config: dict[str, Any]) -> Adapter:
    with naming(folder / PEFT_FILE):
        shape = peft_tensor_shape(peft_config)
    path = folder / MODEL_FILE
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        mend = "; adapter_model.bin is a pickle and never read, save it again as safetensors" if pickled else ""
        raise AdapterError(f"{path}: missing{mend}")
    flat = load_tensors(path, {PROMPT_EMBEDDINGS: shape})[PROMPT_EMBEDDINGS]
    with naming(folder / PEFT_FILE):
        config, values = from_peft(peft_config, flat)
    return Adapter(config, values, peft_config=peft_config)


def _tensor_names(manifest: Manifest) -> list[tuple[str, str]]:
    """Our own names of a prefix's tensors, one (key, value) a layer."""
    return [(f"layers.{layer}.key", f"layers.{layer}.value") for layer in manifest.layers or []]


def _tensor_shapes(manifest: Manifest, tokens: int) -> dict[str, list[int]]:
    """The shape of each tensor by its name; `tokens` is P."""
    shapes = {}
    for (key, value), shape in zip(_tensor_names(manifest), manifest.make_layer_shapes(), strict=True):
        shapes[key] = [shape.num_kv_heads, tokens, shape.key_dim]
        shapes[value] = [shape.num_kv_heads, tokens, shape.value_dim]
    return shapes


def _check_listing(manifest: Manifest, config: Config, peft_config: dict[str, Any] | None) -> None:
    """Raises AdapterError unless the manifest lists the files that an adapter with this configuration has."""
    if config.num_virtual_tokens is None:
        raise AdapterError("config.num_virtual_tokens: missing")
    expected = {MODEL_FILE, STATE_FILE} if config.is_reparameterized else {MODEL_FILE}
    if manifest.files.keys() != expected:
        raise AdapterError(f"files: expected {sorted(expected)}, got {sorted(manifest.files)}")
    for name, described in manifest.files.items():
        if not isinstance(described, dict) or described.keys() != {"bytes", "sha256"}:
            raise AdapterError(f"files.{name}: expected bytes and sha256, got {described!r}")
    peft_type = None if peft_config is None else peft_config.get("peft_type")
    if peft_type != manifest.peft_type:
        raise AdapterError(f"peft_type: {manifest.peft_type!r}, but that of {PEFT_FILE} is {peft_type!r}")
    if manifest.layers is None and peft_type is None:
        raise AdapterError("peft_type: expected one, a soft prompt is always in PEFT's files")


def _check_values(manifest: Manifest, config: Config, values: Values) -> None:
    """Raises AdapterError unless the values have the shapes that the manifest states."""
    tokens, shapes = config.num_virtual_tokens, manifest.make_layer_shapes()
    if isinstance(values, Tensor):
        if shapes or values.shape[0] != tokens:
            raise AdapterError(
                f"method {manifest.method!r} with {tokens} virtual tokens does not agree with {PEFT_FILE}, a soft "
                f"prompt of {values.shape[0]}"
            )
        return
    found = [(*key.shape, *value.shape) for key, value in values]
    if found != [(s.num_kv_heads, tokens, s.key_dim, s.num_kv_heads, tokens, s.value_dim) for s in shapes]:
        raise AdapterError(
            f"layer_shapes with {tokens} virtual tokens do not agree with {MODEL_FILE}: its first layer has key "
            f"{list(values[0][0].shape)} and value {list(values[0][1].shape)}, and it has {len(values)} layers"
        )


def _check_parts(module: Prefix | SoftPrompt, config: Config, manifest: Manifest) -> None:
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
    if isinstance(module, Prefix) and list(module.shapes) != manifest.make_layer_shapes():
        raise AdapterError(f"layer_shapes: {manifest.layer_shapes}, but the module has {list(module.shapes)}")


def check_target(target: Path) -> None:
    """Raises AdapterError unless the target is nothing, an empty folder, or an adapter.

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
    if target.is_symlink():
        raise AdapterError(f"{target}: is a symbolic link; give the folder that it points to ({target.resolve()})")
    if not target.exists():
        return
    if not target.is_dir():
        raise AdapterError(f"{target}: is a file; give a folder of its own for the adapter")
    entries = sorted(target.iterdir())
    if not entries:
        return
    if not (target / MANIFEST_FILE).is_file() and not _is_peft_folder(target):
        raise AdapterError(
            f"{target}: holds {entries[0].name!r} and is no adapter, so it is not replaced; give another folder"
        )
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            raise AdapterError(f"{entry}: an adapter has no subfolders, so {target} is not replaced")


def _is_peft_folder(folder: Path) -> bool:
    try:
        peft_config = load_json(folder / PEFT_FILE)
    except AdapterError:
        return False
    return peft_config is not None and peft_config.get("peft_type") in PEFT_TYPES


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)


def _to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{name}: holds a number that is NaN or infinite (the training has diverged); nothing is written"
            )
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return to_bytes(whole, {"format": "pt"})
