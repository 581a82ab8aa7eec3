"""Reading an adapter's folder: what it claims first, then whether that fits a model, and its numbers last."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ..nn import Config, CPTConfig, LayerShape, MultitaskPromptTuningConfig
from .errors import AdapterError, shown
from .files import (
    CHECKPOINT,
    MANIFEST_FILE,
    MODEL_FILE,
    PEFT_FILE,
    STATE_FILE,
    find_adapter,
    tensor_names,
    tensor_shapes,
)
from .manifest import Manifest
from .module import Adapter, build_module
from .peft import (
    HEAD,
    PROMPT_EMBEDDINGS,
    from_peft,
    head_shapes,
    is_expressible,
    peft_tensor_shape,
    read_peft,
    task_shapes,
)
from .record import load_record
from .replace import identity, is_being_replaced, recover
from .storage import load_json, naming
from .tensors import TensorFile

_READS = 100


@dataclass(frozen=True)
class AdapterHeader:
    """What an adapter's folder claims: its JSON files and the headers of its tensor files, which agree.

    Attributes:
        config, manifest, peft_config: as of `Adapter`.
        layers: of a prefix, the indices of the layers that have one; none for a soft prompt.
        layer_shapes: the shape of each of them.
        hidden_size: E of a soft prompt; None for a prefix.
        heads: the shapes of the tensors of `modules_to_save`, by their names in the model.
    """

    config: Config
    layers: list[int]
    layer_shapes: list[LayerShape]
    hidden_size: int | None
    manifest: Manifest | None
    peft_config: dict[str, Any] | None
    heads: dict[str, list[int]] = field(default_factory=dict)


Fits = Callable[[AdapterHeader], object]
"""Raises an exception if an adapter does not fit; called before any of its numbers is read."""


def read_adapter(directory: str | Path) -> Adapter:
    """Reads an adapter's folder, ours or PEFT's, and checks all of it before anything is returned.

    Nothing is ever unpickled. A folder that is replaced while it is read is read again.

    Raises:
        AdapterError: naming the file and the field that is missing, foreign, truncated, of a wrong shape or type,
            or not finite; or the file that the file system refuses to read.

    Examples:
        >>> from prefixcore.adapters import read_adapter
        >>> with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4)) as handle:
        ...     folder = handle.save("capitals")
        >>> read_adapter(folder).layer_shapes[0]
        LayerShape(num_kv_heads=2, key_dim=16, value_dim=16)
    """
    return _undisturbed(Path(directory), read_folder)


def read(directory: str | Path, *, fits: Fits | None = None, state: bool = True) -> Adapter:
    """`read_adapter` for one that is used at once.

    Args:
        directory: the adapter's folder.
        fits: what refuses an adapter by its header.
        state: False: the training state is checked against its digest, and left out.
    """
    return _undisturbed(Path(directory), lambda folder: _read_folder(folder, fits, state))


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
    return _undisturbed(Path(directory), _read_record)


def read_folder(folder: Path) -> Adapter:
    """`read_adapter` of a folder that nobody replaces meanwhile; OSError: the file system refuses."""
    adapter = _read_folder(folder, None, True)
    if adapter.training_state is not None:
        with naming(folder / STATE_FILE):
            build_module(adapter, trainable=True)
    return adapter


T = TypeVar("T")


def _undisturbed(folder: Path, what: Callable[[Path], T]) -> T:
    """What `what` makes of the folder, begun again where the folder was replaced meanwhile."""
    folder = find_adapter(folder)
    failure: AdapterError | None = None
    for _ in range(_READS):
        recover(folder.absolute(), check=read_folder)
        before, failure = identity(folder), None
        try:
            found = what(folder)
        except AdapterError as error:
            failure = error
        except OSError as error:
            failure = AdapterError(f"{error.filename or folder}: cannot be read: {error.strerror or error}")
            failure.__cause__ = error
        if identity(folder) != before or (before is None and is_being_replaced(folder.absolute())):
            continue
        if failure is not None:
            raise failure
        return found
    raise failure or AdapterError(f"{folder}: was replaced again and again while it was read")


def _read_record(folder: Path) -> dict[str, Any]:
    manifest = load_json(folder / MANIFEST_FILE) or {}
    files = manifest.get("files")
    described = files.get(MODEL_FILE) if isinstance(files, dict) else None
    digest = described.get("sha256") if isinstance(described, dict) else None
    return load_record(folder, digest if isinstance(digest, str) else None)


def _read_folder(folder: Path, fits: Fits | None, state: bool) -> Adapter:
    try:
        is_folder = stat.S_ISDIR(folder.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_folder = False
    if not is_folder:
        raise AdapterError(f"{folder}: no such folder")
    fields = load_json(folder / MANIFEST_FILE)
    peft_config = load_json(folder / PEFT_FILE)
    if fields is None and peft_config is None:
        banks = sorted(path.parent.name for path in folder.glob(f"{CHECKPOINT}/*/{MANIFEST_FILE}"))
        hint = f"; it is a checkpoint of a bank of {shown(banks)}: load {CHECKPOINT}/NAME in it" if banks else ""
        raise AdapterError(f"{folder}: not an adapter: expected {MANIFEST_FILE} or {PEFT_FILE} in it{hint}")
    manifest = None
    if fields is not None:
        with naming(folder / MANIFEST_FILE):
            manifest = Manifest.from_dict(fields)
            _check_listing(manifest, manifest.make_config(), peft_config)
    shapes = _tensor_shapes(folder, manifest, peft_config)
    with ExitStack() as stack:
        described = {} if manifest is None else manifest.files
        model_file = stack.enter_context(_open(folder / MODEL_FILE, described.get(MODEL_FILE)))
        # Before anything is made of the sizes that the JSON files claim: a file is as large as its tensors.
        claimed = _config(folder, manifest, peft_config)
        heads = head_shapes(model_file, claimed)
        model_file.check_shapes(shapes | {HEAD + name: shape for name, shape in heads.items()})
        header = replace(_header(folder, manifest, peft_config), heads=heads)
        state_file = None
        if STATE_FILE in described:
            state_file = stack.enter_context(_open(folder / STATE_FILE, described[STATE_FILE]))
        if fits is not None:
            fits(header)
        if state_file is not None and not state:
            state_file.check_digest()
        if peft_config is not None:
            values, modules, tasks = read_peft(model_file, header.layer_shapes, heads)
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
    return Adapter(header.config, values, manifest, training_state, peft_config, modules)


def _open(path: Path, described: dict[str, Any] | None) -> TensorFile:
    pickled = path.name == MODEL_FILE and not os.path.lexists(path) and (path.parent / "adapter_model.bin").exists()
    if pickled:
        raise AdapterError(
            f"{path}: missing; adapter_model.bin is a pickle and never read, save it again as safetensors"
        )
    return TensorFile(path, described)


def _tensor_shapes(folder: Path, manifest: Manifest | None, peft_config: dict[str, Any] | None) -> dict[str, list[int]]:
    """The names and shapes of the virtual tokens' tensors."""
    if peft_config is not None:
        with naming(folder / PEFT_FILE):
            shape = peft_tensor_shape(peft_config)
            return {PROMPT_EMBEDDINGS: shape, **task_shapes(peft_config)}
    assert manifest is not None
    tokens = manifest.make_config().num_virtual_tokens
    assert tokens is not None
    return tensor_shapes(manifest, tokens)


