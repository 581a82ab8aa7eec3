"""Plans of calls, kept and replayed: what the first call of a signature found out is not found out again.

Python needs a hundred times as long for a launch as the driver does: it chooses a path, makes views, specialises some
sixty arguments. The first call of a signature goes that way and is recorded (`plan.py`); the C++ (`csrc/launch/`)
keeps its plan and replays it for later ones: looks it up, allocates, puts addresses into the parameters, launches.

A signature is all that a path may depend on: the op; of each tensor its shape, strides, dtype, device and its address
modulo 16, or that it is not there; the options and which gradients are wanted; and the state below. `PREFIXCORE_REPLAY`
and `use_replay` are the switch.
"""

from __future__ import annotations

import os
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import gradients, library
from . import calls, recording
from .plan import LaunchReader, PlanRecorder
from .plan_words import Call, Kernel, NotKept, Plan

BY_DEFAULT = False
"""Whether plans are replayed where nobody says. Off until a GPU has run the tests with it."""

SWITCH = "PREFIXCORE_REPLAY"


def _asked() -> bool:
    word = os.environ.get("PREFIXCORE_REPLAY", "")
    if word not in ("", "0", "1"):
        raise ValueError(f"{SWITCH}: expected 0 or 1, got {word!r}")
    return BY_DEFAULT if word == "" else word == "1"


class _Switch:
    """Whether plans are replayed; and in tests, what reads launches that stand in for Triton's, of CPU tensors."""

    def __init__(self) -> None:
        self.on: bool | None = None  # None: as the environment says, which is asked at the first call
        self.read_launch: LaunchReader | None = None


_switch = _Switch()


class Kept(NamedTuple):
    """A plan that is kept, as `prefixcore doctor` shows it."""

    op: str
    signature: str
    steps: str
    replays: int


class _Known(NamedTuple):
    op: str
    signature: str
    plan: Plan
    calls: list[int]
    kernels: list[Any]  # Triton's, so that they stay loaded


_ops: dict[str, tuple[Any, int]] = {}  # by name: the op that replays it, and how many results it has
_lock = threading.Lock()
_plans: dict[int, _Known] = {}  # by the number that the C++ gave
_refused: Counter[tuple[str, str]] = Counter()  # op and reason


def is_on() -> bool:
    """Whether plans are recorded and replayed."""
    if _switch.on is None:
        _turn(_asked())
    return bool(_switch.on)


def _turn(on: bool | None) -> None:
    _switch.on = on
    gradients.shortcut = _shortcut if on else None


@contextmanager
def use_replay(on: bool) -> Iterator[None]:
    """Replays plans, or does not, inside a `with` block; for the whole process while it runs."""
    before = _switch.on
    _turn(bool(on))
    try:
        yield
    finally:
        _turn(before)


# --- what plans depend on beside the call's arguments -------------------------------------------------

_c: Any = torch._C
_READ = (
    _c._get_deterministic_algorithms,
    _c._get_cudnn_sdp_enabled,
    _c._get_flash_sdp_enabled,
    _c._get_mem_efficient_sdp_enabled,
    _c._get_math_sdp_enabled,
)
_priority: Callable[[], Any] = getattr(_c, "_get_sdp_priority_order", lambda: ())
_states: dict[Any, int] = {}


def state() -> int:
    """A number for the state of PyTorch's switches and ours; equal states have equal numbers."""
    now = (
        *[read() for read in _READ],
        tuple(_priority()),
        *[read() for read in recording.state()],
    )
    number = _states.get(now)
    if number is None:
        with _lock:
            number = _states.setdefault(now, len(_states) + 1)
    return number


# --- calls --------------------------------------------------------------------------------------------


def applies(x: Tensor) -> bool:
    """Whether a call on the device of `x` may have a plan."""
    return is_on() and (x.is_cuda or _switch.read_launch is not None)


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float))
_modes: Callable[[], int] = _c._len_torch_dispatch_stack
_transforms: Callable[[], bool] = _c._are_functorch_transforms_active


