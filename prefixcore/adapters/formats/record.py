"""What formats exchange: the virtual tokens alone, in one convention, whatever a format's own is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...nn import LayerShape
from ..errors import AdapterError, shown

PREFIX, PROMPT = "prefix", "soft prompt"

KeyValues = list[tuple[Tensor, Tensor]]

MOST_NUMBERS = 2**34
"""Of one file: 64 GiB of float32. A claim beyond is refused before anything is made of it."""

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Contents:
    """Virtual tokens: a prefix, or the soft prompts of one or several tasks.

    Attributes:
        prefix: one (key [Hkv, P, D], value [Hkv, P, Dv]) a layer, fp32; keys as attention sees them. None: soft
            prompts.
        prompts: `[tasks, P, E]`, fp32. None: a prefix.
        layers: of a prefix, the layers that have one; None: all.
        num_frozen_tokens: of a prefix, how many of the first were not trained.
        position_offset: of a prefix, whether the text behind it begins at position P; else at 0.
        folder: the adapter's that they were read from; None: they are of another format.
    """

    prefix: KeyValues | None = None
    prompts: Tensor | None = None
    layers: list[int] | None = None
    num_frozen_tokens: int = 0
    position_offset: bool = True
    folder: Path | None = None

    @property
    def kind(self) -> str:
        """`PREFIX` or `PROMPT`."""
        return PREFIX if self.prefix is not None else PROMPT

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        if self.prefix is not None:
            return self.prefix[0][0].shape[1]
        assert self.prompts is not None
        return self.prompts.shape[1]


@dataclass(frozen=True)
class Facts:
    """What a format may need to know of the model.

    Attributes:
        shapes: Hkv, D and Dv of each attention layer; None: no model is at hand.
        hidden_size: E.
        num_attention_heads: H.
        model_type, class_name, name: of the model, as its configuration says.
    """

    shapes: Sequence[LayerShape] | None = None
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    model_type: str | None = None
    class_name: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Written:
    """What a format made: files by their names, or one file under the empty name; and what it could not hold."""

    files: Mapping[str, bytes]
    lost: list[str] = field(default_factory=list)


class Format(Protocol):
    """One format that others read or write.

    Attributes:
        name: as the command line says it.
        title: whose it is.
        kinds: what it holds: `PREFIX`, `PROMPT`.
        is_folder: whether it is a folder of files; else one file.
        position_offset: of the prefixes that it holds, whether the text behind them begins at position P; else at 0.
        needs_model: whether it can be neither read nor written without a model.
        layout: what stands in it, in a line.
        lost: what of an adapter it does not hold, in a line.
    """

    name: str
    title: str
    kinds: tuple[str, ...]
    is_folder: bool
    position_offset: bool
    needs_model: bool
    layout: str
    lost: str

    def read(self, source: Path, facts: Facts) -> Contents:
        """What a file or folder of this format holds.

        Raises:
            AdapterError: it is not of this format, damaged, or holds what is no finite number.
        """
        ...

    def write(self, contents: Contents, facts: Facts, dtype: torch.dtype) -> Written:
        """The files of this format that hold `contents`, of one of `kinds`.

        Raises:
            AdapterError: the format cannot hold it.
        """
        ...


def as_numbers(name: str, tensor: Any, shape: Sequence[int | None]) -> Tensor:
    """`tensor` as fp32 of its own, if it is one of finite numbers and of this shape; None in it: any size.

    Raises:
        AdapterError: it is something else.
    """
    if not isinstance(tensor, Tensor):
        raise AdapterError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.dtype not in _FLOATS or tensor.is_meta:
        what = (
            "no numbers at all (a tensor on the meta device)" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
        )
        raise AdapterError(f"{name}: expected floating-point numbers, got {what}")
    expected = [size if size is not None else "any" for size in shape]
    if tensor.dim() != len(shape) or any(s not in (None, t) for s, t in zip(shape, tensor.shape, strict=True)):
        raise AdapterError(f"{name}: expected shape {expected}, got {shown(list(tensor.shape))}")
    if tensor.numel() == 0:
        raise AdapterError(f"{name}: holds no numbers, shape {list(tensor.shape)}")
    held = tensor.untyped_storage().nbytes() // tensor.element_size()
    if tensor.numel() > min(held, MOST_NUMBERS):  # a stride of zero makes any size of one number
        raise AdapterError(f"{name}: claims {tensor.numel():,} numbers, but holds {held:,}")
    numbers = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
    if not bool(torch.isfinite(numbers).all()):
        raise AdapterError(f"{name}: holds a number that is NaN or infinite")
    return numbers


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`; AdapterError: a number is too large for it."""
    found = tensor.detach().to(dtype).contiguous()
    if not bool(torch.isfinite(found).all()):
        raise AdapterError(f"{name}: a number is too large for {str(dtype).removeprefix('torch.')}; write float32")
    return found


def one_shape(prefix: KeyValues, title: str) -> LayerShape:
    """The shape of every layer; AdapterError: they differ, or D is not Dv, which the format has no place for."""
    shapes = {LayerShape(key.shape[0], key.shape[2], value.shape[2]) for key, value in prefix}
    shape = next(iter(shapes))
    if len(shapes) > 1 or shape.key_dim != shape.value_dim:
        raise AdapterError(
            f"{title} has one shape for keys and values of all layers, but this prefix has {shown(shapes)}"
        )
    return shape


def all_layers(contents: Contents, title: str) -> KeyValues:
    """The prefix, which is in every layer; AdapterError: it leaves some out, which the format has no place for."""
    assert contents.prefix is not None
    if contents.layers is not None:
        raise AdapterError(
            f"{title} holds a prefix of every layer, but this one is in layers {contents.layers} alone: keys and "
            "values of zero in the others would be seen too, and change what the model computes"
        )
    return contents.prefix


def one_prompt(contents: Contents, title: str) -> Tensor:
    """The soft prompt [P, E] of one task; AdapterError: there are several."""
    assert contents.prompts is not None
    if len(contents.prompts) != 1:
        raise AdapterError(
            f"{title} holds the soft prompt of one task, but there are {len(contents.prompts)}: say which"
        )
    return contents.prompts[0]
