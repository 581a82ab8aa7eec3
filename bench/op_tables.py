"""The tables of the two ops, from results alone."""

from __future__ import annotations

from collections.abc import Sequence

from . import targets
from .cells import MIB, REFERENCES, between, in_order, judged, markdown, milliseconds, passes, shape
from .runs import Row


def attention(rows: Sequence[Row], isa: str) -> str:
    """Times and rates of `prefix_attention`."""
    lines = []
    for row in in_order(rows):
        case = row.case
        run = row.runs[0]
        rate = run["flops"] / run["sgemm_flops"] / row.worst("sgemm")
        lines.append(
            [shape(case), case["dtype"], passes(case), milliseconds(row.seconds())]
            + [judged(row.worst("bare"), targets.over_bare(case, isa))]
            + [f"{row.worst(name):.2f}" for name in ("concatenated", "merged")]
            + [judged(rate, targets.attention_rate(case, isa))]
            + [between(row.spread("bare")), between(row.spread("concatenated"))]
        )
    header = ["B,H,Hkv,T,D,P", "dtype", "pass", "ms", *(f"over {REFERENCES[name]}" for name in REFERENCES)]
    header += ["of a matrix product's rate", "spread over the first", "over the second"]
    return markdown(header, lines)


def flex(rows: Sequence[Row], isa: str) -> str:
    """The forward beside FlexAttention."""
    lines = [
        [shape(r.case), r.case["dtype"], milliseconds(r.seconds()), f"{r.worst('flex'):.2f}", between(r.spread("flex"))]
        for r in in_order(rows)
    ]
    return markdown(["B,H,Hkv,T,D,P", "dtype", "ms", "over FlexAttention", "spread"], lines)


def decode(rows: Sequence[Row], isa: str) -> str:
    """One new token a row over a shared prefix."""
    lines = [
        [
            shape(r.case),
            str(r.case["S"]),
            r.case["dtype"],
            milliseconds(r.seconds()),
            judged(r.worst("cached"), targets.DECODE),
            f"{r.worst('concatenated'):.2f}",
            between(r.spread("cached")),
        ]
        for r in in_order(rows)
    ]
    header = ["B,H,Hkv,T,D,P", "S", "dtype", "ms", "over SDPA on a concatenated cache", "over concatenate and SDPA"]
    return markdown([*header, "spread over the first"], lines)


def robustness(rows: Sequence[Row], isa: str) -> str:
    """Strided inputs and large scores beside the plain case."""
    lines = [
        [
            shape(r.case),
            r.case["what"],
            passes(r.case),
            judged(r.worst("plain"), targets.ROBUST),
            between(r.spread("plain")),
        ]
        for r in sorted(in_order(rows), key=lambda row: row.case["what"])
    ]
    return markdown(["B,H,Hkv,T,D,P", "what", "pass", "over the plain case", "spread"], lines)


def soft_embedding(rows: Sequence[Row], isa: str) -> str:
    """Times and bandwidth of `soft_embedding`."""
    lines = []
    for row in rows:
        case = row.case
        bandwidth = None if case["backward"] else targets.COPY
        lines.append(
            [",".join(str(case[name]) for name in "BTPVE"), case["dtype"], passes(case)]
            + [f"{1e6 * row.seconds():.1f}", judged(row.worst("embedding and cat"), targets.FASTER)]
            + [between(row.spread("embedding and cat"))]
            + [judged(1 / row.worst("copy"), bandwidth), f"{1 / row.worst('clone'):.2f}"]
        )
    header = ["B,T,P,V,E", "dtype", "pass", "µs", "over embedding + cat", "spread"]
    return markdown([*header, "of a copy's rate", "of a clone's rate"], lines)


def saved_by_attention(rows: Sequence[Row], isa: str) -> str:
    """Bytes that one attention keeps for its backward."""
    names = ("candidate", *REFERENCES)
    lines = [
        [shape(r.case), r.case["dtype"], *(f"{r.bytes(name) / MIB:.2f}" for name in names)] for r in in_order(rows)
    ]
    return markdown(["B,H,Hkv,T,D,P", "dtype", "prefixcore, MiB", *REFERENCES.values()], lines)
