"""Which path computes a problem: the rules, small enough to read, with the reason in words.

The sizes are in `thresholds.py`, whose kernels can do what in `vendors.py`.

From the first rule to the last, which can do everything:

* `decode_once`: few queries; one launch of ours, which splits the keys among the processors and merges in place;
* `decode`: the same in three launches (`single.py`);
* `fa4`: FlashAttention-4, where it is installed, over prefix and sequence side by side (`beside.py`);
* `folded`: a long prefix by a vendor's fused attention, all rows at once; the sequence by one, or by us (`folded.py`);
* `short`: a short sequence's backward in one launch of ours, and one that adds up (`single.py`);
* `merged`: a vendor's fused attention on the sequence, our kernels on the prefix (`merged.py`);
* `single`: one launch of our own kernels (`single.py`).

`PREFIXCORE_GPU_PATH` forces one for the whole process, `use_path` for a block of code. A path that was forced
and cannot do what it is asked raises; a backward that it has no answer for is done by the single path.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ..forced import Forced
from ..problem import AttentionProblem
from . import flash4, recording
from .fused_attention import FusedAttention
from .thresholds import (
    DECODE_QUERIES,
    FA4_KEYS,
    FA4_PACKED,
    FEWER_LAUNCHES,
    FOLDED_PREFIX,
    MERGED_KEYS,
    SHORT_KEYS,
    SHORT_TOKENS,
)
from .vendors import cannot_fold, for_the_prefix, for_the_sequence, is_quick_on_a_prefix, repeats

PATHS = ("merged", "folded", "fa4", "single", "decode", "decode_once", "short")

_forced = Forced("path", os.environ.get("PREFIXCORE_GPU_PATH"))
recording.depends_on("the forced path", lambda: _forced.name)


class Path(NamedTuple):
    """A path's name, in words why it is the one, and whose kernels do the sequence and the prefix, where not ours."""

    name: str
    why: str
    fused: FusedAttention | None = None
    prefix: FusedAttention | None = None


class Pass(NamedTuple):
    """What is asked for: the forward, or a backward.

    `all_three`: query, key and value all want a gradient, which is what a fused attention computes;
    `prefix`: the prefix wants one; `grad_lse`: the log-sum-exp has been used as well as the output.
    """

    training: bool = False
    all_three: bool = True
    prefix: bool = True
    grad_lse: bool = False


_FORWARD = Pass()

# --- the rules ----------------------------------------------------------------------------------------

# Each says which path it takes, or in words why it does not: what the path cannot do, and then whether it is worth it.
# Where the path is forced, its worth is not asked.


def fewer_launches() -> bool:
    """Whether the paths of fewer launches are chosen. ValueError: the variable says neither 0 nor 1."""
    if FEWER_LAUNCHES not in ("0", "1"):
        raise ValueError(f"PREFIXCORE_FEWER_LAUNCHES: expected 0 or 1, got {FEWER_LAUNCHES!r}")
    return FEWER_LAUNCHES == "1"


def _decode_once(p: AttentionProblem, what: Pass, forced: bool) -> Path | str:
    if not (forced or fewer_launches()):
        return "decode in one launch is off: PREFIXCORE_FEWER_LAUNCHES=1 turns it on"
    answer = _decode(p, what, forced)
    return answer if isinstance(answer, str) else answer._replace(name="decode_once")


def _short(p: AttentionProblem, what: Pass, forced: bool) -> Path | str:
    if not what.training:
        return Path("short", "forced") if forced else "the forward is one launch as it is"
    if not (forced or fewer_launches()):
        return "a short sequence's backward in two launches is off: PREFIXCORE_FEWER_LAUNCHES=1 turns it on"
    tokens = p.batch * p.queries
    if p.query.element_size() == 4 and max(p.head_dim, p.value_dim) > 128 and not forced:
        return "float32 heads of more than 128: one kernel for all gradients has too few registers for them"
    if not forced and (p.keys > SHORT_KEYS or tokens > SHORT_TOKENS):
        return f"{p.keys} keys and {tokens} tokens, more than {SHORT_KEYS} or {SHORT_TOKENS}"
    return Path("short", f"{p.keys} keys and {tokens} tokens, no more than {SHORT_KEYS} and {SHORT_TOKENS}")


def _decode(p: AttentionProblem, what: Pass, forced: bool) -> Path | str:
    if p.cu_seqlens is not None:
        return "the rows are packed"
    if what.training:
        return "decode has no backward"
    if p.queries > DECODE_QUERIES and not forced:
        return f"{p.queries} queries, more than {DECODE_QUERIES}"
    return Path("decode", f"{p.queries} queries, no more than {DECODE_QUERIES}")


def _fa4(p: AttentionProblem, what: Pass, forced: bool) -> Path | str:
    if reason := _no_fused_backward(what):
        return reason
    if not p.virtual_tokens:
        return "there is no prefix"
    if p.window:
        return "there is a sliding window, which would hide the prefix"
    if p.keys < FA4_KEYS and not forced:
        return f"{p.keys} keys, fewer than {FA4_KEYS}"
    if p.cu_seqlens is not None and p.keys < FA4_PACKED * p.sequences and not forced:
        return f"packed sequences of fewer than {FA4_PACKED} tokens each"
    if reason := flash4.cannot(p):
        return reason
    return Path("fa4", "FlashAttention-4 does prefix and sequence side by side")


