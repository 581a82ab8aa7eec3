"""`pipeline_stage`: cuts a model with virtual tokens down to the layers of one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...adapters.fingerprint import fingerprint
from ...nn import CPTPrompt
from ..attention.patch import frozen_run
from ..bank.bank import Bank
from ..handle import Handle
from ..layer_list import AsOutput, find_layers, read_output
from ..model.sample_inputs import sample_inputs
from ..model.wrapped import WrappedMethod
from ..positions.model_inputs import plain_ids
from ..verify import tolerance
from .agreement import check_in_common, take_values_of_the_first
from .elsewhere import LayerElsewhere, Passing
from .stage import ModelStage

_TOKENS = 5


def pipeline_stage(handle: Handle, group: Any = None, *, starts: Sequence[int] | None = None) -> ModelStage:
    """Cuts a model with virtual tokens down to the layers of this process, for `torch.distributed.pipelining`.

    Attach to the whole model first, in every process. Then each calls this, and has from there on its own layers, the
    embeddings, the head, and the virtual tokens of all layers, with the first process's values. What a schedule of
    torch's then trains is what one process would train, as long as `ModelStage.sum_gradients` is called before each
    step of the optimizer. `handle.save` writes the whole adapter, from any one process. The model cannot run by itself
    any longer, and `handle.detach` does not bring its other layers back.

    Args:
        handle: of what is attached to the model.
        group: the processes of the stages, in their order; None: all.
        starts: the first layer of each stage, as (0, 12, 24); None: as many for each, as near as can be.

    Returns:
        The stage, a module: `PipelineStage(stage, stage.index, stage.count, device)`.

    Raises:
        RuntimeError: no process group has been made.
        ValueError: the model is cut already, or has fewer layers than there are processes, or not these; this process
            is not in the group; or the processes have different models, configurations or starts.
        NotImplementedError: a model that cannot be cut, or whose layers need more of each other than hidden states.
            After this error the model is as it was.

    Examples:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> handle = prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4))
        >>> stage = prefixcore.pipeline_stage(handle)
        >>> stage.index, stage.count, stage.layers
        (0, 1, (0, 2))
        >>> dist.destroy_process_group()
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("a pipeline is of several processes: call torch.distributed.init_process_group first")
    bank, model = handle._bank, handle.model
    if bank.stage is not None:
        raise ValueError("the model is cut already, to one stage a process: load it anew")
    layers = _layers_of(handle)
    index, count = dist.get_rank(group), dist.get_world_size(group)
    if index < 0:
        raise ValueError("this process is not in the group: give each process the group of its own pipeline")
    own = _own(len(layers), index, count, starts)
    prints = {name: fingerprint(model, each.handle.config.head_names) for name, each in bank.adapters.items()}
    check_in_common(bank, own, len(layers), prints, group)
    inputs: dict[str, Any] = sample_inputs(model, plain_ids(model, _TOKENS))
    inputs["task_ids"] = [next(iter(bank.adapters.values())).first_task]
    hidden, forms, output = _traced(model, layers, inputs)
    passing, whole = Passing(), list(layers)
    for i, layer in enumerate(whole):
        if not own[0] <= i < own[1]:
            layers[i] = LayerElsewhere(layer, i, forms[i], passing, i < own[0])
    stage = ModelStage(handle, index, count, own, group, passing)
    problems: list[str | None] = [None] * count
    problem = _problem(stage, inputs, hidden[own[0] - 1] if index else None, hidden[own[1] - 1], output)
    dist.all_gather_object(problems, problem, group=group)  # all of them cut the model, or none does
    if any(problems):
        for i, layer in enumerate(whole):
            layers[i] = layer
        raise NotImplementedError(next(each for each in problems if each))
    _forget(bank, layers)
    for name, found in prints.items():
        bank.adapters[name].base_model = found
    bank.stage = stage
    stage.forget_shape()
    take_values_of_the_first(stage, group)
    return stage


