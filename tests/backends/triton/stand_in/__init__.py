"""A stand-in for NVIDIA's driver (`driver.cpp`), for tests of replay where there is no GPU.

CPU tensors stand for device tensors. A kernel that plans launch has a number here; launching it has Triton's
interpreter run it, on the memory and with the numbers that stand in the parameters: replayed results have real values.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixcore.backends.triton import replay
from prefixcore.backends.triton.plan_words import Address, Constant, Kernel, Parameter

HERE = Path(__file__).parent
VARIABLE = "PREFIXCORE_STAND_IN_DRIVER"


class Launch(NamedTuple):
    """What the driver was asked to do: `words` are eight bytes a parameter."""

    function: int
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]
    shared: int
    stream: int
    words: tuple[int, ...]
    attributes: int


class _CLaunch(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_uint64), ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32), ("stream", ctypes.c_uint64), ("parameters", ctypes.POINTER(ctypes.c_void_p)),
        ("attributes", ctypes.c_int32),
    )  # fmt: skip


_ON_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.POINTER(_CLaunch))


@functools.cache
def library() -> Path:
    """The compiled stand-in, made anew when its source has changed."""
    target = HERE.parents[3] / "build" / "stand_in" / "libcuda.so.1"
    source = HERE / "driver.cpp"
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        target.parent.mkdir(parents=True, exist_ok=True)
        new = target.with_suffix(f".{os.getpid()}")
        compiler = os.environ.get("CXX") or next(c for c in ("g++", "clang++", "c++") if shutil.which(c))
        command = [*compiler.split(), "-std=c++17", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*command, str(source), "-o", str(new)], check=True)
        new.rename(target)
    return target


@functools.cache
def driver() -> ctypes.CDLL:
    """The stand-in, in the driver's place for the whole process."""
    os.environ[VARIABLE] = str(library())
    return ctypes.CDLL(str(library()))


@contextmanager
def on_launch(function: Callable[[Launch], None], parameters: Callable[[int], int]) -> Iterator[None]:
    """Has `function` hear of every launch in the block; `parameters` says how many a kernel has."""

    def heard(launch: Any) -> int:
        try:
            c = launch.contents
            words = []
            for n in range(parameters(c.function)):
                words.append(ctypes.c_uint64.from_address(c.parameters[n]).value)
            grid, block = tuple(c.grid), tuple(c.block)
            function(Launch(c.function, grid, block, c.shared, c.stream, tuple(words), c.attributes))
        except Exception:  # nothing may be raised into C
            import traceback

            traceback.print_exc()
            return 1
        return 0

    callback = _ON_LAUNCH(heard)
    driver().stand_in_on_launch(callback)
    try:
        yield
    finally:
        driver().stand_in_on_launch(_ON_LAUNCH())


# --- interpreted kernels, launched by their numbers ----------------------------------------------------


class _Leaf(NamedTuple):
    """How a parameter becomes an argument again."""

    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    kind: type = int


class _Known(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]  # with a leaf for each parameter, and constants as they are
    constexprs: frozenset[str]


class Interpreted:
    """Reads launches for a recorder, and runs those of a replay; keeps what it has heard in `launches`."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self._known: dict[int, _Known] = {}
        self._numbers: dict[Any, int] = {}
        self._counts: dict[int, int] = {}

    def read(
        self, kernel: Any, compiled: Any, programs: int, arguments: dict[str, Any], address_of: Callable[..., Address],
        measures: dict[str, Any] | None = None,
    ) -> Kernel:  # fmt: skip
        parameters: list[Parameter] = []
        constexprs = {name for name in arguments if name.isupper()}

        def leaf(x: Any, measure: Any = None) -> Any:
            if isinstance(x, tuple):
                inner = [leaf(y, m) for y, m in zip(x, measure or (None,) * len(x), strict=True)]
                return type(x)(*inner) if hasattr(x, "_fields") else tuple(inner)
            if x is None:
                return None
            if isinstance(x, Tensor):
                parameters.append(address_of(x))
                return _Leaf(tuple(x.shape), x.stride(), x.dtype)
            packed = struct.pack("<d", x) if isinstance(x, float) else struct.pack("<q", int(x))
            parameters.append(measure or Constant(int.from_bytes(packed, "little")))
            return _Leaf(kind=type(x))

        given = measures or {}
        template = {name: x if name in constexprs else leaf(x, given.get(name)) for name, x in arguments.items()}
        key = repr((kernel.fn.__name__, template))
        number = self._numbers.setdefault(key, 0x5000 + len(self._numbers))
        self._known[number] = _Known(kernel, template, frozenset(constexprs))
        self._counts[number] = len(parameters)
        return Kernel(kernel.fn.__name__, number, programs, 32, 0, tuple(parameters), measures is not None)

    def run(self, launch: Launch) -> None:
        self.launches.append(launch)
        kernel, template, constexprs = self._known[launch.function]
        words = iter(launch.words)

        def value(x: Any) -> Any:
            if isinstance(x, _Leaf):
                word = next(words)
                if x.dtype is not None:
                    return _tensor_at(word, x)
                packed = word.to_bytes(8, "little")
                return struct.unpack("<d", packed)[0] if x.kind is float else x.kind(struct.unpack("<q", packed)[0])
            if isinstance(x, tuple):
                inner = [value(y) for y in x]
                return type(x)(*inner) if hasattr(x, "_fields") else tuple(inner)
            return x

        arguments = {name: x if name in constexprs else value(x) for name, x in template.items()}
        kernel[(launch.grid[0],)](**arguments)

    def count(self, number: int) -> int:
        return self._counts[number]


def _tensor_at(address: int, leaf: _Leaf) -> Tensor:
    assert leaf.dtype is not None
    if 0 in leaf.shape:
        return torch.empty(leaf.shape, dtype=leaf.dtype)
    last = sum((size - 1) * stride for size, stride in zip(leaf.shape, leaf.stride, strict=True))
    memory = (ctypes.c_char * ((last + 1) * leaf.dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=leaf.dtype).as_strided(leaf.shape, leaf.stride)


@contextmanager
def replaying(on: bool = True) -> Iterator[Interpreted]:
    """CPU tensors have plans, whose kernels are interpreted."""
    driver()
    stand_in = Interpreted()
    replay.forget()
    with on_launch(stand_in.run, stand_in.count), replay.use_replay(on):
        replay._switch.read_launch = stand_in.read
        try:
            yield stand_in
        finally:
            replay._switch.read_launch = None
            replay.forget()