def _config(folder: Path, manifest: Manifest | None, peft_config: dict[str, Any] | None) -> Config:
    """The configuration that the JSON files state, of which nothing large has been made."""
    if manifest is not None:
        with naming(folder / MANIFEST_FILE):
            return manifest.make_config()
    assert peft_config is not None
    with naming(folder / PEFT_FILE):
        return from_peft({**peft_config, "num_layers": 1})[0]


def _header(folder: Path, manifest: Manifest | None, peft_config: dict[str, Any] | None) -> AdapterHeader:
    """What the JSON files say; AdapterError: they contradict each other."""
    hidden_size = None
    if peft_config is not None:
        with naming(folder / PEFT_FILE):
            config, layer_shapes = from_peft(peft_config)
        hidden_size = None if layer_shapes else peft_config["token_dim"]
    if manifest is not None:
        with naming(folder / MANIFEST_FILE):
            if peft_config is not None:
                _check_agreement(manifest, config, layer_shapes)
                _check_method(manifest.make_config(), config)
            config, layer_shapes = manifest.make_config(), manifest.make_layer_shapes()
        if peft_config is None:
            hidden_size = manifest.hidden_size
    layers = list(range(len(layer_shapes))) if manifest is None or manifest.layers is None else manifest.layers
    return AdapterHeader(config, layers, layer_shapes, hidden_size, manifest, peft_config)


