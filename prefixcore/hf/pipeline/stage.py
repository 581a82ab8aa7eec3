"""A stage of a model: what `torch.distributed.pipelining` runs in one process, and what it trains."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..handle import Handle
from ..model.sample_inputs import CACHES
from ..model.signature import argument_names
from .elsewhere import Passing
from .same_batches import check_same_batches, next_digest

_FROM_SCHEDULE = "labels"
# torch 2.12 alone raises where a stage has no gradient for what it was handed: 2.13 sends zeros, and before every stage
# computed one. The layers between would be gone through backwards for nothing, so it is asked for there alone.
_EVERY_STAGE_NEEDS_A_GRADIENT = str(torch.__version__).startswith("2.12.")


class ModelStage(nn.Module):
    """The layers of a model that this process has, from `pipeline_stage`; for `torch.distributed.pipelining`.

    Every process reads the same batch, from which each makes what a model hands to its layers: positions, masks, the
    prefixes of the rows, where a soft prompt stands. Hidden states alone go from stage to stage.

    All processes have the virtual tokens of all layers, which are small, and after `sum_gradients` their gradients: so
    optimizers, the clipping of gradients, reparameterizations and saving need nothing special.

    Args:
        handle: of what is attached to the model.
        index: which stage it is.
        count: how many there are.
        layers: the first of its layers, and the first that is no longer one.
        group: the processes of the stages, in their order.
        passing: what the stand-ins for the layers of other stages read and write.

    Attributes:
        model: the model, with the layers of this stage.
        handle, index, count, layers: as above.

    Examples:
        >>> import torch.distributed as dist
        >>> from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> handle = prefixcore.attach(model, prefixcore.PrefixTuningConfig(4, seed=0))
        >>> stage = prefixcore.pipeline_stage(handle)
        >>> ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
        >>> def loss_of(logits, labels):
        ...     return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        >>> place = PipelineStage(stage, stage.index, stage.count, torch.device("cpu"))
        >>> schedule = ScheduleGPipe(place, n_microbatches=2, loss_fn=loss_of)
        >>> logits = schedule.step(input_ids=ids, target=ids)
        >>> stage.sum_gradients()
        >>> all(parameter.grad is not None for parameter in handle.parameters())
        True
        >>> dist.destroy_process_group()
    """

    def __init__(
        self, handle: Handle, index: int, count: int, layers: tuple[int, int], group: Any, passing: Passing
    ) -> None:
        super().__init__()
        self.model = handle.model
        self.handle, self.index, self.count, self.layers = handle, index, count, layers
        self._group, self._passing = group, passing
        # How often what is trained had been changed when the first gradient came that is not summed; None: all are.
        self._changes: int | None = None
        self._shape: torch.Size | None = None  # of what is handed on
        self._watched: dict[int, nn.Parameter] = {}
        self._read_so_far: Tensor | None = None  # a digest of the batches since the last sum
        self._needs_a_gradient = _EVERY_STAGE_NEEDS_A_GRADIENT
        self.training = self.model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hidden states for the next stage; of the last stage the logits, or what else the model's head puts out.

        Args:
            args: the hidden states of the stage before; of the first stage nothing, or the batch's input_ids.
            kwargs: the batch as for the model, in every stage: input_ids, attention_mask, position_ids, task_ids.

        Raises:
            ValueError: something is missing, is not for a stage, or has another shape than before.
            RuntimeError: gradients of a step have not been summed, or are there still.
        """
        given, kwargs = self._read(args, kwargs)
        if torch.is_grad_enabled():
            self.check_summed()
            self._watch()
            self._read_so_far = next_digest(self._read_so_far, kwargs)
        passing = self._passing
        passing.given, passing.passed_on, passing.is_running = given, None, True
        try:
            if self.index < self.count - 1:
                self.model.base_model(**kwargs)
                hidden = passing.passed_on
                assert hidden is not None
                self._check_shape(hidden)
                asks = self._needs_a_gradient and torch.is_grad_enabled() and not hidden.requires_grad
                return hidden.detach().requires_grad_() if asks else hidden
            return _tensors(self.model(**kwargs))
        finally:
            passing.given, passing.passed_on, passing.is_running = None, None, False

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
        """What the stage before hands on, and the arguments of the model."""
        if not self.handle.is_attached:
            raise ValueError(
                "the handle is detached, so the stage has nothing to train: load the model anew, attach to it and call "
                "prefixcore.pipeline_stage"
            )
        given: Tensor | None = None
        if self.index == 0 and args:
            kwargs = {self.model.main_input_name: args[0], **kwargs}
        elif self.index:
            given = args[0] if args else None
        if len(args) > 1 or (self.index and given is None):
            expected = "the hidden states of the one before" if self.index else "input_ids, or nothing,"
            raise ValueError(
                f"stage {self.index} of {self.count} expects {expected} by place and the batch by name, got "
                f"{len(args)} arguments by place"
            )
        if kwargs.get(self.model.main_input_name) is None and kwargs.get("inputs_embeds") is None:
            raise ValueError(
                f"stage {self.index} of {self.count} needs {self.model.main_input_name}: every process gives the whole "
                "batch to its schedule, schedule.step(input_ids=..., attention_mask=..., target=labels)"
            )
        if kwargs.get(_FROM_SCHEDULE) is not None:
            raise ValueError("labels are the loss function's: schedule.step(..., target=labels)")
        if kwargs.get("use_cache") or any(kwargs.get(name) is not None for name in CACHES):
            raise ValueError("a stage trains and keeps no cache of keys and values: leave it and use_cache out")
        return given, ({**kwargs, "use_cache": False} if "use_cache" in argument_names(self.model) else kwargs)

    def _check_shape(self, hidden: Tensor) -> None:
        """Raises ValueError where the next stage has no room for hidden states: gloo would end its process."""
        shape = self._shape = self._shape or hidden.shape
        if hidden.shape != shape:
            raise ValueError(
                f"stage {self.index} of {self.count} would hand on hidden states {list(hidden.shape)}, where the next "
                f"has room for {list(shape)}, as of the first microbatch: pad all batches to one length, "
                "and give all rows a soft prompt, or none. For batches of another shape make a new schedule, and call "
                "stage.forget_shape() before each goes on"
            )

    def forget_shape(self) -> None:
        """Lets the next microbatch have any shape, where a new schedule begins."""
        self._shape = None

    # -- gradients

    def _trained(self) -> list[nn.Parameter]:
        """What is trained, in the same order in every process."""
        adapters = self.handle._bank.adapters.values()
        return [parameter for adapter in adapters for parameter in adapter.handle.parameters()]

    def _count_changes(self) -> int:
        return sum(parameter._version for parameter in self._trained())

    def _watch(self) -> None:
        """Lets what is trained tell of the first gradient of a step."""
        for parameter in self._trained():
            if parameter.requires_grad and id(parameter) not in self._watched:
                parameter.register_hook(self._note)
                self._watched[id(parameter)] = parameter

    def _note(self, gradient: Tensor) -> None:
        """A gradient comes to what is trained."""
        if self._changes is not None:
            return
        if any(each.grad is not None and bool(each.grad.any()) for each in self._trained()):
            raise RuntimeError(
                "the gradients of the last step, which have been summed, are still there, and would be summed again: "
                "call optimizer.zero_grad() first; to accumulate, call stage.sum_gradients() once, after the last step"
            )
        self._changes = self._count_changes()

    def check_summed(self) -> None:
        """Raises RuntimeError where an optimizer has gone by the gradients of this stage alone."""
        if self._changes is not None and self._changes != self._count_changes():
            raise RuntimeError(
                "virtual tokens were changed by the gradients of this stage alone, so the processes have different "
                "ones: call stage.sum_gradients() after schedule.step(...), before gradients are clipped and the "
                "optimizer steps"
            )

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Gives every process the gradients of all stages: after `schedule.step`, before the optimizer's step.

        One exchange of as many numbers as are trained, before which the processes tell each other that they have read
        the same batches; every process of the pipeline has to come. A second call, with no gradient since, changes
        nothing. What no stage has a gradient for keeps none, as in one process.

        Raises:
            RuntimeError: the processes have read different batches, in every one of them; no gradient is changed.
        """
        trained = self._trained()
        if not trained:
            return
        if self.count > 1:
            check_same_batches(self._read_so_far, trained[0].device, self._group)
        self._read_so_far = None
        parts = [torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in trained]
        news = trained[0].new_tensor([self._changes is not None, *(p.grad is not None for p in trained)])
        flat = torch.cat([*parts, news])
        if self.count > 1:
            dist.all_reduce(flat, group=self._group)
        *sums, news = flat.split([*map(len, parts), len(news)])
        is_new, *has_gradient = (news > 0).tolist()
        if is_new:
            for parameter, part, has in zip(trained, sums, has_gradient, strict=True):
                parameter.grad = part.view(parameter.shape).to(parameter.dtype).clone() if has else None
        self._changes = None


def _tensors(output: Any) -> Any:
    """What a head puts out, without names: one tensor, or several."""
    found = tuple(each for each in output.to_tuple() if isinstance(each, Tensor))
    return found[0] if len(found) == 1 else found
