"""What a call costs before the GPU has anything to do: `python -m tests.backends.triton.stand_in.cost`.

Triton compiles for a GPU that is not there, the stand-in takes launches and does nothing, tensors are the CPU's: what
is left is Python, PyTorch and this package. Interleaved, medians: the ordinary way, by its plan, and PyTorch's own
attention on the CPU for orientation, of sizes whose arithmetic is nothing. The counts are of `sys.setprofile`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from tests.backends.triton import stand_in
from tests.backends.triton.stand_in.compiled import use_stand_in

ROUNDS, CALLS = 15, 40


def calls_of(work: Callable[[], object]) -> int:
    """The Python functions, and those of C that Python calls, that `work` goes through on this thread."""
    count = 0

    def counted(frame: Any, event: str, what: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    work()
    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def measured(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds a call, interleaved: the median of rounds."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        for _ in range(5):
            work()
    for _ in range(ROUNDS):
        for name, work in works.items():
            begin = time.perf_counter()
            for _ in range(CALLS):
                work()
            times[name].append((time.perf_counter() - begin) / CALLS * 1e6)
    return {name: statistics.median(rounds) for name, rounds in times.items()}


def main() -> None:
    use_stand_in()
    import prefixcore
    from prefixcore.backends.triton import choose, replay
    from prefixcore.backends.triton.plan_kernel import kernel_of
    from tests.device import triton_backend

    torch.set_num_threads(1)

    def ordinarily(work: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with replay.use_replay(False):
                return work()

        return run

    print(f"{'call':36} {'ordinary':>10} {'replayed':>10} {'SDPA':>8}   calls: ordinary, replayed")
    with triton_backend(), replay.use_replay(True):
        replay._switch.read_launch = kernel_of
        for path, T, S in (("single", 4, 4), ("merged", 4, 4), ("decode", 1, 4)):
            query = torch.randn(1, 2, T, 16)
            key, value = torch.randn(2, 1, 2, S, 16)
            prefix = torch.randn(2, 2, 16)
            leaves = [x.clone().requires_grad_() for x in (query, key, value, prefix, prefix)]
            grad = torch.ones_like(query)

            def forward() -> object:
                return prefixcore.prefix_attention(query, key, value, prefix, prefix)  # noqa: B023

            def both() -> object:
                out = prefixcore.prefix_attention(*leaves)  # noqa: B023
                return torch.autograd.grad(out, leaves, grad)  # noqa: B023

            def sdpa() -> object:
                return functional.scaled_dot_product_attention(query, key, value)  # noqa: B023

            def sdpa_both() -> object:
                out = functional.scaled_dot_product_attention(*leaves[:3])  # noqa: B023
                return torch.autograd.grad(out, leaves[:3], grad)  # noqa: B023

            with choose.use_path(path):
                for name, ours, theirs in (("forward", forward, sdpa), ("forward and backward", both, sdpa_both)):
                    works = {"ordinary": ordinarily(ours), "replayed": ours, "SDPA": theirs}
                    us = measured(works)
                    counts = [calls_of(works["ordinary"]), calls_of(works["replayed"])]
                    row = f"{us['ordinary']:8.0f}us {us['replayed']:8.0f}us {us['SDPA']:6.0f}us"
                    print(f"{path + ', ' + name:36} {row}   {counts[0]}, {counts[1]}")
        for op, why, times in replay.not_kept():
            print("not kept:", op, why, times)


if __name__ == "__main__":
    stand_in.driver()
    main()