def _folded(p: AttentionProblem, what: Pass, forced: bool) -> Path | str:
    if what.grad_lse:
        return "a gradient of the log-sum-exp comes in, which no fused attention takes"
    if reason := cannot_fold(p):
        return reason
    least = next((tokens for dim, tokens in FOLDED_PREFIX if p.head_dim <= dim), 0)
    if p.virtual_tokens < least and not forced:
        return f"{p.virtual_tokens} virtual tokens, fewer than {least}"
    if p.keys < MERGED_KEYS and not forced:
        return f"{p.keys} keys, fewer than {MERGED_KEYS}"
    vendor, reason = for_the_prefix(p, training=what.training)
    if vendor is None:
        return reason
    if not is_quick_on_a_prefix(vendor) and not forced:
        return f"{vendor.name} is not quicker than our own kernels on the prefix"
    if what.training and what.prefix and not forced and not repeats(vendor):
        return f"{vendor.name}'s gradients are not known to have the same bits on every run"
    fused = for_the_sequence(p, training=what.training)[0] if what.all_three and p.keys >= MERGED_KEYS else None
    return Path("folded", f"{vendor.name} does the prefix, {fused.name if fused else 'our kernels'} the sequence",
                fused, vendor)  # fmt: skip


def _merged(p: AttentionProblem, what: Pass, forced: bool) -> Path | str:
    if reason := _no_fused_backward(what):
        return reason
    if p.keys < MERGED_KEYS and not forced:
        return f"{p.keys} keys, fewer than {MERGED_KEYS}"
    fused, reason = for_the_sequence(p, training=what.training)
    return reason if fused is None else Path("merged", reason, fused)


def _no_fused_backward(what: Pass) -> str | None:
    if what.grad_lse:
        return "a gradient of the log-sum-exp comes in, which no fused attention takes"
    return None if what.all_three else "not all of query, key and value want a gradient"


_RULES: dict[str, Callable[[AttentionProblem, Pass, bool], Path | str]] = {
    "decode_once": _decode_once,
    "decode": _decode,
    "fa4": _fa4,
    "folded": _folded,
    "short": _short,
    "merged": _merged,
    "single": lambda p, what, forced: Path("single", "it can do everything"),
}


def forward(p: AttentionProblem) -> Path:
    """The path of the forward. ValueError if one was forced that cannot do it."""
    return _choose(p, _FORWARD) if _forced.name is None else _force(p, _FORWARD)


def backward(p: AttentionProblem, *, all_three: bool, grad_lse: bool, needs_prefix: bool = True) -> Path:
    """The path of the backward.

    `all_three`: query, key and value all want a gradient, which is what PyTorch's fused attention computes;
    `grad_lse`: the log-sum-exp has been used as well as the output; `needs_prefix`: the prefix wants a gradient.
    """
    what = Pass(training=True, all_three=all_three, prefix=needs_prefix, grad_lse=grad_lse)
    if _forced.name is None:
        return _choose(p, what)
    try:
        return _force(p, what)
    except _CannotBeForced as error:
        return Path("single", f"forced, and {error.reason}")


def considered(p: AttentionProblem, what: Pass = _FORWARD) -> list[tuple[str, str]]:
    """Every path up to the one that is taken, by the rules alone, with what speaks against it or for it."""
    rows = []
    for name, rule in _RULES.items():
        answer = rule(p, what, False)
        rows.append((name, answer if isinstance(answer, str) else answer.why))
        if isinstance(answer, Path):
            break
    return rows


def _choose(p: AttentionProblem, what: Pass) -> Path:
    reason = ""
    for rule in _RULES.values():
        answer = rule(p, what, False)
        if isinstance(answer, Path):
            return answer._replace(why=reason) if answer.name == "single" else answer  # what spoke against merged
        reason = answer
    raise AssertionError("the last rule can do everything")


# --- forcing ------------------------------------------------------------------------------------------


class _CannotBeForced(ValueError):
    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"the {name} path was forced, but {reason}; stop forcing it, or force 'single'")
        self.reason = reason


def _force(p: AttentionProblem, what: Pass) -> Path:
    name = _forced.name
    if name not in _RULES:
        raise ValueError(f"unknown path {name!r} (PREFIXCORE_GPU_PATH): use one of {PATHS}")
    answer = _RULES[name](p, what, True)
    if isinstance(answer, str):
        raise _CannotBeForced(name, answer)
    return answer._replace(why=f"forced; {answer.why}" if answer.name in ("merged", "folded", "fa4") else "forced")


@contextmanager
def use_path(name: str | None) -> Iterator[None]:
    """Forces one path (see `PATHS`) inside a `with` block; `None` forces none.

    For the whole process while the block runs, as `prefixcore.use_backend`.
    """
    with _forced.within(name, PATHS):
        yield
