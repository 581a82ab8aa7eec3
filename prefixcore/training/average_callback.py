"""`AverageCallback`: transformers' Trainer leaves the average of its steps, as `train` does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from ..adapters.weights import is_sharded
from .averaging import Average
from .weights import tensors_digest

FILE = "average.safetensors"
BESIDE = "digest of the step's own values"


class AverageCallback(TrainerCallback):
    """Makes what a Trainer has trained the average of its steps, the later ones the more.

    Shamir and Zhang, arXiv:1212.1824, section 4: what `TrainingOptions.average` does in `prefixcore.training.train`.
    When training ends the parameters become the average; what is evaluated before is still a step's own values. A
    checkpoint has the average beside it, and a training that goes on from it goes on with it.

    Raises:
        ValueError: when training begins: `load_best_model_at_end`, whose values the average would take the place of;
            nothing to train; or parameters that several processes have in parts (FSDP2, DeepSpeed's ZeRO-3).

    Examples:
        >>> from transformers import Trainer, TrainingArguments
        >>> from prefixcore.training import AverageCallback
        >>> handle = prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4))
        >>> arguments = TrainingArguments("out", max_steps=2, report_to=[], disable_tqdm=True, save_strategy="no")
        >>> data = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 2
        >>> trainer = Trainer(model, arguments, train_dataset=data, callbacks=[AverageCallback()])
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...}
    """

    def __init__(self) -> None:
        self._average: Average | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Begins with the values that training begins with, or goes on with a checkpoint's average."""
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end leaves one step's values, and AverageCallback the average of all: choose one"
            )
        trained = [each for each in model.parameters() if each.requires_grad]
        if not trained:
            raise ValueError("no parameter requires a gradient; attach before the Trainer is made")
        if any(hasattr(each, "ds_id") or is_sharded(each) for each in trained):
            raise ValueError(
                "several processes have the parameters in parts (FSDP2 or DeepSpeed's ZeRO-3), and AverageCallback "
                "keeps whole ones: take DDP or ZeRO's stage 2, or leave the callback out"
            )
        self._average = Average(trained)
        if state.global_step:
            self._average.steps = state.global_step
            self._go_on(checkpoint(args, state) / FILE)

    def _go_on(self, file: Path) -> None:
        assert self._average is not None
        try:
            kept = read(file, tensors_digest(self._average.parameters))
        except SafetensorError as error:
            raise ValueError(
                f"{file}: damaged ({error}); delete it to go on from the checkpoint's own values, or take another "
                "checkpoint"
            ) from error
        if kept is None:
            warnings.warn(
                f"no average beside the checkpoint ({file} is not there, or of other values): it goes on from the "
                "checkpoint's own values",
                stacklevel=2,
            )
            return
        for number, value in enumerate(self._average.values):
            value.copy_(kept[str(number)])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes in a step."""
        assert self._average is not None
        self._average.update()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps the average beside the checkpoint."""
        folder = checkpoint(args, state)
        if self._average is not None and state.is_world_process_zero and folder.is_dir():
            values = {str(n): value.contiguous() for n, value in enumerate(self._average.values)}
            save_file(values, folder / FILE, {BESIDE: tensors_digest(self._average.parameters)})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts the average in place."""
        assert self._average is not None
        self._average.put()


def checkpoint(args: Any, state: Any) -> Path:
    """The folder of the checkpoint of this step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def read(file: Path, beside: str) -> dict[str, Tensor] | None:
    """The average that was kept beside the step's values with this digest; None: the file is not there, or of others.

    A callback is not told from which folder a training goes on: it may be another than the one it writes to.
    """
    if not file.is_file():
        return None
    with safe_open(file, "pt") as opened:
        if (opened.metadata() or {}).get(BESIDE) != beside:
            return None
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 it is no dictionary
