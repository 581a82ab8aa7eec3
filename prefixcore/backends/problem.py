"""The one record of what `prefix_attention` is asked: every backend, the reference and the tests read it.

An option of the op begins here, as a field: a tensor before `is_causal`, anything else at the end. Its value None,
False or 0 means that it is off. What is saved for the backward, the fake kernels and the calls in between go by the
fields. CONTRIBUTING.md ("How to add an option of the op") has all steps.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor


class AttentionProblem(NamedTuple):
    """The arguments of `torch.ops.prefixcore.prefix_attention`, in its order and already checked: tensors first.

    Tensors that are always there (`DIFFERENTIABLE`) are what the op has gradients of.
    """

    query: Tensor  # [B, H, T, D]
    key: Tensor  # [B, Hkv, S, D]
    value: Tensor  # [B, Hkv, S, Dv]
    prefix_key: Tensor  # [Hkv, P, D] or a bank [N, Hkv, P, D]
    prefix_value: Tensor  # [Hkv, P, Dv] or a bank [N, Hkv, P, Dv]
    prefix_index: Tensor | None  # [B] (packed: one a sequence), -1: no prefix
    prefix_lengths: Tensor | None  # [N]
    padding: Tensor | None  # [B, S] bool
    mask: Tensor | None  # [B, H, T, S] bool or additive
    sinks: Tensor | None  # [H]
    cu_seqlens: Tensor | None  # [sequences + 1]
    is_causal: bool
    scale: float
    sliding_window: int  # 0: none
    softcap: float  # 0: none

    @property
    def differentiable(self) -> tuple[Any, ...]:
        """The tensors that may want a gradient, in the order of `DIFFERENTIABLE`."""
        return self[_DIFFERENTIABLE]  # type: ignore[return-value]

    @property
    def tensors(self) -> tuple[Any, ...]:
        """All tensors, or None in their place, in the order of `TENSORS`."""
        return self[_TENSORS]  # type: ignore[return-value]

    @property
    def options(self) -> tuple[Any, ...]:
        """All other fields, so that `AttentionProblem(*p.tensors, *p.options)` is `p`."""
        return self[_OPTIONS]  # type: ignore[return-value]

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def group(self) -> int:
        """How many query heads share a key/value head."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def queries(self) -> int:
        return self.query.shape[2]

    @property
    def keys(self) -> int:
        return self.key.shape[2]

    @property
    def head_dim(self) -> int:
        return self.query.shape[3]

    @property
    def value_dim(self) -> int:
        return self.value.shape[3]

    @property
    def bank(self) -> tuple[Tensor, Tensor]:
        """The prefix as a bank `[N, Hkv, P, D|Dv]`, of one entry if it is a single prefix."""
        if self.prefix_key.dim() == 3:
            return self.prefix_key[None], self.prefix_value[None]
        return self.prefix_key, self.prefix_value

    @property
    def virtual_tokens(self) -> int:
        """P, the room of an entry: `prefix_lengths` may say that fewer count."""
        return self.prefix_key.shape[-2]

    @property
    def sequences(self) -> int:
        """How many rows attend on their own: of the batch, or packed into its one row."""
        return self.batch if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @property
    def window(self) -> int:
        """The sliding window if it hides anything, else 0."""
        return self.sliding_window if 0 < self.sliding_window < self.keys else 0


_HINTS = get_type_hints(AttentionProblem)
DIFFERENTIABLE = tuple(name for name, kind in _HINTS.items() if kind is Tensor)
"""The fields that are always tensors: they, and no others, get gradients."""
TENSORS = tuple(name for name, kind in _HINTS.items() if kind in (Tensor, Tensor | None))
"""The fields that are tensors, or None."""
assert AttentionProblem._fields[: len(TENSORS)] == TENSORS, "tensors come before all other fields"
assert TENSORS[: len(DIFFERENTIABLE)] == DIFFERENTIABLE, "tensors that are always there come first"
_DIFFERENTIABLE = slice(len(DIFFERENTIABLE))
_TENSORS = slice(len(TENSORS))
_OPTIONS = slice(len(TENSORS), None)


def is_off(value: Any) -> bool:
    """Whether an option has the value that means that it is not there."""
    return value is None or (not isinstance(value, Tensor) and value == 0)


def attention_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    **options: Any,
) -> AttentionProblem:
    """A record from what differs: causal, with the usual scale, no prefix being one of length 0, and all else off.

    For tests, benchmarks and whoever asks which path a problem takes. Nothing is checked but the names.

    Example:
        >>> x = torch.randn(1, 2, 3, 4)
        >>> attention_problem(x, x, x, sliding_window=2).scale
        0.5
    """
    if prefix_key is None or prefix_value is None:
        heads = key.shape[1]
        prefix_key, prefix_value = (x.new_empty(heads, 0, x.shape[3]) for x in (key, value))
    # The zeros of the other types, bool's being False, mean that an option is off.
    off: dict[str, Any] = {name: None if name in TENSORS else kind() for name, kind in _HINTS.items()}
    usual = {"is_causal": True, "scale": 1 / math.sqrt(query.shape[3])}
    tensors = {"query": query, "key": key, "value": value, "prefix_key": prefix_key, "prefix_value": prefix_value}
    return AttentionProblem(**off | usual | tensors | options)
