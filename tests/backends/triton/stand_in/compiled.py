"""Triton itself where there is no GPU: it compiles for one, its own launcher packs the parameters, the stand-in hears.

Run as a script, without the interpreter: for each case it makes a call the ordinary way and twice by its plan, on the
same tensors, and prints as JSON what the driver was asked to launch each time.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

import torch

from tests.backends.triton import stand_in

CASES: dict[str, dict[str, Any]] = {
    "single": {"path": "single", "T": 16, "P": 5},
    "odd": {"path": "single", "T": 17, "P": 1, "H": 3, "Hkv": 1, "D": 80, "scale": 0.3, "softcap": 3.0},
    "decode": {"path": "decode", "T": 1, "S": 40, "P": 20, "sliding_window": 7},
    "growing": {"path": "decode", "T": 1, "S": 33, "P": 20, "mask": "padding", "then": (41, 63)},
    "growing, once": {"path": "decode_once", "T": 2, "S": 33, "P": 20, "mask": "additive", "then": (41, 63)},
    "merged": {"path": "merged", "T": 33, "P": 20, "heads_last": True},
    "bank": {"path": "single", "N": 3, "index": True, "lengths": True, "B": 5, "T": 12, "mask": "padding"},
    "packed": {"path": "single", "packed": (5, 1, 0, 33), "N": 2, "index": True, "sinks": True},
    "mask": {"path": "single", "mask": "additive", "dtype": torch.bfloat16, "T": 20},
}


def use_stand_in(capability: int = 90) -> None:
    """Triton takes the stand-in for a GPU, of compute capability 9.0 if nobody says."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(stand_in.library().parent)
    stand_in.driver()
    import ctypes

    ctypes.CDLL(str(stand_in.library()), mode=ctypes.RTLD_GLOBAL)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class Driver(CudaDriver):
        def __init__(self) -> None:
            self.utils = CudaUtils()
            self.launcher_cls = CudaLauncher

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, device: int) -> None:
            assert device == 0

        def get_current_stream(self, device: int) -> int:
            return STREAM

        def get_device_capability(self, device: int) -> tuple[int, int]:
            return divmod(capability, 10)

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

    triton.runtime.driver.set_active(Driver())


STREAM = 0x77


def entry_parameters(compiled: Any) -> list[int]:
    """The sizes of a compiled kernel's parameters, from its PTX."""
    entry = re.search(r"\.entry [^(]*\(([^)]*)\)", compiled.asm["ptx"])
    assert entry is not None
    bits = re.findall(r"\.param \.[a-z](\d+)", entry[1])
    return [int(number) // 8 for number in bits]


class Heard:
    """What is launched, with each parameter cut to the size that the compiled kernel reads."""

    def __init__(self) -> None:
        self.sizes: dict[int, list[int]] = {}
        self.names: dict[int, str] = {}
        self.launches: list[dict[str, Any]] = []

    def know_all(self) -> None:
        """Triton's compiled kernels so far: what a handle is."""
        from prefixcore.backends.triton.kernels import (
            decode,
            decode_once,
            delta,
            forward,
            grad_keys,
            grad_prefix,
            grad_query,
            grad_short_prefix,
        )  # fmt: skip

        for module in (decode, decode_once, delta, forward, grad_keys, grad_prefix, grad_query, grad_short_prefix):
            for value in list(vars(module).values()):
                if hasattr(value, "device_caches"):
                    for kernel in value.device_caches[0][0].values():
                        self.sizes[kernel.function] = entry_parameters(kernel)
                        self.names[kernel.function] = value.fn.__name__

    def count(self, function: int) -> int:
        if function not in self.sizes:
            self.know_all()
        return len(self.sizes[function])

    def hear(self, launch: stand_in.Launch) -> None:
        sizes = self.sizes[launch.function]
        words = [word % 256**size for word, size in zip(launch.words, sizes, strict=True)]
        self.launches.append(
            {"kernel": self.names[launch.function], "function": launch.function, "grid": launch.grid,
             "block": launch.threads, "shared": launch.shared, "stream": launch.stream, "attributes": launch.attributes,
             "sizes": sizes, "words": words}
        )  # fmt: skip


def main(names: list[str]) -> None:
    use_stand_in()
    import prefixcore
    from prefixcore.backends.triton import choose, replay
    from prefixcore.backends.triton.plan_kernel import kernel_of
    from tests.device import triton_backend
    from tests.ops.problems import Problem

    out: dict[str, Any] = {}
    heard = Heard()
    stand_in.driver().stand_in_set_stream(STREAM)
    with stand_in.on_launch(heard.hear, heard.count), triton_backend(), replay.use_replay(True):
        replay._switch.read_launch = kernel_of
        for name in names or CASES:
            case = dict(CASES[name])
            path, lengths = case.pop("path"), case.pop("then", ())
            tensors, options = Problem(**case).tensors()
            leaves = {key: x.requires_grad_() for key, x in tensors.items()}
            rounds = []
            for _ in range(3):
                heard.launches = []
                with choose.use_path(path):
                    result, lse = prefixcore.prefix_attention(**leaves, **options, return_lse=True)
                    # one gradient as another: nothing is computed
                    loss = result if path == "merged" else (result, lse)
                    grads = [torch.zeros_like(x) for x in (loss if isinstance(loss, tuple) else (loss,))]
                    found = torch.autograd.grad(loss, list(leaves.values()), grads)
                known = {f"given {key}": x.data_ptr() for key, x in tensors.items()}
                known |= {f"given {key}": x.data_ptr() for key, x in options.items() if isinstance(x, torch.Tensor)}
                known |= {"out": result.data_ptr(), "lse": lse.data_ptr()}
                known |= {f"grad of {key}": x.data_ptr() for key, x in zip(leaves, found, strict=True)}
                rounds.append({"launches": heard.launches, "known": known})
            out[name] = rounds
            for length in lengths:  # replayed by the plan of the first
                tensors, options = Problem(**case | {"S": length}).tensors()
                given = {key: x for key, x in {**tensors, **options}.items() if isinstance(x, torch.Tensor)}
                known = {f"given {key}": x.data_ptr() for key, x in given.items()}
                rounds = []
                for on in (False, True):
                    heard.launches = []
                    with choose.use_path(path), replay.use_replay(on):
                        result, lse = prefixcore.prefix_attention(**tensors, **options, return_lse=True)
                    here = known | {"out": result.data_ptr(), "lse": lse.data_ptr()}
                    rounds.append({"launches": heard.launches, "known": here})
                out[f"{name}, {length} keys"] = rounds
        kept, refused = replay.kept(), replay.not_kept()
    json.dump({"cases": out, "kept": kept, "refused": refused}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
