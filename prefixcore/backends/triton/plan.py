"""Records a plan: whatever a path does between its arguments and its results, taken down below the dispatcher.

PyTorch's ops are seen by a `TorchDispatchMode`, our launches and vendors' calls by `recording.py`. Every tensor is
traced back to the value whose memory it shares: an argument of the op, or what a step has made. Views take no step;
memory is allocated anew, everything else is launched or called again. What cannot be said in these terms is no plan:
`NotKept` says why, and the path itself has run all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from . import calls, recording
from .plan_words import Address, Call, Kernel, Measure, Memory, NotKept, Plan, Release, Step, View
from .recording import Measured

_ALLOCATIONS = frozenset(
    f"aten::{name}" for name in ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")
)
"""Ops whose results hold nothing yet."""

_QUESTIONS = frozenset(("aten::_fused_sdp_choice", "aten::is_same_size"))
"""Ops that answer with a number, from the shapes of their tensors and from switches of PyTorch's (`replay.py`)."""

LaunchReader = Callable[[Any, Any, int, dict[str, Any], Callable[[Tensor], Address], dict[str, Any] | None], Kernel]
"""Makes a `Kernel` of a launch: `plan_kernel.kernel_of`."""


class _Made(NamedTuple):
    """What is known of a value."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> _Made:
        return cls(x.shape, x.stride(), x.dtype, x.device)


class PlanRecorder(TorchDispatchMode):
    """Takes down what happens in its `with` block; then `plan` gives the plan."""

    def __init__(self, arguments: Sequence[Any], read_launch: LaunchReader) -> None:
        super().__init__()
        self._read_launch = read_launch
        tensors = [x for x in arguments if x is None or isinstance(x, Tensor)]
        self._arguments = self._values = len(tensors)
        self._steps: list[Step] = []
        self._numbers: list[int] = []  # of calls
        self.kernels: list[Any] = []  # what Triton has compiled
        self._of = WeakTensorKeyDictionary()  # a tensor's value, and how many bytes into it it begins; keeps none alive
        self._made: dict[int, _Made] = {}  # values, as they were made
        self._problem: str | None = None
        self._device = next(x.device for x in tensors if x is not None)
        for value, x in enumerate(tensors):
            if x is not None:
                self._know(x, value, 0)
                self._made[value] = _Made.of(x)

    def __enter__(self) -> PlanRecorder:
        super().__enter__()
        recording.here.recorder = self
        return self

    def __exit__(self, *failure: Any) -> None:
        recording.here.recorder = None
        super().__exit__(*failure)

    # --- what is seen ---------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._take_down(self._op, func, args, kwargs, result)
        return result

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        with _disable_current_modes():
            result = function(*arguments, **keywords)
        name = getattr(function, "__qualname__", repr(function))
        self._take_down(self._call, name, function, arguments, keywords, result)
        return result

    def launch(
        self, kernel: Any, programs: int, arguments: dict[str, Any], options: dict[str, Any],
        measured: dict[str, Any] | None,
    ) -> None:  # fmt: skip
        with _disable_current_modes():
            compiled = kernel[(programs,)](**arguments, **options)
        self._take_down(self._launch, kernel, compiled, programs, arguments, measured)

    def _take_down(self, take_down: Callable[..., None], *what: Any) -> None:
        """The first problem is the one that is told; what a path does is never disturbed by it."""
        if self._problem is None:
            try:
                with _disable_current_modes():
                    take_down(*what)
            except NotKept as problem:
                self._problem = str(problem)

    # --- what it means --------------------------------------------------------------------------------------

    def _launch(
        self, kernel: Any, compiled: Any, programs: int, arguments: dict[str, Any], measured: dict[str, Any] | None
    ) -> None:
        measures = None if measured is None else self._measures(measured)
        self._steps.append(self._read_launch(kernel, compiled, programs, arguments, self._address, measures))
        self.kernels.append(compiled)

    def _op(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = func.name().split(".")[0]
        if name in _QUESTIONS:
            return
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        results = calls.tensors_of(result)
        if not results:
            raise NotKept(f"{name} looks at what is in a tensor")
        if all(x.is_meta for x in results):  # looked at for their strides, and never for what is in them
            return
        if name in _ALLOCATIONS:
            for x in results:
                self._allocated(x)
        elif func._schema.is_mutable or not all(self._share(x, given) for x in results):
            self._call(name, func, args, kwargs, result)
        else:
            for x in results:
                self._view(x, self._source(x, given))

    def _call(self, name: str, function: Callable[..., Any], arguments: Any, keywords: Any, result: Any) -> None:
        number, tensors = calls.add(function, arguments, keywords)
        self._numbers.append(number)
        views = tuple(self._as_view(x) for x in tensors)
        if not views:  # the dispatcher finds its way by a tensor: any will do
            views = (View(next(v for v, x in self._made.items() if x.device == self._device)),)
        made = []
        for x in calls.tensors_of(result):
            if self._share(x, tensors):  # another handle of what is a value already
                value, offset = self._find(self._source(x, tensors))
                made.append(self._new_value(x))
                self._know(x, value, offset)
            else:
                made.append(self._new_value(x))
        self._steps.append(Call(name, number, views, tuple(made)))

    def _allocated(self, x: Tensor) -> None:
        if x.device != self._device:
            raise NotKept(f"memory on {x.device}")
        value = self._new_value(x)
        self._steps.append(Memory(value, x.dtype, tuple(x.shape), x.stride()))

    def _view(self, x: Tensor, source: Tensor) -> None:
        value, offset = self._find(source)
        self._know(x, value, offset + x.data_ptr() - source.data_ptr() if x.numel() and source.numel() else offset)

    def _source(self, x: Tensor, given: Sequence[Tensor]) -> Tensor:
        """Which of the tensors that an op was given `x` is a view of; those of two arguments may share memory."""
        sources = [y for y in given if _same_memory(x, y)]
        same = next((y for y in sources if y is x), sources[0])
        if same is not x and len({self._find(y)[0] for y in sources}) > 1:
            raise NotKept("two of its arguments share memory, and one cannot tell which of them is meant")
        return same

    def _share(self, x: Tensor, given: Sequence[Tensor]) -> bool:
        return any(_same_memory(x, y) for y in given)

    # --- values ---------------------------------------------------------------------------------------------

    def _know(self, x: Tensor, value: int, offset: int) -> None:
        self._of[x] = (value, offset)

    def _new_value(self, x: Tensor) -> int:
        value = self._values
        self._values += 1
        self._made[value] = _Made.of(x)
        self._know(x, value, 0)
        return value

    def _find(self, x: Tensor) -> tuple[int, int]:
        found: tuple[int, int] | None = self._of.get(x)
        if found is None:
            raise NotKept("it uses a tensor that is neither an argument nor made by the call")
        return found

    def _address(self, x: Tensor) -> Address:
        return Address(*self._find(x))

    def _measures(self, x: Any) -> Any:
        """`x` with a `Measure` for each `Measured`; None if one is not that of an argument as it came in."""
        if isinstance(x, dict):
            by_name = {name: self._measures(inner) for name, inner in x.items()}
            return None if None in by_name.values() else by_name
        if not isinstance(x, Measured):
            in_order = [False if inner is None else self._measures(inner) for inner in x]
            return None if None in in_order else tuple(in_order)
        value, offset = self._find(x.of)
        whole = self._made[value]
        same = offset == 0 and x.of.shape == whole.shape and x.of.stride() == whole.stride
        return Measure(value, x.kind, x.dim) if same and value < self._arguments else None

    def _as_view(self, x: Tensor) -> View:
        value, offset = self._find(x)
        whole = self._made[value]
        if x.dtype != whole.dtype or offset % x.element_size():
            raise NotKept("it hands on a tensor under another dtype")
        if offset == 0 and x.shape == whole.shape and x.stride() == whole.stride:
            return View(value)
        return View(value, tuple(x.shape), x.stride(), offset // x.element_size())

    # --- the plan -------------------------------------------------------------------------------------------

    def plan(self, results: Sequence[Tensor]) -> tuple[Plan, list[int]]:
        """The plan of a call that has returned `results`, and the numbers of its calls. NotKept: there is none."""
        if self._problem is None:
            try:
                with _disable_current_modes():
                    views = tuple(self._as_view(x) for x in results)
            except NotKept as problem:
                self._problem = str(problem)
        if self._problem is None and any(view.value < self._arguments for view in views):
            self._problem = "it returns an argument"
        if self._problem is not None:
            calls.forget(self._numbers)
            raise NotKept(self._problem)
        plan = Plan(self._arguments, self._values, tuple(self._released(views)), views)
        return plan, self._numbers

    def _released(self, results: Sequence[View]) -> list[Step]:
        """The steps, each followed by the release of what no later one needs, as Python would free it."""
        last: dict[int, int] = {}
        for number, step in enumerate(self._steps):
            for value in _uses(step):
                last[value] = number
        kept = {view.value for view in results}
        out: list[Step] = []
        for number, step in enumerate(self._steps):
            out.append(step)
            done = [v for v in sorted(last) if last[v] == number and v >= self._arguments and v not in kept]
            if done and number + 1 < len(self._steps):
                out.append(Release(tuple(done)))
        return out


def _same_memory(x: Tensor, y: Tensor) -> bool:
    return x is y or x.untyped_storage()._cdata == y.untyped_storage()._cdata


def _uses(step: Step) -> list[int]:
    if isinstance(step, Memory):
        return [step.value]
    if isinstance(step, Kernel):
        return [p.value for p in step.parameters if isinstance(p, Address)]
    if isinstance(step, Call):
        return [*(view.value for view in step.arguments), *step.results]
    return []
