"""`--report-to`: what `prefixcore train` says to experiment trackers."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .failures import user_errors
from .output import say

if TYPE_CHECKING:
    from ..training import Evaluation, TokenizedExample, TrainingOptions, TrainingRecord


MOST_POINTS = 100
"""Of the curves of each layer, of which a model has dozens."""


MOST_PROBES = 4
"""Texts that the attention on a prefix is measured on."""


class Report:
    """The open runs of the trackers that were asked for; a context manager, which closes them.

    Args:
        arguments: the options.
        handle: of what is trained.
        options: how.
        held_out: examples that are never trained on; the attention on a prefix is measured on the first of them.

    Raises:
        UserError: a tracker does not start.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        handle: Any,
        options: TrainingOptions,
        held_out: Sequence[TokenizedExample],
    ) -> None:
        self._handle, self._probes = handle, held_out[:MOST_PROBES]
        self._norms_every = max(1, options.steps // MOST_POINTS)
        self._trackers = None
        if arguments.report_to:
            from ..training.tracking import TrackerError, Trackers

            settings = {
                "model": str(arguments.model),
                "data": str(arguments.data),
                "method": handle.config.method,
                "num_virtual_tokens": handle.num_virtual_tokens,
                "num_trainable": handle.num_trainable,
                **dataclasses.asdict(options),
            }
            with user_errors(TrackerError, what="--report-to"):
                self._trackers = Trackers(arguments.report_to, arguments.out.name, settings, arguments.logging_dir, say)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._trackers is not None:
            self._trackers.finish()

    def hooks(self) -> dict[str, Any]:
        """Keywords of `prefixcore.training.train`."""
        return {} if self._trackers is None else {"on_step": self._step, "on_held_out": self._held_out}

    def result(self, record: TrainingRecord, result: Evaluation) -> None:
        """The evaluation of what is saved, at the last step."""
        if self._trackers is not None:
            values = {"eval/kept_loss": result.loss, "eval/exact_match": result.exact_match}
            self._trackers.log({**values, "eval/kept_step": record.kept_step}, record.steps_done)

    def _step(self, step: int, values: dict[str, float]) -> None:
        from ..hf.measures import norms

        assert self._trackers is not None
        if step % self._norms_every == 0 or step == 1:
            values = {**values, **norms(self._handle)}
        self._trackers.log({f"train/{name}": value for name, value in values.items()}, step)

    def _held_out(self, step: int, loss: float) -> None:
        import torch

        from ..hf.measures import attention_on_prefix

        assert self._trackers is not None
        probes = ({"input_ids": torch.tensor([each.prompt_ids + each.completion_ids])} for each in self._probes)
        attention = attention_on_prefix(self._handle, probes)
        self._trackers.log({"eval/loss": loss, **{f"eval/{name}": share for name, share in attention.items()}}, step)
