"""What is aimed at on an H100 or H200: each goal with the row and the figure that it is for, and what measures it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.runs import Row
from bench.targets import Target

Figure = Callable[[Row], "float | None"]
VERY = 1e6  # microseconds in a second


def over(reference: str) -> Figure:
    """Our time over that of `reference`, as the rule of the tables says."""
    return lambda row: row.worst(reference) if reference in row.references else None


def without_flash(row: Row) -> float | None:
    """Over the bare op, the quickest path that needs no FlashAttention-4."""
    return quickest(row, lambda name: name != "fa4")


def with_flash(row: Row) -> float | None:
    """Over the bare op, by FlashAttention-4."""
    return quickest(row, lambda name: name == "fa4")


def quickest(row: Row, taken: Callable[[str], bool]) -> float | None:
    """Over the bare op, the least time of the paths that are `taken`: what was chosen, and those that were forced."""
    ways = {chosen(row): "candidate"} | {name.removesuffix(" path"): name for name in row.references if " path" in name}
    return min((row.over(name, "bare") for path, name in ways.items() if taken(path)), default=None)


def chosen(row: Row) -> str:
    """The path that the backward, or a forward alone, took by itself."""
    paths = row.runs[0]["path"]
    return str(paths.get("backward", paths["forward"])).split(":")[0]


def share_of_copy(row: Row) -> float | None:
    """Of a copy's rate: of several runs the least."""
    return min((run["share_of_copy"] for run in row.runs if "share_of_copy" in run), default=None)


def microseconds(row: Row) -> float | None:
    """Of a call."""
    return row.seconds() * VERY


def peak(row: Row) -> float | None:
    """Peak memory over the bare model's and the prefix's own state."""
    return max(run["peak_over_bare_and_state"] for run in row.runs)


def more_graphs(row: Row) -> float | None:
    """Graphs that ten lengths are compiled into, over the bare model's."""
    return max(run["graphs"]["candidate"] / run["graphs"]["bare compiled"] for run in row.runs)


@dataclass(frozen=True)
class Goal:
    """A bound on one figure of one row.

    Attributes:
        what: the row, in words.
        beside: what the figure is over, or of.
        part: what of `make gpu` measures it.
        table: the table that the row is in.
        case: what of its case tells the row.
        figure: what is judged, from the row.
        target: the bound.
        key: the cell of the table beside which the goal stands.
    """

    what: str
    beside: str
    part: str
    table: str
    case: Mapping[str, Any]
    figure: Figure
    target: Target
    key: str

    def of(self, row: Row) -> bool:
        """Whether it is for this row, whatever is switched on."""
        return all(row.case.get(name) == value for name, value in self.case.items())


LONG = {"B": 8, "H": 32, "Hkv": 8, "T": 2048, "D": 128, "backward": True}
TINY, MIDDLE = {"B": 8, "H": 9, "T": 64}, {"B": 1, "H": 32, "T": 512}
CUDNN = "cuDNN without a prefix"
ONE_B, EIGHT_B = "Llama 1B's shape", "Llama 8B's shape"


def launching() -> list[Goal]:
    found = []
    for shape, words in ((TINY, "8 x 64 tokens, 9 heads"), (MIDDLE, "1 x 512 tokens, 32 heads")):
        for backward, passes, bound in ((False, "forward", 2.0), (True, "forward and backward", 1.5)):
            case = {**shape, "backward": backward}
            found.append(Goal(f"launching, {passes}, {words}", "SDPA's CPU time", "launching", "gpu launching", case,
                              over("bare"), Target(bound), "bare"))  # fmt: skip
    decoding = {"B": 8, "T": 1}
    return [*found, Goal("launching, a decoded token", "microseconds", "launching", "gpu launching", decoding,
                         microseconds, Target(40), "µs")]  # fmt: skip


