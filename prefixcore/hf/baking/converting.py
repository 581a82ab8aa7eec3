"""Adapters from and to the formats of others: what a format needs of the model is found out here."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...adapters import AdapterError, Manifest, check_target, read_adapter, write_adapter
from ...adapters.errors import shown
from ...adapters.files import find_adapter
from ...adapters.formats import FORMATS, PREFIX, PROMPT, Contents, Facts, Format, contents_of
from ...adapters.formats.files import check_free, digest_of, put
from ...adapters.hub import local_folder
from ...adapters.reading import read_header
from ...adapters.storage import naming_errors_of
from ...adapters.writing import check_apart
from ...nn import LayerShape, Prefix, PrefixTuningConfig, PromptTuningConfig, SoftPrompt
from ..attaching import check_model
from ..families import text_config
from ..loading import Target, load
from ..positions.rotary import turn, why_fixed


def find_format(name: str) -> Format:
    """The format of that name; AdapterError: there is none."""
    if name not in FORMATS:
        raise AdapterError(f"format: expected one of {', '.join(FORMATS)}, got {shown(name)}")
    return FORMATS[name]


def export_adapter(
    adapter: str | Path | Sequence[str | Path],
    format: str,
    path: str | Path,
    *,
    model: PreTrainedModel | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Writes the virtual tokens of an adapter in a format of others.

    Args:
        adapter: its folder, ours or one that PEFT wrote, or its name on the Hub; for "tensorrt-llm" also
            several, one task each.
        format: a name of `prefixcore.adapters.formats.FORMATS`.
        path: the file or folder to write, which must not be there.
        model: the model that the adapter was trained for; "adapters" needs it, and a format whose text begins
            elsewhere than the adapter's (`position_offset`), to turn keys by.
        dtype: of the numbers.

    Returns:
        What the adapter has and the format does not hold, in words.

    Raises:
        AdapterError: the adapter cannot be read or is another model's, the format cannot hold it, or something is at
            `path`.

    Examples:
        >>> with prefixcore.attach(model, prefixcore.PromptTuningConfig(num_virtual_tokens=4)) as handle:
        ...     folder = handle.save("capitals", task="country -> capital")
        >>> prefixcore.export_adapter("capitals", "vllm", "capitals.pt")
        ['manifest (task, base model, provenance)']
        >>> torch.load("capitals.pt", weights_only=True).shape
        torch.Size([4, 32])
    """
    target, kind = Path(path), find_format(format)
    check_free(target)
    folders = [local_folder(each) for each in ([adapter] if isinstance(adapter, (str, Path)) else adapter)]
    read = [read_adapter(folder) for folder in folders]
    contents = [contents_of(each, find_adapter(folder)) for each, folder in zip(read, folders, strict=True)]
    for folder, each in zip(folders, contents, strict=True):
        _check_kind(folder, each, kind)
    if model is not None:
        its_model = Target(model)
        for folder in folders:
            its_model.read(folder, trainable=False)  # by another model's angles, keys would turn wrong
    facts = Facts() if model is None else facts_of(model, needs_layers=kind.needs_model)
    joined = _joined(contents, kind)
    if kind.name != "peft":  # whose files are the folder's own, or none
        joined = _moved(str(adapter), joined, kind.position_offset, model)
    written = kind.write(joined, facts, dtype)
    with naming_errors_of(target):
        put(target, written.files)
    lost = list(written.lost)
    if any(each.manifest is not None for each in read):
        lost.append(f"manifest (task, {'' if kind.name == 'peft' else 'base model, '}provenance)")
    if kind.name != "peft":
        if any(each.heads for each in read):
            lost.append("heads that were trained along (modules_to_save): without them the outputs are others")
        if any(getattr(each.config, "virtual_token_ids", None) is not None for each in read):
            lost.append("where in the text the virtual tokens stand (virtual_token_ids)")
    return lost


