"""The paths that are measured one beside the other, each forced; and what a tree lacks of them."""

from __future__ import annotations

from bench.attention_problem import Problem
from bench.timing import Call
from prefixcore.backends.problem import attention_problem
from prefixcore.backends.triton import PATHS, choose, use_path

from .attention import inputs
from .conftest import LeftOut
from .parts import PATHS as KNOWN

FORCED = tuple(path for path in dict.fromkeys((*KNOWN, *PATHS)) if not path.startswith("decode"))
"""Those that train; decoding has a part of its own."""


def reference_name(path: str) -> str:
    """How the figures name a forced path among what ours is measured beside."""
    return f"{path} path"


def forced(path: str, call: Call) -> Call:
    """`call`, forward and backward by that path."""

    def run() -> None:
        with use_path(path):
            call()

    return run


def taken(problem: Problem, *, backward: bool) -> dict[str, tuple[str, str]]:
    """By `forward` and, where it is timed, `backward`: the path that the problem goes by, and why, in words."""
    p = attention_problem(**inputs(problem, gradients=False))
    paths = {"forward": choose.forward(p)}
    if backward:
        paths["backward"] = choose.backward(p, all_three=True, grad_lse=False)
    return {which: (found.name, found.why) for which, found in paths.items()}


def refusal(path: str, problem: Problem, *, backward: bool) -> str | None:
    """Why a problem cannot go by a path, in words, or None if it can: it is timed only where all of it does."""
    if path not in PATHS:
        return f"this tree has no path {path!r}"
    try:
        with use_path(path):
            found = taken(problem, backward=backward)
    except (ValueError, ImportError) as error:
        return str(error)
    which, (name, why) = list(found.items())[-1]  # a path of the backward alone has another's forward
    return None if name == path else f"its {which} goes by the {name} path: {why}"


def possible(problem: Problem, left_out: LeftOut, *, backward: bool) -> list[str]:
    """Those of `FORCED` that the problem can go by; the others are left out by name."""
    refused = {path: refusal(path, problem, backward=backward) for path in FORCED}
    for path, why in refused.items():
        if why:
            left_out(f"by the {path} path", why)
    return [path for path, why in refused.items() if not why]
