"""The tables of one machine, as Markdown, from results alone: the CPUs' here, the GPU's in gpu/tables.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from . import model_tables as of_models
from . import op_tables as of_ops
from .runs import Machine, Row

Table = Callable[[Sequence[Row], str], str]
TABLES: dict[str, tuple[str, Table]] = {
    "attention": ("`prefix_attention`", of_ops.attention),
    "flex": ("`prefix_attention` beside FlexAttention, forward", of_ops.flex),
    "decode": ("Decoding over a shared prefix", of_ops.decode),
    "robustness": ("Strided inputs, large scores: ours beside ours, float32", of_ops.robustness),
    "soft embedding": ("`soft_embedding`", of_ops.soft_embedding),
    "step": ("Whole training steps", of_models.step),
    "packed step": ("Training steps on ragged data, packed and padded, float32", of_models.packed_step),
    "cached step": ("Training steps from kept activations, packed, float32", of_models.cached_step),
    "shared texts": ("Training steps on examples that begin alike, as a tree, float32", of_models.shared_texts),
    "profile": ("Where a step goes", of_models.profile),
    "generation": ("Greedy generation, float32", of_models.generation),
    "adapter files": ("Saving and loading a prefix", of_models.files),
    "saved by attention": ("Kept for the backward by one attention, beyond its inputs", of_ops.saved_by_attention),
    "saved by a model": ("Kept for the backward by a whole model, float32", of_models.saved_by_model),
    "peak memory": ("Peak resident memory of a step, float32", of_models.peak),
}
PICTURES = ("attention sweep", "layers")  # drawn, not tabled


def stamp_lines(machine: Machine) -> str:
    """The machine and what ran on it, in words."""
    first = machine.stamps[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    commits = ", ".join(sorted({stamp["commit"] for stamp in machine.stamps}))
    runs = ", ".join(
        f"{stamp['scale']} {stamp['time'].replace('T', ' ')} (load average before: {stamp['load']:.1f})"
        for stamp in machine.stamps
    )
    return (
        f"{first['cpu']}; {first['cores']} cores, {first['threads']} threads, {first['memory_gib']} GiB; "
        f"kernels {first['isa']}, PyTorch {first['torch_isa']}. {versions}; compiled by {first['compiler']}. "
        f"Commit {commits}. {worst_of(machine)}: {runs}."
    )


def worst_of(machine: Machine) -> str:
    """How many runs stand behind a figure."""
    least, most = machine.counts
    if most <= 1:
        return "One run"
    return f"Worst of {most} runs" if least == most else f"Worst of {least} to {most} runs"


def of_machine(machine: Machine) -> str:
    """All tables of one CPU."""
    return sections(machine.title, stamp_lines(machine), machine.tables, TABLES, machine.isa)


def sections(
    title: str, stamp: str, found: Mapping[str, Sequence[Row]], known: Mapping[str, tuple[str, Table]], setting: str
) -> str:
    """A heading, what was measured on, and the tables that there are rows for.

    `setting`: what goals may depend on: a CPU's instruction set, or the GPU.
    """
    parts = [f"### {title}", stamp]
    for name, (heading, table) in known.items():
        if rows := found.get(name):
            parts += [f"#### {heading}", table(rows, setting)]
    return "\n\n".join(parts)
