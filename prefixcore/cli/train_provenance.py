"""What `prefixcore train` knows of an adapter that it writes, for the manifest."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import columns_of, plain_escapes

if TYPE_CHECKING:
    from ..training import Evaluation, Example, TrainingRecord

LONGEST = 2000
"""Characters of what an author says."""


def add_author_arguments(parser: Any) -> None:
    """`--task`, `--license` and `--intended-use`."""
    parser.add_argument(
        "--task",
        type=author_text,
        metavar="TEXT",
        help="the one task, in words (default: the name of the --out folder)",
    )
    parser.add_argument(
        "--license", type=author_text, metavar="TEXT", help="what others may do with it, such as CC-BY-4.0"
    )
    parser.add_argument("--intended-use", type=author_text, metavar="TEXT", help="what it is for, and what not")


def author_text(text: str) -> str:
    """An argparse type: a text that says something."""
    text = plain_escapes(text).strip()
    if not text:
        raise argparse.ArgumentTypeError("expected a text, got an empty one")
    if len(text) > LONGEST:
        raise argparse.ArgumentTypeError(f"expected at most {LONGEST} characters, got {len(text)}")
    return text


def _listed(layers: Sequence[int] | None) -> str | None:
    """Layers as a manifest's setting holds them: a text."""
    return None if layers is None else ",".join(map(str, layers))


class Provenance:
    """The data, the split and the settings of a training, known before it; its metrics come with the result."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        training: Sequence[Example],
        held_out: Sequence[Example],
        most_tokens: float,
        dtype: str,
    ) -> None:
        """Describes the examples that are used.

        Args:
            arguments: the options.
            training, held_out: what is left of the examples after the split and `--skip-too-long`.
            most_tokens: that an example may have; infinite: no limit.
            dtype: of the model.
        """
        from ..training import describe_data
        from ..training.columns import Columns

        self._arguments = arguments
        self._data = describe_data(training, name=arguments.data.name)
        self._split = None
        if held_out and arguments.eval_data is not None:
            self._split = describe_data(held_out, name=arguments.eval_data.name)
        elif held_out:
            facts = {"seed": arguments.split_seed, "fraction": arguments.eval_fraction}
            self._split = describe_data(held_out, name=f"held out of {arguments.data.name}", **facts)
        self._settings = {
            "end": arguments.end,
            "chat": arguments.chat,
            "dtype": dtype,
            "max_length": None if math.isinf(most_tokens) else int(most_tokens),
            "skip_too_long": arguments.skip_too_long,
            "eval_limit": arguments.eval_limit,
            "train_layers": _listed(getattr(arguments, "train_layers", None)),
            **Columns(*columns_of(arguments)).settings,
        }

    def fields(self, record: TrainingRecord, result: Evaluation | None) -> dict[str, Any]:
        """Keywords of `Handle.save`; `result`: on the held-out examples, by the values that are saved."""
        options = dataclasses.asdict(record.options)
        del options["eval_every"]
        seed = options.pop("seed")
        settings = {**options, **self._settings, "steps_done": record.steps_done, "kept_step": record.kept_step}
        metrics = {} if result is None else {"exact_match": result.exact_match, "loss": result.loss}
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        return {
            "task": self._task(),
            "license": self._arguments.license,
            "intended_use": self._arguments.intended_use,
            "data": self._data,
            "metrics": metrics or None,
            "split": self._split if metrics else None,
            "training": settings,
            "seed": seed,
        }

    def _task(self) -> str | None:
        """`--task`; else that of the adapter that is gone on with, which `save` takes over; else the folder's name."""
        if self._arguments.task is not None or self._arguments.resumed_task is not None:
            return self._arguments.task
        return Path(self._arguments.out).name