def _shortcut(name: str, arguments: tuple[Any, ...]) -> Any:
    """`replayed`, for eager code: spares it the dispatcher's way into Python. Not where somebody else looks on."""
    if not (arguments[0].is_cuda or _switch.read_launch is not None):
        return None
    if _modes() or _transforms() or not _PLAIN.issuperset(map(type, arguments)):
        return None
    return replayed(name, arguments)


def replayed(name: str, arguments: tuple[Any, ...]) -> Any:
    """What the plan of this call computes, or None if there is none."""
    op, results = _ops.get(name) or _find_op(name)
    out = op(*arguments, state())
    return None if (out if results == 1 else out[0]) is None else out


def run(name: str, path: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """`path(*arguments)`, replayed if it has a plan, and recorded if it may get one."""
    out = replayed(name, arguments)
    if out is not None:
        return out
    host = library.host()
    ticket = host.plan_wanted()
    if failure := host.plan_failure():
        _refused[name, f"its replay failed: {failure}"] += 1
    return _record(name, path, arguments, ticket) if ticket else path(*arguments)


def _find_op(name: str) -> tuple[Any, int]:
    op = getattr(torch.ops.prefixcore, f"replay_{name}").default
    _ops[name] = op, len(op._schema.returns)
    return _ops[name]


def _record(name: str, path: Callable[..., Any], arguments: tuple[Any, ...], ticket: int) -> Any:
    from .plan_kernel import kernel_of

    host = library.host()
    arguments = _distinct(arguments)
    recorder = PlanRecorder(arguments, _switch.read_launch or kernel_of)
    kept = False
    try:
        with recorder:
            out = path(*arguments)
        try:
            plan, numbers = recorder.plan([out] if isinstance(out, Tensor) else out)
            words = array("q", plan.words()).tobytes()
        except NotKept as reason:
            _refused[name, str(reason)] += 1
            return out
        with _lock:
            number = host.plan_keep(ticket, words, plan.any_length)
            kept = True
            signature = _describe(arguments) + (" and other lengths" if plan.any_length else "")
            _plans[number] = _Known(name, signature, plan, numbers, recorder.kernels)
            _drop_what_is_gone(host)
        return out
    finally:
        if not kept:
            host.plan_keep(ticket, b"")


def _distinct(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, no tensor twice: a later call of the same signature may bring two in its place."""
    seen: set[int] = set()
    out = []
    for x in arguments:
        out.append(torch.ops.aten.alias.default(x) if isinstance(x, Tensor) and id(x) in seen else x)
        seen.add(id(x))
    return tuple(out)


def _drop_what_is_gone(host: Any) -> None:
    """Plans that the C++ has let go, and what their calls hold."""
    alive = {number for number, _, _ in host.plans()}
    for number in [n for n in _plans if n not in alive]:
        calls.forget(_plans.pop(number).calls)


def _describe(arguments: tuple[Any, ...]) -> str:
    """The tensors of a call, and its options that are on, in a few words."""
    words = []
    for x in arguments:
        if isinstance(x, Tensor):
            words.append(f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}".replace(", ", ","))
        elif x is not None and x is not False and x != 0:
            words.append(f"{x:g}" if isinstance(x, float) else str(x))
    return " ".join(words)


# --- what can be asked --------------------------------------------------------------------------------


def kept() -> list[Kept]:
    """The plans that are kept, the last used first."""
    found = []
    for number, hits, _ in library.host().plans():
        if number in _plans:
            known = _plans[number]
            steps = [step.name for step in known.plan.steps if isinstance(step, Call | Kernel)]
            found.append(Kept(known.op, known.signature, ", ".join(steps), hits))
    return found


def not_kept() -> list[tuple[str, str, int]]:
    """`(op, why, how often)` for calls that got no plan."""
    return [(op, why, count) for (op, why), count in sorted(_refused.items())]


def limit() -> int:
    """How many signatures are known at most; the one that was used longest ago is forgotten for a new one."""
    return library.host().plans_limit()


def forget() -> None:
    """Forgets all plans."""
    with _lock:
        library.host().plans_forget()
        for known in _plans.values():
            calls.forget(known.calls)
        _plans.clear()
        _refused.clear()


def _forget_in_child() -> None:
    """The child of a fork begins with none, as the C++ does."""
    global _lock
    _lock = threading.Lock()
    _plans.clear()
    _refused.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
