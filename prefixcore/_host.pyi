"""Facts about this build of prefixcore and the machine it runs on (`csrc/host.cpp`)."""

def isa() -> str:
    """The instruction set in use."""

def select_isa(name: str) -> None:
    """Switches the kernels to another instruction set that this machine can run."""

def runnable_isas() -> list[str]:
    """Instruction sets that were compiled in and that this machine can run, best first."""

def build_info() -> dict[str, str]:
    """What was compiled in, by which compiler, against which torch."""

def plan_wanted() -> int:
    """The ticket of the last call on this thread whose signature was unknown, once; 0 if it was known."""

def plan_keep(ticket: int, words: bytes, any_length: bool = False) -> int:
    """Keeps a plan, in 64-bit words, for the call of a ticket or for any length; returns its number."""

def length_bucket(keys: int) -> int:
    """The number of keys for which a plan of any length is made."""

def plan_failure() -> str:
    """Why the last replay on this thread failed, once; empty if it did not."""

def plans() -> list[tuple[int, int, bool]]:
    """`(number, hits, has_plan)` of each signature that is known, the last used first."""

def plans_limit() -> int:
    """How many signatures are known at most."""

def plans_set_limit(limit: int) -> None:
    """Sets that number."""

def plans_forget() -> None:
    """Forgets all plans."""

def hardware_threads() -> int:
    """Hardware threads of this machine."""
