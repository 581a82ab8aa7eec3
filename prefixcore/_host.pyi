"""Facts about this build of prefixcore and the machine it runs on (`csrc/host.cpp`)."""

def isa() -> str:
    """The instruction set in use."""

def select_isa(name: str) -> None:
    """Switches the kernels to another instruction set that this machine can run."""

def runnable_isas() -> list[str]:
    """Instruction sets that were compiled in and that this machine can run, best first."""

def build_info() -> dict[str, str]:
    """What was compiled in, by which compiler, against which torch."""

def hardware_threads() -> int:
    """Hardware threads of this machine."""