def small_steps() -> list[Goal]:
    found = []
    for rows, length in ((8, 64), (8, 512), (2, 2048)):
        for reference, bound in (("bare model", 1.08), ("PEFT prefix", 0.85)):
            found.append(Goal(f"step, SmolLM2-135M's shape, {rows} x {length:,}", reference, "small-steps",
                              "gpu small step", {"B": rows, "T": length}, over(reference), Target(bound),
                              reference))  # fmt: skip
    return found


def attention() -> list[Goal]:
    found = []
    for virtual, flash, bound in ((64, 1.08, 1.20), (512, 1.45, 1.60), (2048, 2.5, 2.65), (8192, 6.4, 6.6)):
        case, words = {**LONG, "P": virtual}, f"attention, forward and backward, P = {virtual:,}"
        found += [
            Goal(words, CUDNN, "attention", "gpu attention", case, without_flash, Target(bound), "own"),
            Goal(f"{words}, by FlashAttention-4", CUDNN, "attention", "gpu attention", case, with_flash, Target(flash),
                 "fa4"),
        ]  # fmt: skip
    return found


def steps() -> list[Goal]:
    step = {"T": 2048, "checkpointing": False}
    found = [Goal("step, Llama 1B's shape, P = 8,192", "PEFT prefix", "steps", "gpu step",
                  {**step, "model": ONE_B, "P": 8192}, over("PEFT prefix"), Target(0.70), "PEFT prefix")]  # fmt: skip
    for model in (ONE_B, EIGHT_B):
        case = {**step, "model": model, "P": 64}
        found += [
            Goal(f"step, {model}, P = 64", "bare model", "steps", "gpu step", case, over("bare model"), Target(1.03),
                 "bare model"),
            Goal(f"peak memory, {model}, P = 64", "bare model and own state", "steps", "gpu step", case, peak,
                 Target(1.01), "peak"),
        ]  # fmt: skip
    return found


def others() -> list[Goal]:
    mode = {"mode": "default"}
    found = [
        Goal("compiled step, 4 layers, 8 x 64", "compiled bare step", "compiled", "gpu compiled", mode,
             over("bare compiled"), Target(1.10), "bare compiled"),
        Goal("the same with CUDA graphs", "the bare one's", "compiled", "gpu compiled", {"mode": "reduce-overhead"},
             over("bare compiled"), Target(1.10), "bare compiled"),
        Goal("ten lengths, graphs compiled", "the bare model's", "compiled", "gpu lengths", {}, more_graphs,
             Target(1.0), "graphs"),
    ]  # fmt: skip
    for cache, words in (("dynamic", "eager"), ("static", "with a static cache, compiled")):
        found.append(Goal(f"a generated token, B = 8, {words}", "bare model", "generation", "gpu generation",
                          {"cache": cache}, over("bare model"), Target(1.05), "bare model"))  # fmt: skip
    for virtual in (2048, 8192):
        found.append(Goal(f"decoding, 32 rows over a shared prefix of {virtual:,}", "a copy's rate", "decode",
                          "gpu decode", {"B": 32, "P": virtual}, share_of_copy, Target(0.80, at_least=True),
                          "copy"))  # fmt: skip
    return [*found, Goal("soft embedding, forward", "a copy's rate", "soft-embedding", "gpu soft embedding",
                         {"backward": False, "P": 64}, share_of_copy, Target(0.90, at_least=True), "copy")]  # fmt: skip


GOALS = [*launching(), *small_steps(), *others(), *attention(), *steps()]
EVERYWHERE = {
    ("gpu attention", "concatenated"): Target(0.40),
    ("gpu attention", "flex"): Target(0.67),
    ("gpu decode", "cached"): Target(1.00),
    ("gpu soft embedding", "embedding + cat"): Target(1.00),
    ("gpu step", "bare model"): Target(1.03),
    ("gpu step", "peak"): Target(1.01),
}
"""By table and cell: what holds for every row that has no goal of its own."""


def goal(row: Row, table: str, key: str) -> Target | None:
    """The bound that stands beside a cell, if there is one; a row of another size or path has none."""
    own = (found.target for found in GOALS if found.table == table and found.key == key and found.of(row))
    return next(own, EVERYWHERE.get((table, key)))
