"""What a compiled Triton kernel needs, remembered by what it was compiled from: see ``tests/compiler_cache.py``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import triton

from tests.compiler_cache import digest, remembered

_compiled_here: dict[str, dict[str, Any]] = {}


def remember(
    compile_kernel: Callable[[], Any],
    measure: Callable[[Any], dict[str, int]],
    recorded: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """``measure(compile_kernel())``; neither is done where the same kernel was measured before.

    It was where ``recorded`` is ``of`` the same, a digest of all that the kernel is compiled from.

    Triton's hook comes once everything is known that the machine code depends on: the text of the kernel and of what it
    calls, the types and constants, the options and the target. Where it returns True nothing is compiled.
    """
    asked: list[str] = []

    def look_up(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        target, ptxas = triton.runtime.driver.active.get_current_target(), triton.knobs.nvidia.ptxas.version
        special = _anywhere(compile["specialization_data"])
        asked[:] = [triton.__version__, ptxas, str(target), fn.jit_function.cache_key, special]
        return True

    hooks = triton.knobs.runtime
    hooks.jit_cache_hook = look_up
    try:
        compiled = compile_kernel()
    finally:
        hooks.jit_cache_hook = None
    if compiled is not None:  # by this process, a moment ago: then the hook is not asked
        return _compiled_here[compiled.hash]
    of = {"of": digest(*asked)[:16]}
    if recorded is not None and recorded.get("of") == of["of"]:
        return dict(recorded)

    def compile_and_measure() -> dict[str, int]:
        binary = compile_kernel()
        needs = measure(binary)
        _compiled_here[binary.hash] = needs | of
        return needs

    return remembered("triton", asked, compile_and_measure) | of


def _anywhere(specialization: str) -> str:
    """The same JSON wherever Triton is installed: its options name the file of its device library."""
    folder = json.dumps(str(Path(triton.__file__).parent))[1:-1]
    return specialization.replace(folder, "triton")