def _check_listing(manifest: Manifest, config: Config, peft_config: dict[str, Any] | None) -> None:
    """Raises AdapterError unless the manifest lists the files that an adapter with this configuration has."""
    if config.num_virtual_tokens is None:
        raise AdapterError("config.num_virtual_tokens: missing")
    expected = {MODEL_FILE, STATE_FILE} if config.is_reparameterized else {MODEL_FILE}
    if manifest.files.keys() != expected:
        raise AdapterError(f"files: expected {sorted(expected)}, got {shown(sorted(manifest.files))}")
    for name, described in manifest.files.items():
        if not _is_description(described):
            raise AdapterError(f"files.{name}: expected bytes and sha256, got {shown(described)}")
    peft_type = None if peft_config is None else peft_config.get("peft_type")
    if peft_type != manifest.peft_type:
        raise AdapterError(f"peft_type: {shown(manifest.peft_type)}, but that of {PEFT_FILE} is {shown(peft_type)}")
    in_text = manifest.layers is None and not is_expressible(config, [], {})
    if in_text and peft_type is not None:
        raise AdapterError(
            f"peft_type: expected none, got {shown(peft_type)}: PEFT would put the soft prompt before the text, but it "
            "stands in the text (config.virtual_token_ids)"
        )
    if manifest.layers is None and not in_text and peft_type is None:
        raise AdapterError("peft_type: expected one, a soft prompt before the text is always in PEFT's files")
    if in_text != (manifest.hidden_size is not None):
        expected_size = "E, an integer of at least 1" if in_text else "none: only a soft prompt in the text has one"
        raise AdapterError(f"hidden_size: expected {expected_size}, got {shown(manifest.hidden_size)}")


def _is_description(value: Any) -> bool:
    """Whether it says the size and the SHA-256 of a file."""
    if not isinstance(value, dict) or value.keys() != {"bytes", "sha256"}:
        return False
    return type(value["bytes"]) is int and isinstance(value["sha256"], str)


def _check_method(ours: Config, peft: Config) -> None:
    """Raises AdapterError unless both are, or neither is, of the same tasks or of the same examples."""
    for kind, names in (
        (MultitaskPromptTuningConfig, ("num_tasks", "num_ranks")),
        (CPTConfig, ("cpt_token_ids", "cpt_tokens_type_mask")),
    ):
        if isinstance(ours, kind) != isinstance(peft, kind):
            raise AdapterError(f"method: {ours.method!r} does not agree with {PEFT_FILE}, {peft.method!r}")
        for name in names if isinstance(ours, kind) else ():
            if getattr(ours, name) != getattr(peft, name):
                raise AdapterError(f"config.{name}: does not agree with {PEFT_FILE}")


def _check_agreement(manifest: Manifest, peft: Config, peft_shapes: list[LayerShape]) -> None:
    """Raises AdapterError unless the manifest states the shapes that PEFT's configuration states."""
    tokens, shapes = manifest.make_config().num_virtual_tokens, manifest.make_layer_shapes()
    if not peft_shapes:
        if shapes or peft.num_virtual_tokens != tokens:
            raise AdapterError(
                f"method {manifest.method!r} with {tokens} virtual tokens does not agree with {PEFT_FILE}, a soft "
                f"prompt of {peft.num_virtual_tokens}"
            )
    elif (shapes, tokens) != (peft_shapes, peft.num_virtual_tokens):
        raise AdapterError(
            f"layer_shapes with {tokens} virtual tokens do not agree with {MODEL_FILE}: by {PEFT_FILE} it has "
            f"{len(peft_shapes)} layers of {peft_shapes[0]} with {peft.num_virtual_tokens} virtual tokens"
        )