def import_adapter(
    source: str | Path,
    format: str,
    directory: str | Path,
    *,
    model: PreTrainedModel,
    task: str | None = None,
    task_id: int | None = None,
    position_offset: bool | None = None,
) -> Path:
    """Writes an adapter's folder from a file or folder in a format of others, checked against the model.

    Args:
        source: the file or folder.
        format: a name of `prefixcore.adapters.formats.FORMATS`.
        directory: the folder to write.
        model: the model that it was made for, with nothing attached; foreign formats rarely name one.
        task: what it does, in words; for the manifest.
        task_id: of a table of several tasks, which one.
        position_offset: of a prefix, where the text behind it is to begin, as in `PrefixTuningConfig`: keys are turned
            to it. None: at P, which servers need, where the model's keys can be turned; else as in the file.

    Returns:
        The folder.

    Raises:
        AdapterError: the source is not of this format, damaged, or for another model, as far as it says; PEFT's
            files do where `export_adapter` wrote them.

    Examples:
        >>> torch.save(torch.randn(4, 32), "prompt.pt")
        >>> folder = prefixcore.import_adapter("prompt.pt", "vllm", "prompt", model=model, task="country -> capital")
        >>> with prefixcore.load(model, folder) as handle:
        ...     print(handle)
        Handle(prompt on LlamaForCausalLM, 4 virtual tokens, 0 trainable)
    """
    kind, origin = find_format(format), Path(source)
    check_target(Path(directory).absolute())
    check_apart(origin, Path(directory))
    check_model(model)
    record = {"converted_from": {"format": kind.name, "name": origin.name, "sha256": digest_of(origin)}}
    if kind.name == "peft":
        if position_offset is False:
            raise AdapterError(
                f"{origin}: PEFT's prefixes are read as they are, with the text from position P on; "
                "prefixcore bake --no-position-offset turns an adapter's keys"
            )
        with load(model, origin) as handle:
            _warn_of_other_name(origin, model)
            return handle.save(directory, task=task, record=record)
    target = Target(model)
    contents = kind.read(origin, facts_of(model, needs_layers=PREFIX in kind.kinds))
    module: Prefix | SoftPrompt
    shapes: list[LayerShape] | None = None
    if contents.prefix is not None:
        if position_offset is None:
            position_offset = True if why_fixed(model) is None else contents.position_offset
        contents = _moved(str(origin), contents, position_offset, model)
        module = _prefix(origin, contents, [call.shape for call in target.attention_layers[0]])
        shapes = list(module.shapes)
    else:
        module = _prompt(origin, contents, target.hidden_size, task_id)
    manifest = Manifest.create(
        model, module.config, shapes, task=task, training={"converted_from": kind.name, "source": origin.name}
    )
    return write_adapter(directory, module=module, config=module.config, manifest=manifest, record=record)


def _warn_of_other_name(folder: Path, model: PreTrainedModel) -> None:
    """Warns where all that PEFT's files know of the base model, its name, is another one than the model's."""
    header, _ = read_header(find_adapter(folder))
    named, here = (header.peft_config or {}).get("base_model_name_or_path"), getattr(model.config, "name_or_path", None)
    if header.base_model is None and named and here and Path(named).name != Path(here).name:
        warnings.warn(
            f"{folder}: its files say that it is for {shown(named)} and know none of that model's weights; the adapter "
            f"is written as one for {shown(here)}, whose shapes fit",
            stacklevel=3,
        )


def facts_of(model: PreTrainedModel, *, needs_layers: bool = True) -> Facts:
    """What formats may need to know of a model."""
    config, target = text_config(model), Target(model)
    shapes = [call.shape for call in target.attention_layers[0]] if needs_layers else None
    embed: Any = model.get_input_embeddings()
    return Facts(
        shapes=shapes,
        hidden_size=embed.weight.shape[1],
        num_attention_heads=getattr(config, "num_attention_heads", None),
        model_type=config.model_type,
        class_name=type(model).__name__,
        name=getattr(model.config, "name_or_path", None) or None,
    )


