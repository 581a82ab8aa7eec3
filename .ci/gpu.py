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
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this may be another folder's Python

from bench.gpu.parts import PARTS, Part, chosen  # noqa: E402
from bench.gpu.session import FAILED, LEFT_OUT, Session  # noqa: E402

GIVEN = {"torch": "torch>=2.10", "triton": "triton>=3.6", "transformers": "transformers>=5.13"}
NEEDED = {"setuptools": "setuptools>=77", "ninja": "ninja", "pybind11": "pybind11>=2.13", "pytest": "pytest>=8",
          "hypothesis": "hypothesis>=6.100", "peft": "peft>=0.18", "accelerate": "accelerate>=1.0",
          "safetensors": "safetensors>=0.5"}  # fmt: skip


def missing(packages: dict[str, str]) -> list[str]:
    """What is asked for of the packages that are not there, or too old: `{module: requirement}`."""
    absent = [asked for module, asked in packages.items() if importlib.util.find_spec(module) is None]
    if importlib.util.find_spec("packaging") is None:  # transformers and pytest depend on it
        return absent
    from packaging.requirements import Requirement

    for asked in packages.values():
        requirement = Requirement(asked)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # installed under another name, or not at all: that stands in `absent` already
        if asked not in absent and not requirement.specifier.contains(version, prereleases=True):
            absent.append(asked)
    return absent


def stop(message: str) -> None:
    raise SystemExit(f"make gpu: {message}")


def not_installed(wheels: Path | None) -> list[Path]:
    """The wheels of packages that this Python lacks, or has in another version."""
    found = []
    for wheel in sorted(wheels.glob("*.whl")) if wheels else []:
        name, version = wheel.name.split("-")[:2]
        try:
            if importlib.metadata.version(name) == version:
                continue
        except importlib.metadata.PackageNotFoundError:
            pass
        found.append(wheel)
    return found


def with_everything(wheels: Path | None) -> None:
    """Goes on in an environment that has all that is NEEDED, and the wheels, if this one has not."""
    if absent := missing(GIVEN):
        stop(f"{sys.executable} lacks {', '.join(absent)}; name another Python with PYTHON=..., or install them")
    packages, files = missing(NEEDED), not_installed(wheels)
    if not packages and not files:
        return
    if os.environ.get("PREFIXCORE_GPU_ENVIRONMENT"):
        named = ", ".join([*packages, *(file.name for file in files)])
        stop(f"{named} could not be installed{f' from {wheels}' if wheels else ''}; see the messages of pip above")
    python = environment()
    # A folder of wheels is what somebody chose for this machine: all of them, and nothing that they ask for beyond.
    asked = ["--no-index", "--no-deps", *files] if wheels else packages
    if asked and subprocess.run([python, "-m", "pip", "install", "--quiet", *asked]).returncode:
        stop(f"{', '.join(map(str, asked))} could not be installed; pip says why above")
    settings = {**os.environ, "PREFIXCORE_GPU_ENVIRONMENT": "1"}
    raise SystemExit(subprocess.run([python, *sys.argv], env=settings).returncode)


def environment() -> Path:
    """The Python of a new environment that sees this one's packages."""
    folder = ROOT / ".venv-gpu"
    # Without pip of its own, with which an old setuptools could come that would hide the one that is there.
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    purelib = subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
    # Not --system-site-packages: this Python may itself be that of a virtual environment.
    own = (str(Path(__file__).resolve().parent), sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    here = [path for path in sys.path if Path(path).is_dir() and path not in own and Path(path).name != "lib-dynload"]
    (Path(purelib) / "given.pth").write_text("\n".join(here) + "\n")
    if subprocess.run([python, "-c", "import pip"], capture_output=True).returncode:
        subprocess.run([python, "-m", "ensurepip"], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"], check=True)
    return python


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
    with_everything(asked.wheels)
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