def _layers_of(handle: Handle) -> nn.ModuleList:
    """The list of the layers of the model; NotImplementedError: it has none that can be cut."""
    bank, name = handle._bank, type(handle.model).__name__
    if not handle.is_attached:
        raise ValueError("the handle is detached: attach to the model first")
    if bank.encoder is not None:
        raise NotImplementedError(f"{name} has two stacks of layers, and a pipeline is for models of one")
    if isinstance(bank.decoder, str):
        raise NotImplementedError(
            f"the layers of {name} under a soft prompt are not known ({bank.decoder}): take a prefix "
            "(PrefixTuningConfig), for which they are found"
        )
    if any(isinstance(adapter.module, CPTPrompt) for adapter in bank.adapters.values()):
        raise NotImplementedError("context-aware prompt tuning has a loss of its own, which stages do not compute")
    ours = {id(p) for each in bank.adapters.values() for p in (*each.module.parameters(), *each.handle.parameters())}
    others = [n for n, p in handle.model.named_parameters() if p.requires_grad and id(p) not in ours]
    if others:
        raise NotImplementedError(
            f"{len(others)} parameters besides the virtual tokens are trained, {others[0]} for one, and a stage has "
            "the gradients of its own layers alone: freeze them (handle.train_with_peft(peft=False), "
            "requires_grad_(False))"
        )
    if getattr(bank.decoder.config, "output_router_logits", False):
        raise NotImplementedError(
            "config.output_router_logits: the router's loss is over the layers of all stages, and each knows its own: "
            "set it to False"
        )
    found = find_layers(bank.decoder, bank.layers)
    if found is None:
        raise NotImplementedError(
            f"{type(bank.decoder).__name__} does not hold its layers as one list of modules, each called once, so it "
            "cannot be cut into stages"
        )
    return found[0]


def _own(number: int, index: int, count: int, starts: Sequence[int] | None) -> tuple[int, int]:
    """The first layer of a stage, and the first that is no longer one."""
    if starts is None:
        starts = [number * i // count for i in range(count)]
    bounds = [*starts, number]
    if len(starts) != count or bounds[0] != 0 or any(a >= b for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError(
            f"expected the first layer of each of {count} stages, from 0 on and each with a layer of the {number} that "
            f"the model has, got {list(starts)}"
        )
    return bounds[index], bounds[index + 1]


def _traced(
    model: PreTrainedModel, layers: nn.ModuleList, inputs: dict[str, Any]
) -> tuple[list[Tensor], list[AsOutput], Any]:
    """What each layer of the whole model passes on, in which form, and what the model puts out."""
    found: dict[int, tuple[Tensor, AsOutput]] = {}
    wrapped = [WrappedMethod(layer, "forward", _Recorder(i, layer, found)) for i, layer in enumerate(layers)]
    try:
        with frozen_run(model):
            output = model(**inputs)
    finally:
        for each in reversed(wrapped):
            each.undo()
    if sorted(found) != list(range(len(layers))):
        raise NotImplementedError(f"{type(model).__name__} does not call each of its layers, so it cannot be cut")
    return [found[i][0] for i in range(len(layers))], [found[i][1] for i in range(len(layers))], output


class _Recorder:
    """Notes what a layer passes on."""

    def __init__(self, number: int, layer: nn.Module, found: dict[int, tuple[Tensor, AsOutput]]) -> None:
        self.number, self.layer, self.found = number, layer, found

    def __call__(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = forward(*args, **kwargs)
        self.found[self.number] = read_output(output, self.layer)
        return output


def _problem(
    stage: ModelStage, inputs: dict[str, Any], given: Tensor | None, passed_on: Tensor, output: Any
) -> str | None:
    """Why a stage does not make of the hidden states before it what the whole model makes; None: it does."""
    name = type(stage.model).__name__
    try:
        with frozen_run(stage.model):
            got = stage(*([] if given is None else [given]), **inputs)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        return (
            f"{name} cannot be cut into stages: layers {stage.layers[0]} to {stage.layers[1] - 1} do not run with "
            f"nothing but hidden states of those before ({type(error).__name__}: {error})"
        )
    expected = passed_on if stage.index < stage.count - 1 else output[0]
    got = got[0] if isinstance(got, tuple) else got
    missing, size = (expected - got).float().norm(), expected.float().norm()
    if missing <= tolerance(stage.model) * size:
        return None
    return (
        f"{name} cannot be cut into stages: layers {stage.layers[0]} to {stage.layers[1] - 1} need more of those "
        f"before than hidden states, without which they are off by {float(missing):.3g} of {float(size):.3g}"
    )


def _forget(bank: Bank, layers: nn.ModuleList) -> None:
    """Lets go of the layers of other stages, so that their memory is free."""
    here = set(bank.model.modules())
    stand_in = next((layer for layer in layers if isinstance(layer, LayerElsewhere)), None)
    bank.layers = [layer if layer in here or stand_in is None else stand_in for layer in bank.layers]
    bank.checkpointable = [module for module in bank.checkpointable if module in here]
    patch, parameters = bank.patch, {id(parameter) for parameter in bank.model.parameters()}
    patch.frozen = [(parameter, flag) for parameter, flag in patch.frozen if id(parameter) in parameters]
    patch.layers = [layer for layer in patch.layers if layer in here]
    patch.attributes = [(module, name) for module, name in patch.attributes if module in here]
