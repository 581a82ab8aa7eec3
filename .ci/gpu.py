"""Everything a GPU has to show, in parts that can be run alone: build, the tests on the device, the benchmarks.

    python .ci/gpu.py [--out DIR] [--wheels DIR]      on a machine with an NVIDIA GPU
    python .ci/gpu.py --parts launching decode        these alone
    python .ci/gpu.py --seconds 300                   in order of importance, as many as fit
    python .ci/gpu.py --rehearsal                     the same as far as a CPU goes: kernels interpreted, toy shapes

The Python it runs with has to have torch, triton and transformers, and nvcc should be on PATH. What else is needed is
looked for there too; what is missing comes from the wheels in `--wheels`, without any network, or else from the
package index, into an environment of its own (`.venv-gpu`) that sees this Python's packages.

`DIR/gpu.json` says what passed, what failed and what was not run; `DIR/PART.json` has a part's figures, written after
each of them, and `DIR/logs` what was printed. The parts are those of `bench/gpu/parts.py`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this may be another folder's Python

from bench.gpu.environment import stop, with_everything  # noqa: E402
from bench.gpu.parts import PARTS, Part, chosen  # noqa: E402
from bench.gpu.session import FAILED, LEFT_OUT, Session  # noqa: E402


def gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append({"name": facts.name, "capability": f"{facts.major}{facts.minor}", "memory": facts.total_memory})
    return found


def build(session: Session, nvcc: str | None, capabilities: Sequence[str]) -> bool:
    settings = {"PREFIXCORE_CUDA": "1" if nvcc else "0"}
    if capabilities:
        settings["PREFIXCORE_CUDA_ARCHITECTURES"] = ";".join(sorted(set(capabilities)))
    return session.run("build", [[sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]], 300, **settings)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out" / "gpu", help="where results go")
    parser.add_argument("--wheels", type=Path, help="folder with wheels of the packages that are missing")
    parser.add_argument("--parts", nargs="*", default=[], help=f"these alone: {' '.join(part.name for part in PARTS)}")
    parser.add_argument("--seconds", type=float, help="for everything: parts in order of importance, until it is up")
    parser.add_argument("--pack", type=Path, help="also put all results into one file, gpu.tar.gz in this folder")
    parser.add_argument("--again", action="store_true", help="also run what passed in --out before")
    parser.add_argument(
        "--list", action="store_true", help="name the parts, with what they show and how long they take"
    )
    parser.add_argument("--rehearsal", action="store_true", help="without a GPU, as far as that goes")
    return parser.parse_args()


def listed(parts: Sequence[Part]) -> str:
    lines = [f"{part.name:16} {part.seconds:4} s  {part.what}" for part in parts]
    return "\n".join(
        [*lines, f"{'together':16} {sum(part.seconds for part in parts):4} s  on an H200, after the build"]
    )


def main() -> int:
    asked = options()
    try:
        parts = chosen(asked.parts)
    except ValueError as error:
        stop(str(error))
    if asked.list:
        print(listed(parts))
        return 0
    if asked.wheels is not None and not asked.wheels.is_dir():
        stop(f"WHEELS={asked.wheels} is not a folder")
    with_everything(asked.wheels, interpreted=asked.rehearsal)
    found = gpus()
    if not found and not asked.rehearsal:
        import torch

        stop(
            f"PyTorch {torch.__version__} finds no NVIDIA GPU here, so nothing was run. It needs one, its driver and a "
            "build of PyTorch with CUDA; 'make gpu-rehearsal' runs the same steps as far as a CPU goes"
        )
    from bench.machine import commit

    nvcc = shutil.which("nvcc")
    machine = {"gpus": found, "nvcc": nvcc is not None, "cores": os.cpu_count(), "python": sys.version.split()[0]}
    session = Session(asked.out.resolve(), asked.rehearsal, {**machine, "commit": commit()}, asked.seconds)
    session.pack = asked.pack.resolve() if asked.pack else None
    if asked.again:
        session.before = {}
    if build(session, nvcc, [] if asked.rehearsal else [gpu["capability"] for gpu in found]):
        steps(session, nvcc, parts)
    status = session.write(finished=True)
    print(ended(session, status))
    return status


def ended(session: Session, status: int) -> str:
    """The last lines: what failed by name, what this tree does not have, and where the results are."""
    lines = [f"failed: {step['step']}" for step in session.steps if step["state"] == FAILED]
    lines += [f"left out: {step['step']}: {step['why']}" for step in session.steps if step["state"] == LEFT_OUT]
    said = ("everything passed", "something failed", "nothing failed, but time ran out before everything had run")
    return "\n".join([*lines, f"{said[status]}; results are in {session.out}"])


def steps(session: Session, nvcc: str | None, parts: Sequence[Part]) -> None:
    """What follows the build. Each runs even where an earlier one failed; figures have gates of their own."""
    if nvcc is None:
        session.note("CUDA kernels", LEFT_OUT, why="nvcc is not on PATH, so that they were not built")
    session.run("doctor", [[sys.executable, "-m", "prefixcore", "doctor"]], 60)
    for part in parts:
        session.part(part)
    files = sorted(str(path) for path in session.out.glob("*.json") if path.name != "gpu.json")
    if files:
        session.run("figures", [[sys.executable, "-m", "bench.gpu.page", *files]], 60)
        print((session.logs / "figures.log").read_text())


if __name__ == "__main__":
    raise SystemExit(main())
