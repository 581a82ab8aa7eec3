"""The parts of `make gpu`, in order of importance: what each runs, about how long it takes and when it is stopped.

Times are of an H200 with sixteen cores, kernels not yet compiled. Only Python's own library is imported here: the
environment of the rest is made by what reads this.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .packages import OF_MODELS, missing

ROOT = Path(__file__).resolve().parents[2]
SWITCHES = {"PREFIXCORE_REPLAY": "plans replayed", "PREFIXCORE_FEWER_LAUNCHES": "fewer launches",
            "PREFIXCORE_STREAMED_EMBEDDING": "streamed embedding"}  # fmt: skip
"""What is off until a GPU has run it: the environment variable that turns it on, and what that means."""
OFF = dict.fromkeys(SWITCHES, "0")
REPLAY = {**OFF, "PREFIXCORE_REPLAY": "1"}
BOTH = dict.fromkeys(SWITCHES, "1")


def tests_of_the_device() -> tuple[str, ...]:
    """What runs under `PREFIXCORE_TEST_DEVICE=cuda`: the ops' tests, all of the backend that ask for it, models."""
    folder = ROOT / "tests" / "backends" / "triton"
    asking = [file for file in sorted(folder.glob("test_*.py")) if "from tests.device import" in file.read_text()]
    ours = (str(file.relative_to(ROOT)) for file in asking)
    ops = (f"tests/ops/test_attention_{name}.py" for name in ("correct", "numerics"))
    return (*ops, *ours, "tests/backends/triton/test_choose.py", "tests/hf/test_on_device.py")


