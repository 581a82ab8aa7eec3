"""Which key/value heads of a prefix a tensor-parallel worker holds."""

from __future__ import annotations


def local_heads(num_kv_heads: int, tensor_parallel: int, rank: int) -> slice:
    """The heads of one worker, as vLLM's `QKVParallelLinear` deals them out.

    Args:
        num_kv_heads: Hkv of the whole model.
        tensor_parallel: how many workers share a layer.
        rank: which of them, from 0.

    Raises:
        ValueError: neither number divides the other.

    Examples:
        >>> from prefixcore.serving.heads import local_heads
        >>> local_heads(8, 2, 1)
        slice(4, 8, None)
        >>> local_heads(2, 8, 5)  # each head is held by four workers
        slice(1, 2, None)
    """
    larger, smaller = max(num_kv_heads, tensor_parallel), min(num_kv_heads, tensor_parallel)
    if larger % smaller:
        raise ValueError(f"{num_kv_heads} key/value heads cannot be dealt out to {tensor_parallel} workers")
    if num_kv_heads >= tensor_parallel:
        count = num_kv_heads // tensor_parallel
        return slice(rank * count, (rank + 1) * count)
    head = rank // (tensor_parallel // num_kv_heads)
    return slice(head, head + 1)
