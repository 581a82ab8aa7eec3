"""What `distill` returns: the prefix on the model, and what came of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..hf import Handle
from ..training import Example, TrainingRecord, describe_data
from .options import DistillOptions
from .picture import draw
from .report import Report
from .running import said
from .targets import Target


@dataclass(frozen=True)
class Distilled:
    """A text as a prefix.

    Attributes:
        handle: the prefix on the model, frozen.
        report: scores beside the full text, the text cut to P tokens, and nothing.
        record: of the training; losses are KL(teacher || student).
        interrupted: whether Ctrl-C or SIGTERM ended it early; then nothing was measured.
        options: how it was distilled.
        context: the text.
        taught, measured: the prompts that were learnt from and those held out, with the full text's answers.

    Examples:
        >>> from prefixcore.distill import DistillOptions, Prompt, distill
        >>> options = DistillOptions(num_virtual_tokens=4, questions=0, max_answer_tokens=3, steps=2)
        >>> prompts = [Prompt(f"{letter} ->") for letter in "abcdef"]
        >>> distilled = distill(model, tokenizer, "France -> Paris", options=options, prompts=prompts)
        >>> distilled.handle
        Handle(prefix on LlamaForCausalLM, 4 virtual tokens, 0 trainable)
        >>> len(distilled.measured)
        1
    """

    handle: Handle
    report: Report
    record: TrainingRecord
    interrupted: bool
    options: DistillOptions
    context: str
    taught: Sequence[Target]
    measured: Sequence[Target]

    def picture(self, title: str = "") -> bytes:
        """A PNG: the divergence over the steps, and the scores side by side."""
        return draw(self.record, self.report, title=title)

    def save(
        self,
        directory: str | Path,
        *,
        name: str = "context",
        record: Mapping[str, Any] | None = None,
        task: str | None = None,
        license: str | None = None,
        intended_use: str | None = None,
    ) -> Path:
        """Writes the adapter, with what is known of it: report, losses, picture, digests of text and prompts.

        Args:
            directory: as of `Handle.save`.
            name: of the text, such as its file's.
            record: more for `training.json`.
            task: the one task, in words.
            license: as of `Handle.save`.
            intended_use: as of `Handle.save`.

        Returns:
            The folder.

        Raises:
            AdapterError, OSError: as of `Handle.save`.
        """
        tokenizer, options = self.handle.tokenizer, self.options
        metrics = self.report.metrics()
        settings = {**options.to_dict(), **self._facts(name), "steps_done": self.record.steps_done}
        del settings["seed"]
        told = {
            "data": name,
            "end": options.end,
            "chat": options.chat,
            "distilled": {**self._facts(name), "options": options.to_dict(), **self.report.to_dict()},
            **self.record.to_dict(),
            "interrupted": self.interrupted,
            **(record or {}),
        }
        return self.handle.save(
            directory,
            task=task,
            license=license,
            intended_use=intended_use,
            record=told,
            curve=self.picture(f"{name}: {self.report.context_tokens:,} tokens as {self.report.num_virtual_tokens}"),
            data=describe_data(self._examples(tokenizer, self.taught), name=f"the model's answers behind {name}"),
            metrics=metrics or None,
            split=describe_data(self._examples(tokenizer, self.measured), name=f"held-out prompts of {name}")
            if metrics
            else None,
            training=settings,
            seed=options.seed,
        )

    def _facts(self, name: str) -> dict[str, Any]:
        """The text, by name and digest."""
        return {
            "method": "distill",
            "context": name,
            "context_sha256": hashlib.sha256(self.context.encode("utf-8", "surrogatepass")).hexdigest(),
            "context_tokens": self.report.context_tokens,
        }

    def _examples(self, tokenizer: Any, targets: Sequence[Target]) -> list[Example]:
        """Prompts with the full text's answers."""
        return [
            Example(target.asked.prompt.text, said(tokenizer, target.answer, self.options.end)) for target in targets
        ]
