"""What a compiled Triton kernel needs, remembered by what it was compiled from: see ``tests/compiler_cache.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton

from tests.compiler_cache import remembered


def remember(compile_kernel: Callable[[], Any], measure: Callable[[Any], dict[str, int]]) -> dict[str, int]:
    """``measure(compile_kernel())``; neither is done where the same kernel was measured before.

    Triton's hook comes once everything is known that the machine code depends on: the text of the kernel and of what it
    calls, the types and constants, the options and the target. Where it returns True nothing is compiled.
    """
    asked: list[str] = []

    def look_up(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        target, ptxas = triton.runtime.driver.active.get_current_target(), triton.knobs.nvidia.ptxas.version
        asked[:] = [triton.__version__, ptxas, str(target), fn.jit_function.cache_key, compile["specialization_data"]]
        return True

    hooks = triton.knobs.runtime
    hooks.jit_cache_hook = look_up
    try:
        compiled = compile_kernel()
    finally:
        hooks.jit_cache_hook = None
    if compiled is not None:  # by this process, a moment ago: then the hook is not asked
        return measure(compiled)
    return remembered("triton", asked, lambda: measure(compile_kernel()))
