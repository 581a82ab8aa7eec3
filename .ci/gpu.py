"""Everything a GPU has to show, in one go and under ten minutes: build, the tests on the device, the benchmarks.

    python .ci/gpu.py [--out DIR] [--wheels DIR]      on a machine with an NVIDIA GPU
    python .ci/gpu.py --rehearsal                     the same as far as a CPU goes: kernels interpreted, toy shapes

The Python it runs with has to have torch, triton and transformers, and nvcc should be on PATH. What else is needed is
looked for there too; what is missing comes from the wheels in ``--wheels``, without any network, or else from the
package index, into an environment of its own (``.venv-gpu``) that sees this Python's packages.

``DIR/gpu.json`` says what passed, what failed and what was not run; ``DIR/bench-*.json`` have the figures, and
``DIR/*.log`` what each step printed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 590  # seconds, for everything
KEPT = 20  # of them, for the figures and for stopping what runs
SANITIZER = 80  # and for the sanitizer, which comes last: it slows every kernel down
GIVEN = {"torch": "torch>=2.10", "triton": "triton>=3.6", "transformers": "transformers>=5.13"}
NEEDED = {"setuptools": "setuptools>=77", "ninja": "ninja", "pybind11": "pybind11>=2.13", "pytest": "pytest>=8",
          "pytest_benchmark": "pytest-benchmark>=5", "hypothesis": "hypothesis>=6.100", "peft": "peft>=0.18",
          "accelerate": "accelerate>=1.0", "safetensors": "safetensors>=0.5"}  # fmt: skip

DEVICE_TESTS = (
    *(f"tests/ops/test_attention_{name}.py" for name in ("correct", "numerics")),
    *(
        f"tests/backends/triton/test_{name}.py"
        for name in ("merged", "on_device", "registration", "choose", "soft_embedding")
    ),
)
CUDA_TESTS = ("tests/backends/cuda/test_embedding.py",)
REHEARSED = ("tests/ops/test_attention_correct.py", "-k", "test_options and 75-torch.bfloat16")
SANITIZED_CUDA = (*CUDA_TESTS, "-k", "test_backward")
SANITIZED = (*(f"tests/backends/triton/test_{name}.py" for name in ("on_device", "merged", "soft_embedding")),
             "-k", "out_of_range or (test_options and bfloat16) or by_default or dense_mask")  # fmt: skip


def missing(packages: dict[str, str]) -> list[str]:
    """What is asked for of the packages that are not there, or too old: ``{module: requirement}``."""
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


def with_everything(wheels: Path | None) -> None:
    """Goes on in an environment that has all that is NEEDED, if this one has not."""
    if absent := missing(GIVEN):
        stop(f"{sys.executable} lacks {', '.join(absent)}; name another Python with PYTHON=..., or install them")
    packages = missing(NEEDED)
    if not packages:
        return
    if os.environ.get("PREFIXCORE_GPU_ENVIRONMENT"):
        stop(f"{', '.join(packages)} could not be installed; see the messages of pip above")
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
    source = ["--no-index", "--find-links", str(wheels)] if wheels else []
    if subprocess.run([python, "-m", "pip", "install", "--quiet", *source, *packages]).returncode:
        stop(f"{', '.join(packages)} could not be installed{f' from {wheels}' if wheels else ''}; pip says why above")
    environment = {**os.environ, "PREFIXCORE_GPU_ENVIRONMENT": "1"}
    raise SystemExit(subprocess.run([python, *sys.argv], env=environment).returncode)


class Session:
    """The steps, their results, and the time that is left."""

    def __init__(self, out: Path, rehearsal: bool, machine: dict[str, Any], limit: float = LIMIT) -> None:
        self.out, self.rehearsal, self.limit, self.machine = out, rehearsal, limit, machine
        self.began = time.monotonic()
        self.steps: list[dict[str, Any]] = []
        out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.limit - (time.monotonic() - self.began)

    def note(self, name: str, state: str, **more: Any) -> bool:
        self.steps.append({"step": name, "state": state, **more})
        self.write()
        print(f"{name}: {state}" + "".join(f"; {key} {value}" for key, value in more.items()), flush=True)
        return state == "passed"

    def run(
        self,
        name: str,
        commands: Sequence[Sequence[str]],
        limit: float,
        environment: dict[str, str] | None = None,
        *,
        kept: float = KEPT,
    ) -> bool:
        """The commands side by side, each with a log of its own; passed if all of them are.

        `kept` seconds of all that are left are not theirs.
        """
        began, limit = time.monotonic(), min(limit, self.left() - kept)
        if limit < 5:
            return self.note(name, "not run", why="no time was left")
        with ExitStack() as files:
            running: list[subprocess.Popen[bytes]] = []
            for number, command in enumerate(commands):
                several = f"-{number}" if len(commands) > 1 else ""
                log = files.enter_context(open(self.out / f"{name.replace(' ', '-')}{several}.log", "w"))
                settings = {**os.environ, **(environment or {})}
                # A group of its own: what a command starts is stopped with it.
                running.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=settings, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                    )
                )
            codes = wait_for(running, began + limit)
        more: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
        if any(codes):
            more["exit"] = codes
            more["logs"] = sorted(str(path) for path in self.out.glob(f"{name.replace(' ', '-')}*.log"))
        if results := self.test_results(name):
            more |= results
        return self.note(name, "failed" if any(codes) else "passed", **more)

    def test_results(self, name: str) -> dict[str, Any]:
        """What pytest's reports of this step add up to."""
        counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
        failed = []
        for report in sorted(self.out.glob(f"{name.replace(' ', '-')}*.xml")):
            try:
                suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
            except xml.etree.ElementTree.ParseError:  # its process was killed while it wrote
                continue
            assert suite is not None
            for key in counts:
                counts[key] += int(suite.get(key, 0))
            failed += [
                f"{case.get('classname')}::{case.get('name')}"
                for case in suite.iter("testcase")
                if case.find("failure") is not None or case.find("error") is not None
            ]
        return {**counts, **({"failed": failed} if failed else {})} if counts["tests"] else {}

    def pytest(self, name: str, what: Sequence[str], device: str, limit: float, processes: int) -> bool:
        stem = self.out / name.replace(" ", "-")
        for old in self.out.glob(f"{stem.name}*.xml"):
            old.unlink()
        commands = [
            [
                "env", f"PREFIXCORE_TEST_SHARD={number}/{processes}", sys.executable, "-m", "pytest", *what,
                "--tb=short", f"--junitxml={stem}-{number}.xml",
            ]
            for number in range(processes)
        ]  # fmt: skip
        return self.run(name, commands, limit, {"PREFIXCORE_TEST_DEVICE": device, "OMP_NUM_THREADS": "1"})

    def write(self, *, finished: bool = False) -> bool:
        """After every step, so that whatever ends the run leaves what was found."""
        passed = finished and all(step["state"] != "failed" for step in self.steps)
        report = {
            "rehearsal": self.rehearsal,
            "finished": finished,
            "passed": passed,
            "seconds": round(time.monotonic() - self.began, 1),
            "machine": self.machine,
            "steps": self.steps,
        }
        (self.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        return passed


def wait_for(running: Sequence[subprocess.Popen[bytes]], end: float) -> list[int | str]:
    """The exit statuses. At the time `end` all that still run are asked to stop, and ten seconds later are stopped."""

    def all_end(until: float) -> bool:
        try:
            for process in running:
                process.wait(timeout=max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        return True

    late: list[subprocess.Popen[bytes]] = []
    try:
        all_end(end)
    finally:  # also when this script is interrupted
        late = [process for process in running if process.poll() is None]
        for number in (signal.SIGINT, signal.SIGKILL):  # the first lets pytest write its reports
            for process in late:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            all_end(time.monotonic() + 10)
    return ["stopped: no time was left" if process in late else process.wait() for process in running]


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
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    return session.run("build", [command], 300, settings)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out" / "gpu", help="where results go")
    parser.add_argument("--wheels", type=Path, help="folder with wheels of the packages that are missing")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds for everything (default {LIMIT})")
    parser.add_argument("--rehearsal", action="store_true", help="without a GPU, as far as that goes")
    options = parser.parse_args()
    if options.wheels is not None and not options.wheels.is_dir():
        stop(f"WHEELS={options.wheels} is not a folder")
    with_everything(options.wheels)
    found = gpus()
    if not found and not options.rehearsal:
        import torch

        stop(
            f"PyTorch {torch.__version__} finds no NVIDIA GPU here, so nothing was run. It needs one, its driver and a "
            "build of PyTorch with CUDA; 'make gpu-rehearsal' runs the same steps as far as a CPU goes"
        )
    nvcc = shutil.which("nvcc")
    machine = {"gpus": found, "nvcc": nvcc is not None, "cores": os.cpu_count(), "python": sys.version.split()[0]}
    session = Session(options.out.resolve(), options.rehearsal, machine, options.limit)
    if build(session, nvcc, [] if options.rehearsal else [gpu["capability"] for gpu in found]):
        steps(session, nvcc)
    passed = session.write(finished=True)
    print(f"{'everything passed' if passed else 'something failed'}; results are in {session.out}")
    return 0 if passed else 1


def steps(session: Session, nvcc: str | None) -> None:
    """What follows the build. Each runs even where an earlier one failed; figures have gates of their own."""
    if nvcc is None:
        session.note("CUDA kernels", "not run", why="nvcc is not on PATH, so that they were not built")
    session.run("doctor", [[sys.executable, "-m", "prefixcore", "doctor"]], 60)
    cores = os.cpu_count() or 1
    if session.rehearsal:
        session.pytest("tests", REHEARSED, "interpreter", 240, max(1, cores // 2))
        device, scale = "interpreter", "smoke"
    else:
        what = DEVICE_TESTS if nvcc is None else DEVICE_TESTS + CUDA_TESTS
        session.pytest("tests", what, "cuda", 220, min(16, cores))
        device, scale = "cuda", "quick"
    measure(session, device, scale)
    sanitize(session, nvcc)


def measure(session: Session, device: str, scale: str) -> None:
    """The benchmarks, a process and a JSON file each: what one has measured is kept if the next runs out of time."""
    parts = {"decode": 50.0, "soft_embedding": 30.0, "attention": 150.0, "steps": 400.0}
    figures = []
    for part, limit in parts.items():
        file = session.out / f"bench-{part}.json"
        file.unlink(missing_ok=True)
        command = [
            sys.executable, "-m", "pytest", f"bench/gpu/test_{part}.py", "-W", "ignore::FutureWarning",
            "-W", "ignore::UserWarning", "--tb=short", "--benchmark-quiet", f"--benchmark-json={file}",
        ]  # fmt: skip
        settings = {"PREFIXCORE_BENCH_DEVICE": device, "PREFIXCORE_BENCH": scale}
        session.run(f"benchmark {part}", [command], limit, settings, kept=KEPT + SANITIZER)
        if file.exists() and file.stat().st_size:
            figures.append(str(file))
    if figures:
        log = session.out / "figures.log"
        log.unlink(missing_ok=True)
        session.run("figures", [[sys.executable, "-m", "bench.gpu.report", *figures]], KEPT, kept=0)
        if log.exists():
            print(log.read_text())


def sanitize(session: Session, nvcc: str | None) -> None:
    """A part of the tests again, watched for accesses out of bounds and for races."""
    if session.rehearsal:
        session.note("sanitizer", "not run", why="there is no GPU")
        return
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        session.note("sanitizer", "not run", why="compute-sanitizer is not on PATH")
        return
    settings = {"PREFIXCORE_TEST_DEVICE": "cuda", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitized = [("memcheck", SANITIZED)]
    if nvcc is not None:  # the kernels that use shared memory by hand
        sanitized += [("memcheck", SANITIZED_CUDA), ("racecheck", SANITIZED_CUDA)]
    commands = [
        [sanitizer, f"--tool={tool}", "--error-exitcode=9", sys.executable, "-m", "pytest", *tests]
        for tool, tests in sanitized
    ]
    session.run("sanitizer", commands, SANITIZER, settings, kept=10)


if __name__ == "__main__":
    raise SystemExit(main())
