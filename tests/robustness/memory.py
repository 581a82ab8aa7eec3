"""What loading an adapter takes: `python -m tests.robustness.memory MEGABYTES KIND:[read|load|train]...`.

Writes each adapter in that size, reads or loads it in a process of its own, and prints as JSON the bytes of its tensor
files and by how many bytes the process's resident memory rose above what it was before, at its peak.

- ours: a prefix in one of two layers, in tensors of our own names;
- peft: a prefix in every layer, one tensor in PEFT's layout;
- prompt: a soft prompt;
- state: a low-rank prefix, whose training state lies beside its values;
- basis, mlp: the same of a random basis, of an MLP;
- prompt state: the same of a low-rank soft prompt.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import resource
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from prefixcore import PrefixTuningConfig, PromptTuningConfig, load
from prefixcore.adapters import Manifest, read_adapter, write_adapter
from prefixcore.nn import LayerShape, Prefix, SoftPrompt

from ..adapters.models import make_model

HKV, D, E = 2, 16, 32


def write(folder: Path, kind: str, size: int) -> None:
    """An adapter for the tiny Llama whose values take `size` bytes."""
    low_rank: dict[str, Any] = {"reparameterization": "low_rank", "rank": 4}
    if kind.startswith("prompt"):
        prompt = PromptTuningConfig(size // (4 * E), init="zero", **(low_rank if kind == "prompt state" else {}))
        manifest = Manifest.create(make_model("llama"), prompt)
        write_adapter(folder, module=SoftPrompt(E, prompt), config=prompt, manifest=manifest)
        return
    layers = [1] if kind == "ours" else [0, 1]
    options: dict[str, Any] = {
        "state": low_rank,
        "basis": {"reparameterization": "random_basis", "num_basis": 100},
        "mlp": {"reparameterization": "mlp", "encoder_hidden_size": 4},
    }.get(kind, {})
    tokens = size // (4 * 2 * HKV * D * len(layers))
    config = PrefixTuningConfig(tokens, init="zero", layers=layers if kind == "ours" else None, **options)
    shapes = [LayerShape(HKV, D, D)] * len(layers)
    manifest = Manifest.create(make_model("llama"), config, shapes)
    write_adapter(folder, module=Prefix(shapes, config), config=config, manifest=manifest)


def peak() -> int:
    """The most resident memory that the process has had, in bytes, since `reset_peak`."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> None:
    """So that what was freed before does not hide what comes; where the system has no such thing it may."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def set_up_once() -> None:
    """What the first load imports and sets up, and a fork's first load brings into its memory."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "adapter", "ours", 1 << 14)
        load(make_model("llama"), Path(folder) / "adapter").detach()


def measure(folder: Path, how: str) -> dict[str, int]:
    """In this process."""
    set_up_once()
    model = make_model("llama")
    reset_peak()
    before = peak()
    if how == "read":
        kept: Any = read_adapter(folder)
    else:
        kept = load(model, folder, trainable=how == "train")
    rise = peak() - before
    del kept
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"files": files, "rise": rise}


def in_a_process_of_its_own(function: Callable[..., Any], *arguments: Any) -> Any:
    """Forked, so that nothing is imported again."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("megabytes", type=int)
    parser.add_argument("cases", nargs="+", metavar="KIND:HOW")
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not outlive a fork
    set_up_once()
    found = {}
    for case in options.cases:
        kind, how = case.split(":")
        with tempfile.TemporaryDirectory() as folder:
            adapter = Path(folder) / "adapter"
            in_a_process_of_its_own(write, adapter, kind, options.megabytes * 2**20)
            found[case] = in_a_process_of_its_own(measure, adapter, how)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