DEVICE_TESTS = tests_of_the_device()
CUDA_TESTS = ("tests/backends/cuda/test_embedding.py",)
FORCED_TESTS = ("tests/ops/test_attention_correct.py",)
REHEARSED = ("tests/ops/test_attention_correct.py", "-k", "test_options and 75-torch.bfloat16")
REHEARSED_FORCED = (*REHEARSED[:2], "test_options and (bank or window) and 75-torch.bfloat16")
SANITIZED_CUDA = (*CUDA_TESTS, "-k", "test_backward")
SANITIZED = (*(f"tests/backends/triton/test_{name}.py" for name in ("on_device", "merged", "soft_embedding")),
             "-k", "out_of_range or (test_options and bfloat16) or by_default or dense_mask")  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One process of a part, or for tests as many as there are cores.

    Attributes:
        name: what tells it from the part's other runs; empty where there is but one.
        what: the tests, or the benchmark's file in bench/gpu/.
        settings: environment variables.
        path: the path of the Triton backend that is forced, if one is.
    """

    name: str
    what: Sequence[str]
    settings: Mapping[str, str] = field(default_factory=dict)
    path: str | None = None


@dataclass(frozen=True)
class Part:
    """What can be run alone.

    Attributes:
        name: as `PARTS` names it.
        what: what it shows, in words.
        seconds: about how long it takes, all runs together.
        limit: seconds after which a run is stopped; what it has measured is kept.
        kind: tests, benchmark or sanitizer.
        runs: one after the other.
        models: whether it runs whole models, PEFT's beside ours.
    """

    name: str
    what: str
    seconds: int
    limit: int
    kind: str
    runs: tuple[Run, ...]
    models: bool = False


def benchmark(
    name: str, what: str, seconds: int, limit: int, *, models: bool = False, **switched: Sequence[str]
) -> Part:
    """A part that measures by bench/gpu/test_NAME.py, with all switches off.

    `switched`: once more each, `both` with all switches on or `replay` with plans replayed, with these options.
    """
    file = f"bench/gpu/test_{name.replace('-', '_')}.py"
    settings = {"both": BOTH, "replay": REPLAY}
    more = (Run(how, (file, *options), settings[how]) for how, options in switched.items())
    return Part(name, what, seconds, limit, "benchmark", (Run("", (file,), OFF), *more), models)


PATHS = ("merged", "single", "short", "decode", "decode_once", "folded", "fa4")
"""Those that are forced one after the other; where a tree lacks one, that is said."""

PARTS = (
    Part("tests", "the tests on the device", 110, 240, "tests", (Run("", DEVICE_TESTS, OFF),)),
    benchmark("launching", "what a call costs the CPU, beside SDPA's", 90, 120, both=[], replay=[]),
    Part("tests-switched", "the same with fewer launches and replayed plans, off until a GPU has passed it", 120,
         200, "tests", (Run("both", DEVICE_TESTS, BOTH), Run("replay", DEVICE_TESTS, REPLAY))),
    benchmark("small-steps", "whole steps of SmolLM2-135M's shape, beside bare, PEFT and LoRA", 80, 150,
              models=True, both=[]),
    benchmark("attention", "attention over P and T beside cuDNN without a prefix, each path forced", 130, 280),
    benchmark("decode", "decoding over a shared prefix, as a share of a copy's rate", 30, 60, both=[]),
    benchmark("soft-embedding", "the lookup, as a share of a copy's rate", 20, 40, both=[]),
    benchmark("compiled", "steps under torch.compile, recompiles over ten lengths, CUDA graphs", 140, 240,
              models=True, both=["-k", "compiled_step"]),
    benchmark("generation", "a token's time, eager and with a static cache compiled", 160, 300,
              models=True, both=["-k", "dynamic"]),
    Part("tests-paths", "the tests of correctness with each path forced", 140, 150, "tests",
         tuple(Run(name, FORCED_TESTS, path=name) for name in PATHS)),
    benchmark("steps", "whole steps of one and eight billion parameters, time and memory", 140, 400, models=True),
    Part("sanitizer", "accesses out of bounds, races", 25, 90, "sanitizer", (Run("", SANITIZED),)),
)  # fmt: skip


def chosen(names: Sequence[str]) -> list[Part]:
    """The parts of these names, in order of importance; all where there are none.

    Raises:
        ValueError: a name is none of a part.
    """
    known = {part.name: part for part in PARTS}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown part {', '.join(unknown)}; there are: {' '.join(known)}")
    return [part for part in PARTS if not names or part.name in names]


def lacking(part: Part, run: Run) -> str | None:
    """Why this tree, or this Python, cannot do a part's `run`, in words, or None if it can."""
    if part.models and (absent := missing(OF_MODELS)):
        return f"{', '.join(absent)} is not here"
    for switch, what in SWITCHES.items():
        if run.settings.get(switch) == "1" and not reads(switch):
            return f"this tree knows no {what!r} (nothing reads {switch})"
    if run.path is not None and run.path not in paths():
        return f"this tree has no path {run.path!r}"
    return None


def switched(settings: Mapping[str, str]) -> str:
    """What of `SWITCHES` these settings turn on, in words; empty if nothing."""
    return ", ".join(what for switch, what in SWITCHES.items() if settings.get(switch) == "1")


def reads(variable: str) -> bool:
    """Whether the package reads an environment variable of that name."""
    return any(variable in file.read_text(encoding="utf-8") for file in (ROOT / "prefixcore").rglob("*.py"))


def paths() -> Sequence[str]:
    """The paths of the Triton backend in this tree."""
    from prefixcore.backends.triton.choose import PATHS as here

    return here


def command(run: Run, kind: str, folder: Path, stem: str) -> list[str]:
    """The pytest of a run: its results go to `folder`."""
    pytest = [sys.executable, "-m", "pytest", *run.what, "--tb=short"]
    if kind == "benchmark":
        quiet = ["-W", "ignore::FutureWarning", "-W", "ignore::UserWarning", "--capture=no"]
        return [*pytest, *quiet, f"--figures={folder / stem}.json"]
    return [*pytest, f"--junitxml={folder / stem}.xml"]
