"""Builds the two compiled modules; everything else about the package is in pyproject.toml.

* ``prefixcore/_kernels.so``: kernels and ops, registered through torch's stable ABI. Each CPU kernel source is
  compiled once an instruction set and chosen at run time.
* ``prefixcore/_host.*.so``: a small pybind11 module of host facts.

Environment: ``CXX`` names the compiler; ``PREFIXCORE_CUDA=1`` (or ``0``) asks for (or against) the CUDA sources,
which are otherwise built when torch has CUDA and nvcc is found; ``PREFIXCORE_CUDA_ARCHITECTURES`` is a
semicolon-separated list (default ``80;90;100``), ``PREFIXCORE_NVCC_FLAGS`` is passed on to nvcc; ``MAX_JOBS`` limits
parallel compilation.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# One compilation of csrc/cpu/kernels.cpp for each; the baseline is what every CPU of the architecture has.
ISA_FLAGS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
    ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]

# torch 2.10 is the oldest that the library loads into.
COMMON_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden",
             "-fno-math-errno", "-ffp-contract=fast", "-Wall", "-MMD"]  # fmt: skip
if len(ISA_FLAGS) > 1:
    COMMON_FLAGS.append("-DPREFIXCORE_X86")


def fail(message: str) -> None:
    raise SystemExit(f"\nprefixcore: {message}\n")


def find_compiler() -> str:
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["g++", "clang++", "c++"]:
        if shutil.which(name.split()[0]):
            return name
    missing = f"the compiler {asked!r} that CXX names was not found" if asked else "no C++ compiler was found"
    fail(f"{missing}. Install one (Debian and Ubuntu: 'apt-get install g++'; Fedora: 'dnf install gcc-c++'; "
         "macOS: 'xcode-select --install'), or point CXX at it.")  # fmt: skip
    raise AssertionError


def find_nvcc(torch_has_cuda: bool) -> str | None:
    """nvcc if the CUDA sources are to be built, else None."""
    asked = os.environ.get("PREFIXCORE_CUDA", "1" if torch_has_cuda else "0")
    if asked not in ("0", "1"):
        fail(f"PREFIXCORE_CUDA is {asked!r}, expected 0 or 1.")
    if asked == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc") or (home and shutil.which("nvcc", path=f"{home}/bin"))
    if not nvcc and "PREFIXCORE_CUDA" in os.environ:
        fail("PREFIXCORE_CUDA=1 asks for the CUDA sources, but nvcc was not found. Install the CUDA toolkit, set "
             "CUDA_HOME, or unset PREFIXCORE_CUDA.")  # fmt: skip
    return nvcc or None


BUILD_TOOLS = {"torch": "2.10", "setuptools": "77", "ninja": "", "pybind11": "2.13"}


def require_build_tools() -> None:
    """Before pip resolves anything: a build without torch at hand would otherwise fail after downloading it.

    And before an old setuptools, as Python 3.10 and 3.11 put into new environments, calls pyproject.toml invalid.
    """
    lacking = []
    for name, least in BUILD_TOOLS.items():
        wanted = f"{name} {least} or newer" if least else name
        if importlib.util.find_spec(name) is None:
            lacking.append(wanted)
        elif least and _numbers(found := importlib.metadata.version(name)) < _numbers(least):
            lacking.append(f"{wanted} ({found} is installed)")
    if lacking:
        asked = " ".join(f'"{name}>={least}"' if least else name for name, least in BUILD_TOOLS.items())
        fail(
            f"building needs {', '.join(lacking)}, which this environment lacks. Install what the library will run "
            f"with and build in the same environment:\n    pip install {asked}\n"
            "    pip install --no-build-isolation ."
        )


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


class NinjaBuild(build_ext):
    """Writes one build.ninja for both modules and runs it."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("_kernels"):  # bound to no Python version: no suffix that says otherwise
            return str(Path(*fullname.split(".")).with_suffix(".so"))
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        import ninja
        import pybind11
        import torch
        from ninja.ninja_syntax import Writer

        compiler, nvcc = find_compiler(), find_nvcc(torch.version.cuda is not None)
        cuda_sources = sorted((CSRC / "cuda").glob("*.cu")) if nvcc else []
        architectures = os.environ.get("PREFIXCORE_CUDA_ARCHITECTURES", "80;90;100").split(";") if cuda_sources else []
        torch_root = Path(torch.__file__).parent
        includes = [f"-I{torch_root}/include", f"-I{torch_root}/include/torch/csrc/api/include"]
        host_includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        facts = {
            "COMPILER": _first_line([*compiler.split(), "--version"]),
            "TORCH": torch.__version__,
            "ISAS": ",".join(ISA_FLAGS),
            "CUDA_ARCHITECTURES": ",".join(architectures),
        }
        # '\\"' survives ninja and the shell as a C string literal.
        fact_flags = [f"'-DPREFIXCORE_{name}=\"{text}\"'" for name, text in facts.items()]

        temp = Path(self.build_temp).resolve()
        temp.mkdir(parents=True, exist_ok=True)
        kernels, host = (Path(self.get_ext_fullpath(f"prefixcore.{name}")).resolve() for name in ("_kernels", "_host"))
        kernels.parent.mkdir(parents=True, exist_ok=True)
        with open(temp / "build.ninja", "w") as file:
            n = Writer(file, width=1000)
            n.rule("cxx", f"{compiler} {' '.join(CXX_FLAGS + COMMON_FLAGS)} $flags -MF $out.d -c $in -o $out",
                   depfile="$out.d", deps="gcc", description="C++ $out")  # fmt: skip
            n.rule("link", f"{compiler} -shared $in -o $out $flags", description="link $out")
            if cuda_sources:
                codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
                last = f"compute_{architectures[-1]}"  # what later architectures compile for themselves
                codes.append(f"-gencode=arch={last},code={last}")
                more = os.environ.get("PREFIXCORE_NVCC_FLAGS", "")
                n.rule("nvcc", f"{nvcc} -std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden {' '.join(codes)} {more} "
                       "-MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc",
                       description="CUDA $out")  # fmt: skip

            objects = []
            for isa, flags in ISA_FLAGS.items():
                objects.append(f"kernels_{isa}.o")
                n.build(objects[-1], "cxx", str(CSRC / "cpu" / "kernels.cpp"),
                        variables={"flags": " ".join([*flags, f"-DPREFIXCORE_ISA={isa}"])})  # fmt: skip
            for source in (CSRC / "cpu" / "isa.cpp", CSRC / "cpu" / "embedding" / "ids.cpp", CSRC / "binding.cpp",
                           *sorted((CSRC / "launch").glob("*.cpp"))):  # fmt: skip
                objects.append(f"launch_{source.stem}.o" if source.parent.name == "launch" else f"{source.stem}.o")
                n.build(objects[-1], "cxx", str(source), variables={"flags": " ".join(includes)})
            for source in cuda_sources:
                objects.append(f"cuda_{source.stem}.o")
                n.build(objects[-1], "nvcc", str(source))
            if cuda_sources:
                objects.append("cuda_binding.o")
                n.build(objects[-1], "cxx", str(CSRC / "cuda" / "binding.cpp"),
                        variables={"flags": " ".join([*includes, f"-I{_cuda_home(nvcc)}/include"])})  # fmt: skip
            libraries = f"-L{torch_root}/lib -ltorch_cpu -lc10 -ldl -lpthread"
            if cuda_sources:  # the static runtime: the library loads where CUDA is not installed
                libraries += f" -L{_cuda_home(nvcc)}/lib64 -L{_cuda_home(nvcc)}/lib -lcudart_static -ldl -lrt -lpthread"
            name = "-install_name,@rpath/_kernels.so" if sys.platform == "darwin" else "-soname,_kernels.so"
            n.build(str(kernels), "link", objects, variables={"flags": f"{libraries} -Wl,{name}"})

            n.build(
                "host.o",
                "cxx",
                str(CSRC / "host.cpp"),
                variables={"flags": " ".join(host_includes + fact_flags)},
            )
            origin = "@loader_path" if sys.platform == "darwin" else "'$$ORIGIN'"
            python = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
            n.build(str(host), "link", "host.o", implicit=str(kernels),
                    variables={"flags": f"{kernels} -Wl,-rpath,{origin} {python}"})  # fmt: skip

        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        result = subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(temp), *jobs])
        if result.returncode:
            fail(
                "compiling failed; the compiler's message stands above. GCC 11, GCC 12 and Clang 16 are known to work."
            )


def _cuda_home(nvcc: str) -> Path:
    """The toolkit that nvcc belongs to, asked of nvcc itself: it may be a wrapper script elsewhere."""
    plan = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    tops = [line.split("=", 1)[1] for line in plan.splitlines() if line.startswith("#$ TOP=")]
    return Path(tops[0] if tops else Path(nvcc).resolve().parent.parent).resolve()


def _first_line(command: list[str]) -> str:
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return lines[0] if lines else command[0]


if {"dist_info", "bdist_wheel", "editable_wheel", "build", "build_ext", "install"} & set(sys.argv):
    require_build_tools()

setup(
    ext_modules=[Extension("prefixcore._kernels", sources=[]), Extension("prefixcore._host", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
