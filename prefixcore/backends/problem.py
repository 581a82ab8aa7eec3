"""What the GPU backend is asked: the op's arguments under one name."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionProblem:
    """The arguments of ``torch.ops.prefixcore.prefix_attention``, in its order and already checked."""

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
        """The prefix as a bank ``[N, Hkv, P, D|Dv]``, of one entry if it is a single prefix."""
        if self.prefix_key.dim() == 3:
            return self.prefix_key[None], self.prefix_value[None]
        return self.prefix_key, self.prefix_value

    @property
    def virtual_tokens(self) -> int:
        """P, the room of an entry: ``prefix_lengths`` may say that fewer count."""
        return self.prefix_key.shape[-2]

    @property
    def sequences(self) -> int:
        """How many rows attend on their own: of the batch, or packed into its one row."""
        return self.batch if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @property
    def window(self) -> int:
        """The sliding window if it hides anything, else 0."""
        return self.sliding_window if 0 < self.sliding_window < self.keys else 0
