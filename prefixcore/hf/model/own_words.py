"""Errors of a model's own code in words that say whose they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


@contextmanager
def own_words(model: PreTrainedModel, what: str) -> Iterator[None]:
    """A block that runs the model: what is raised becomes NotImplementedError, which says if the model raised it."""
    try:
        yield
    except (NotImplementedError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        whose = "" if _is_ours(error) else f"its own code raises {type(error).__name__}: "
        raise NotImplementedError(
            f"{type(model).__name__} cannot be given {what}: on a few tokens of text, {whose}{lines[0]}"
        ) from error


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised an error, and not what it called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not isinstance(error, (ValueError, RuntimeError)):
        return False
    return str(trace.tb_frame.f_globals.get("__name__")).startswith(__package__.partition(".")[0])
