"""What is trained, whole: where its numbers are sharded over processes, or kept elsewhere by accelerate's hooks."""

from __future__ import annotations

import copy
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import AdapterError
from .weights import is_partitioned, is_sharded, offloaded

PATIENCE = 60.0
"""Seconds that a process waits for the others, whose shards it needs."""

_calls = 0
"""How often this process has met the others."""

M = TypeVar("M", bound=nn.Module)


def whole_module(module: M) -> M:
    """`module` itself if each of its tensors is whole here and stays so, else a copy on the CPU whose tensors are.

    Raises:
        AdapterError: a tensor is sharded and another process does not call too, or has no data.
    """
    tensors = list(_tensors(module))
    if not any(tensor.is_meta or is_sharded(tensor) or _comes_and_goes(tensor) for _, _, tensor in tensors):
        return module
    if any(_needs_others(tensor) for _, _, tensor in tensors):
        _meet()
    memo: dict[int, Any] = {}  # what a copy puts in place of each tensor
    for owner, name, tensor in tensors:
        whole = _whole(owner, name, tensor).detach().cpu()
        memo[id(tensor)] = nn.Parameter(whole, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else whole
    copied = copy.deepcopy(module, memo)
    for each in copied.modules():  # what gathers and frees parameters knows nothing of these
        for hooks in (each._forward_hooks, each._forward_pre_hooks, each._backward_hooks, each._backward_pre_hooks):
            hooks.clear()
    return copied


def _tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for owner in module.modules():
        for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None:
                yield owner, name, tensor


def _whole(owner: nn.Module, name: str, tensor: Tensor) -> Tensor:
    if is_sharded(tensor):
        full: Any = tensor
        return full.full_tensor()
    if is_partitioned(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    if tensor.is_meta:
        kept = offloaded(owner, name)
        if kept is None:
            raise AdapterError(f"{name} of the virtual tokens has no values (it is on the meta device)")
        return kept
    return tensor.detach().clone() if _comes_and_goes(tensor) else tensor


def _comes_and_goes(tensor: Tensor) -> bool:
    """Whether it is a parameter of DeepSpeed's ZeRO-3, which may take its numbers away in any call of its module."""
    return getattr(tensor, "ds_shape", None) is not None


def _needs_others(tensor: Any) -> bool:
    if is_partitioned(tensor):
        return True
    return is_sharded(tensor) and any(not placement.is_replicate() for placement in tensor.placements)


def are_in_parts(modules: Iterable[nn.Module]) -> bool:
    """Whether every process has a part of some tensor, so that all of them save it together."""
    return any(_needs_others(tensor) for module in modules for _, _, tensor in _tensors(module))


@contextmanager
def one_writer(modules: Iterable[nn.Module], target: Path) -> Iterator[bool]:
    """A block in which a folder is written: whether by this process.

    What is sharded is saved by every process, and written by one of those that name the same folder on the same
    machine. The others leave the block when it is written.

    Raises:
        AdapterError: another process was to write, and could not.
    """
    if not are_in_parts(modules):
        yield True
        return
    from torch.distributed import distributed_c10d as c10d

    place = f"{socket.gethostname()}:{target}"
    call, places = _meet(place)
    writer, store = places.index(place), c10d._get_default_store()
    done = f"prefixcore/written/{call}/{writer}"
    if writer != c10d.get_rank():
        yield False
        try:
            store.wait([done], timedelta(seconds=PATIENCE))
            why = store.get(done).decode()
        except (RuntimeError, torch.distributed.DistError):
            why = f"it is not done within {PATIENCE:g} seconds"
        if why:
            raise AdapterError(f"{target}: process {writer}, which was to write the adapter, has not: {why}")
        return
    why = "it was stopped"
    try:
        yield True
        why = ""
    except Exception as error:
        why = str(error) or type(error).__name__
        raise
    finally:
        store.set(done, why)


def _meet(saying: str = "here") -> tuple[int, list[str]]:
    """Waits until every process has come here, so that none begins to gather alone, which would never end.

    Through the store that all of them share, since a collective operation that is given up leaves the next one broken.

    Returns:
        Which meeting it is, and what each process says.
    """
    global _calls
    from torch.distributed import distributed_c10d as c10d

    rank, size = c10d.get_rank(), c10d.get_world_size()
    store, call = c10d._get_default_store(), _calls
    _calls += 1
    store.set(f"prefixcore/save/{call}/{rank}", saying)
    end = time.monotonic() + PATIENCE
    said = []
    for other in range(size):
        try:
            left = max(0.001, end - time.monotonic())
            store.wait([f"prefixcore/save/{call}/{other}"], timedelta(seconds=left))
            said.append(store.get(f"prefixcore/save/{call}/{other}").decode())
        except (RuntimeError, torch.distributed.DistError):
            _calls -= 1
            store.delete_key(f"prefixcore/save/{call}/{rank}")
            raise AdapterError(
                f"the virtual tokens are sharded over {size} processes, and process {other} has not called save within "
                f"{PATIENCE:g} seconds: call it in every process, not in one alone"
            ) from None
    return call, said