def _moved(what: str, contents: Contents, position_offset: bool, model: PreTrainedModel | None) -> Contents:
    """The same virtual tokens for a text that begins at position P, or at 0, as `position_offset` says.

    Raises:
        AdapterError: no model says how keys turn, or it is one whose keys cannot be moved.
    """
    if contents.prefix is None or contents.position_offset == position_offset:
        return contents
    if model is None:
        raise AdapterError(
            f"{what}: its text begins at position {'P' if contents.position_offset else '0'}, where the format has it "
            f"at {'P' if position_offset else '0'}: give the model (--model) to turn keys by"
        )
    by = contents.num_virtual_tokens if position_offset else -contents.num_virtual_tokens
    return replace(contents, prefix=turn(model, contents.prefix, by, contents.layers), position_offset=position_offset)


def _check_kind(folder: str | Path, contents: Contents, kind: Format) -> None:
    if contents.kind in kind.kinds:
        return
    if contents.kind == PROMPT:
        hint = "bake it first: prefixcore bake ADAPTER --model M --out DIR makes an equal prefix"
    else:
        hint = "keys and values of layers are no embeddings; train a soft prompt (--method prompt) for it"
    raise AdapterError(f"{folder}: {kind.title} holds a {kind.kinds[0]}, and this is a {contents.kind}: {hint}")


def _joined(contents: list[Contents], kind: Format) -> Contents:
    """One `Contents`: of several adapters the soft prompts as tasks."""
    if len(contents) == 1:
        return contents[0]
    if kind.name != "tensorrt-llm":
        raise AdapterError(
            f"{kind.title} holds one adapter, got {len(contents)}; only tensorrt-llm has several in a table"
        )
    prompts = [each.prompts for each in contents if each.prompts is not None]
    shapes = [list(each.shape[1:]) for each in prompts]
    if any(shape != shapes[0] for shape in shapes):
        raise AdapterError(f"tasks of a prompt table have one shape [P, E], got {shown(shapes)}")
    return Contents(prompts=torch.cat(prompts))


def _prefix(origin: Path, contents: Contents, shapes: list[LayerShape]) -> Prefix:
    """The module of a prefix that fits the model's layers."""
    assert contents.prefix is not None
    layers = list(range(len(shapes))) if contents.layers is None else contents.layers
    if len(layers) != len(contents.prefix):
        raise AdapterError(
            f"{origin}: it has a prefix for {len(contents.prefix)} layers, but the model has {len(layers)} attention "
            "layers"
        )
    for layer, (key, value) in zip(layers, contents.prefix, strict=True):
        found = LayerShape(key.shape[0], key.shape[2], value.shape[2])
        if found != shapes[layer]:
            raise AdapterError(
                f"{origin}: the prefix of layer {layer} is for {found}, but the model has {shapes[layer]}"
            )
    config = PrefixTuningConfig(
        init=contents.prefix,
        layers=contents.layers,
        num_frozen_tokens=contents.num_frozen_tokens,
        position_offset=contents.position_offset,
    )
    return Prefix([shapes[layer] for layer in layers], config, contents.prefix)


def _prompt(origin: Path, contents: Contents, hidden_size: int, task_id: int | None) -> SoftPrompt:
    """The module of a soft prompt that fits the model's embeddings."""
    prompts = contents.prompts
    assert prompts is not None
    if len(prompts) > 1 and task_id is None:
        raise AdapterError(
            f"{origin}: it has {len(prompts)} tasks and an adapter is for one: say which, task_id=0 to "
            f"{len(prompts) - 1} (--task-id)"
        )
    number = task_id or 0
    if not 0 <= number < len(prompts):
        raise AdapterError(f"{origin}: task_id is {number}, but its tasks are 0 to {len(prompts) - 1}")
    if prompts.shape[2] != hidden_size:
        raise AdapterError(
            f"{origin}: its virtual tokens have {prompts.shape[2]} numbers, but the model's embeddings have "
            f"{hidden_size}"
        )
    return SoftPrompt(hidden_size, PromptTuningConfig(init=prompts[number]), prompts[number])
