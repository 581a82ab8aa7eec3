"""Initial values of a prefix or a soft prompt that need no model.

The keys and values of a text take the frozen model: `prefixcore.hf.initialize` computes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import KeyValues


@dataclass(frozen=True)
class LayerShape:
    """The heads of one attention layer: Hkv, D and Dv.

    Examples:
        >>> from prefixcore.nn import LayerShape
        >>> LayerShape(num_kv_heads=2, key_dim=16, value_dim=16).width
        64
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def key_width(self) -> int:
        """Numbers in the key of one virtual token."""
        return self.num_kv_heads * self.key_dim

    @property
    def width(self) -> int:
        """Numbers in the key and the value of one virtual token."""
        return self.num_kv_heads * (self.key_dim + self.value_dim)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """A block that draws from `seed` and leaves torch's global generator as it was; None: draws from that one."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def split_layers(flat: Tensor, layers: Sequence[LayerShape]) -> list[tuple[Tensor, Tensor]]:
    """Views of `[P, sum of widths]`, PEFT's layout: a `(key [Hkv, P, D], value [Hkv, P, Dv])` a layer.

    The number at `((2*layer + kv)*Hkv + head)*D + d` belongs to the key (kv = 0) or value (1) of that layer.

    Examples:
        >>> from prefixcore.nn import LayerShape, split_layers
        >>> pairs = split_layers(torch.randn(20, 128), [LayerShape(2, 16, 16)] * 2)
        >>> [key.shape for key, value in pairs]
        [torch.Size([2, 20, 16]), torch.Size([2, 20, 16])]
    """
    widths = [width for s in layers for width in (s.key_width, s.width - s.key_width)]
    if flat.dim() != 2 or flat.shape[1] != sum(widths):
        raise ValueError(f"a flat prefix for these {len(layers)} layers is [P, {sum(widths)}], got {list(flat.shape)}")
    heads = [
        block.unflatten(1, (layers[i // 2].num_kv_heads, -1)).transpose(0, 1)
        for i, block in enumerate(flat.split(widths, dim=1))
    ]
    return list(zip(heads[::2], heads[1::2], strict=True))


def join_layers(pairs: KeyValues) -> Tensor:
    """The inverse of `split_layers`: a new `[P, sum of widths]` tensor.

    Examples:
        >>> from prefixcore.nn import join_layers
        >>> join_layers([(torch.zeros(2, 20, 16), torch.ones(2, 20, 16))]).shape
        torch.Size([20, 64])
    """
    return torch.cat([t.transpose(0, 1).flatten(1) for pair in pairs for t in pair], dim=1)


def random_init(layers: Sequence[LayerShape], num_virtual_tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Unit normal fp32, drawn in PEFT's order, so that the same generator gives PEFT's prefix."""
    return split_layers(torch.randn(num_virtual_tokens, sum(s.width for s in layers)), layers)


def zero_init(layers: Sequence[LayerShape], num_virtual_tokens: int) -> list[tuple[Tensor, Tensor]]:
    """All zero. Not without effect: a score of zero takes its share of the softmax."""
    return split_layers(torch.zeros(num_virtual_tokens, sum(s.width for s in layers)), layers)


def tensor_init(
    init: Tensor | KeyValues, layers: Sequence[LayerShape], num_virtual_tokens: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Checks initial values given as tensors and copies them, in fp32.

    Args:
        init: `[P, sum of widths]` in PEFT's layout, or one `(key [Hkv, P, D], value [Hkv, P, Dv])` a layer.
        layers: the shapes that they must have.
        num_virtual_tokens: P that they must have; None: any.

    Returns:
        One contiguous `(key [Hkv, P, D], value [Hkv, P, Dv])` a layer, sharing no memory with `init`.

    Raises:
        ValueError: a layer too many or too few, a wrong shape, integers, or a number that is not finite.

    Examples:
        >>> from prefixcore.nn import LayerShape, tensor_init
        >>> [(key, value)] = tensor_init(torch.zeros(20, 64), [LayerShape(2, 16, 16)])
        >>> key.shape, value.shape
        (torch.Size([2, 20, 16]), torch.Size([2, 20, 16]))
    """
    pairs = split_layers(init, layers) if isinstance(init, Tensor) else init
    if len(pairs) != len(layers):
        raise ValueError(f"expected a (key, value) pair for each of {len(layers)} layers, got {len(pairs)}")
    tokens = num_virtual_tokens if num_virtual_tokens is not None else pairs[0][0].shape[1]
    checked = []
    for index, (shape, (key, value)) in enumerate(zip(layers, pairs, strict=True)):
        for name, tensor, dim in (("key", key, shape.key_dim), ("value", value, shape.value_dim)):
            check_tensor(f"{name} of layer entry {index}", tensor, (shape.num_kv_heads, tokens, dim))
        checked.append((fp32_copy(key), fp32_copy(value)))
    return checked


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `tensor` has this shape, a floating dtype, and finite numbers only, if it has any."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected floating-point numbers, got {tensor.dtype}")
    if not tensor.is_meta and not torch.isfinite(tensor).all():
        raise ValueError(f"{name}: holds a number that is NaN or infinite")


def fp32_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy in fp32, without a graph."""
    return tensor.detach().to(torch.float32).clone(memory_format=torch.contiguous_format)


def vocab_ids(vocab_size: int, num_virtual_tokens: int, seed: int | None = None) -> Tensor:
    """`[P]` token ids drawn from the whole vocabulary, on the CPU.

    Examples:
        >>> from prefixcore.nn import vocab_ids
        >>> torch.equal(vocab_ids(100, 4, seed=0), vocab_ids(100, 4, seed=0))
        True
    """
    with seeded(seed):
        return torch.randint(0, vocab_size, (num_virtual_tokens,))


def vocab_init(weight: Tensor, num_virtual_tokens: int, seed: int | None = None) -> Tensor:
    """`[P, E]` in fp32: rows of an embedding table `[V, E]`, drawn as PEFT's SAMPLE_VOCAB does.

    Examples:
        >>> from prefixcore.nn import vocab_init
        >>> vocab_init(model.get_input_embeddings().weight, 4, seed=0).shape
        torch.Size([4, 32])
    """
    ids = vocab_ids(weight.shape[0], num_virtual_tokens, seed)
    return fp32_copy(weight.detach()[ids.to(weight.device)])


def fit_ids(ids: Sequence[int], num_virtual_tokens: int | None) -> list[int]:
    """The token ids of a text, repeated or cut to P of them as in PEFT; P None: as they are.

    Examples:
        >>> from prefixcore.nn import fit_ids
        >>> fit_ids([7, 8, 9], 5)
        [7, 8, 9, 7, 8]
    """
    if len(ids) == 0:
        raise ValueError("init_text has no token: give a text that the tokenizer turns into at least one")
    tokens = num_virtual_tokens if num_virtual_tokens is not None else len(ids)
    return (list(ids) * -(-tokens // len(ids)))[:tokens]
