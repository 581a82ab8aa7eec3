"""Run by torchrun: each process has half of the layers of a tiny model, and reads the whole batch in microbatches."""

from __future__ import annotations

import gc
import inspect
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification
from transformers.distributed import DistributedConfig

import prefixcore
from tests import tiny
from tests.distributed.launch import leave, report
from tests.distributed.training import CONFIGS
from tests.hf import encoder_decoders
from tests.hf.models import make

ROWS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [15, 16, 17, 18, 19], [20, 21, 22, 23, 24]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
CPU = torch.device("cpu")


def causal(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over the tokens that labels name."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def classes(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def deep(name: str) -> Any:
    """A model of a family with four layers in place of two."""
    return make(name, num_hidden_layers=4)


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, vocab_size=99, num_labels=3, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(config).eval()


@dataclass(frozen=True)
class Case:
    """What is trained in stages, and by one process."""

    config: Any
    model: Callable[[], Any] = tiny.model
    schedule: Any = ScheduleGPipe
    loss: Callable[[Tensor, Tensor], Tensor] = causal
    mask: bool = False
    starts: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float64
    checkpointing: bool = False
    tasks: bool = False
    place: type[PipelineStage] = PipelineStage


class Strict(PipelineStage):
    """As of torch 2.12, which sends no gradient back that is not there, and raises."""

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> Any:
        assert self.is_first or self.bwd_cache[bwd_chunk_id][0] is not None  # of the hidden states
        return super().get_bwd_send_ops(bwd_chunk_id)


PREFIX = CONFIGS["prefix"]
CASES: dict[str, Case] = {
    "prefix": Case(PREFIX),
    "float32": Case(PREFIX, dtype=torch.float32),
    "1f1b": Case(PREFIX, schedule=Schedule1F1B),
    "padded": Case(PREFIX, schedule=Schedule1F1B, mask=True),
    "mlp": Case(CONFIGS["mlp"], mask=True),
    "prompt": Case(CONFIGS["prompt"], schedule=Schedule1F1B, mask=True),
    "layers of the first stage": Case(prefixcore.PrefixTuningConfig(4, seed=0, layers=[0])),
    "layers of the last stage": Case(prefixcore.PrefixTuningConfig(4, seed=0, layers=[1])),
    "of torch 2.12": Case(prefixcore.PrefixTuningConfig(4, seed=0, layers=[1]), place=Strict),
    "checkpointing": Case(PREFIX, schedule=Schedule1F1B, checkpointing=True),
    "unseeded": Case(prefixcore.PrefixTuningConfig(4, init="random")),
    "tasks": Case(prefixcore.MultitaskPromptTuningConfig(4, seed=0, num_tasks=3), mask=True, tasks=True),
    "gpt2": Case(PREFIX, lambda: make("gpt2"), mask=True),
    "gemma2": Case(PREFIX, lambda: make("gemma2", num_hidden_layers=4), mask=True, starts=(0, 3)),
    "bert": Case(prefixcore.PrefixTuningConfig(4, seed=0, task_type="SEQ_CLS"), bert, loss=classes, mask=True),
}


def batch_of(case: Case) -> tuple[dict[str, Tensor], Tensor]:
    mask = MASK if case.mask else torch.ones_like(MASK)
    labels = torch.tensor([0, 1, 2, 1]) if case.loss is classes else ROWS.masked_fill(mask == 0, -100)
    tasks = {"task_ids": torch.tensor([0, 2, 2, 1])} if case.tasks else {}
    return {"input_ids": ROWS, "attention_mask": mask, **tasks}, labels


def attach(case: Case) -> Any:
    model = case.model().to(case.dtype)
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    handle = prefixcore.attach(model, case.config)
    model.to(case.dtype).train(case.checkpointing)
    return handle


def train(case: Case, handle: Any, step: Callable[[dict[str, Tensor], Tensor], float], steps: int = 3) -> Any:
    """Trains, where `step` makes gradients and returns the loss: the losses, the first gradients, the values."""
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.01, eps=1e-3)
    losses, gradients = [], []
    batch, labels = batch_of(case)
    for _ in range(steps):
        losses.append(step(batch, labels))
        if not gradients:
            gradients = [parameter.grad.clone() for parameter in handle.parameters()]
        torch.nn.utils.clip_grad_norm_(handle.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "gradients": gradients, "values": [p.detach().clone() for p in handle.parameters()]}


def alone(case: Case, start: list[Tensor] | None = None) -> Any:
    """The training in one process, on the whole batch at once."""
    handle = attach(case)
    if start is not None:
        for parameter, value in zip(handle.parameters(), start, strict=True):
            parameter.data.copy_(value)

    def step(batch: dict[str, Tensor], labels: Tensor) -> float:
        loss = case.loss(handle.model(**batch).logits, labels)
        loss.backward()
        return loss.item()

    return train(case, handle, step)


def scheduled(stage: Any, schedule: Any) -> Callable[[dict[str, Tensor], Tensor], float]:
    """A step of this stage; the loss where the last one is here, else 0."""

    def step(batch: dict[str, Tensor], labels: Tensor) -> float:
        losses: list[Tensor] = []
        schedule.step(**batch, target=labels, losses=losses)
        stage.sum_gradients()
        return float(sum(losses)) if losses else 0.0

    return step


def in_stages(case: Case, rank: int, folder: str) -> Any:
    torch.manual_seed(rank)
    handle = attach(case)
    others = [weakref.ref(p) for p in handle.model.parameters()]
    stage = prefixcore.pipeline_stage(handle, starts=case.starts)
    start = [parameter.detach().clone() for parameter in handle.parameters()]
    if case.place is Strict:
        stage._needs_a_gradient = True
    place = case.place(stage, stage.index, stage.count, CPU)
    schedule = case.schedule(place, n_microbatches=2, loss_fn=case.loss, scale_grads=False)

    found = train(case, handle, scheduled(stage, schedule))
    gc.collect()
    here = {id(p) for p in handle.model.parameters()}
    found |= {"start": start, "layers": list(stage.layers), "freed": sum(ref() is None for ref in others)}
    found["kept for nothing"] = sum(1 for ref in others if ref() is not None and id(ref()) not in here)
    if rank == 0:  # it is whole in every process
        handle.save(f"{folder}/adapter")
    return found


def several(in_stages: bool) -> list[Tensor]:
    """The values of two adapters, of which each batch is for one, after steps of an optimizer that has momentum."""
    model = tiny.model().double()
    bank = prefixcore.PromptBank(model)
    handles = [bank.attach(name, prefixcore.PrefixTuningConfig(4, seed=0)) for name in ("one", "other")]
    trained = [parameter for handle in handles for parameter in handle.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=0.01, eps=1e-3, weight_decay=0.1)
    batch, labels = batch_of(CASES["prefix"])
    if in_stages:
        stage = prefixcore.pipeline_stage(handles[0])
        schedule = ScheduleGPipe(PipelineStage(stage, stage.index, stage.count, CPU), 2, causal, scale_grads=False)
    for number in (0, 1, 0):
        tasks = torch.full((4,), number)
        if in_stages:
            schedule.step(**batch, task_ids=tasks, target=labels)
            stage.sum_gradients()
        else:
            causal(model(**batch, task_ids=tasks).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in trained]


def refusals(base: str) -> dict[str, str]:
    """What is said of what cannot be right."""
    found: dict[str, str] = {}

    def note(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
            found[name] = "nothing was said"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error} {error.__cause__ or ''}"

    case = CASES["prefix"]
    handle = attach(case)
    note("starts", lambda: prefixcore.pipeline_stage(handle, starts=(0, 2)))
    stage = prefixcore.pipeline_stage(handle)
    batch, labels = batch_of(case)
    half = {name: tensor[:2] for name, tensor in batch.items()}  # a microbatch
    note("again", lambda: prefixcore.pipeline_stage(handle))
    note("model", lambda: handle.model(**batch))
    note("generate", lambda: handle.model.generate(**batch, max_new_tokens=2))
    place = PipelineStage(stage, stage.index, stage.count, CPU)
    schedule = ScheduleGPipe(place, n_microbatches=2, loss_fn=case.loss, scale_grads=False)
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.01)
    schedule.step(**batch, target=labels)
    stage.sum_gradients()
    before = [p.grad.clone() for p in handle.parameters()]
    stage.sum_gradients()
    found["summed twice"] = str(all(map(torch.equal, before, (p.grad for p in handle.parameters()))))
    optimizer.step()
    schedule.eval(**batch, target=labels)  # which records gradients, too, and makes none
    note("gradients are left", lambda: step_of(stage, half))
    for parameter in list(handle.parameters())[:-1]:  # those of the last layer's values alone
        parameter.grad = None
    note("some gradients are left", lambda: step_of(stage, half))
    optimizer.zero_grad()
    note("batches", lambda: other_batches(stage, schedule, batch, labels, dist.get_rank()))
    optimizer.zero_grad()
    schedule.step(**batch, target=labels)
    optimizer.step()
    note("not summed", lambda: stage(*given(stage, ROWS[:2]), **half))
    note("not summed, saved", lambda: handle.save("nowhere"))
    with torch.no_grad():
        note("labels", lambda: stage(*given(stage, ROWS[:2]), **half, labels=labels))
        note("cache", lambda: stage(*given(stage, ROWS[:2]), **half, use_cache=True))
        note("no batch", lambda: stage(*given(stage, ROWS[:2])))
        note("shape", lambda: stage(*given(stage, ROWS[:2, :3]), **half))
        note("longer", lambda: stage(*given(stage, ROWS[:2]), **{k: v.repeat(1, 2) for k, v in half.items()}))
    if "pp_size" in inspect.signature(DistributedConfig).parameters:
        model = AutoModelForCausalLM.from_pretrained(base, distributed_config=DistributedConfig(pp_size=2))
        note("pp_size", lambda: prefixcore.attach(model, PREFIX))
    note(
        "other starts", lambda: prefixcore.pipeline_stage(attached(deep("llama")), starts=(0, 1 + 2 * dist.get_rank()))
    )
    note("other weights", lambda: prefixcore.pipeline_stage(attached(tiny.model(seed=dist.get_rank()))))
    tokens = prefixcore.PrefixTuningConfig(4 + dist.get_rank())
    note("other prefixes", lambda: prefixcore.pipeline_stage(prefixcore.attach(tiny.model(), tokens)))
    handle = attached(tiny.model())
    handle.model.lm_head.weight.requires_grad_(True)
    note("trained besides", lambda: prefixcore.pipeline_stage(handle))
    handle.model.requires_grad_(False)
    first = dist.new_group([0])
    if dist.get_rank():
        note("group", lambda: prefixcore.pipeline_stage(handle, first))
    stage = prefixcore.pipeline_stage(attached(tiny.model()))
    stage.handle.detach()
    note("detached", lambda: stage(*given(stage, ROWS[:2]), **half))
    bart = prefixcore.attach(encoder_decoders.make("bart"), PREFIX)
    note("two stacks", lambda: prefixcore.pipeline_stage(bart))
    return found


def attached(model: Any) -> Any:
    return prefixcore.attach(model, PREFIX)


def other_batches(stage: Any, schedule: Any, batch: dict[str, Tensor], labels: Tensor, rank: int) -> None:
    """As from a DataLoader that each process shuffles in its own way."""
    schedule.step(**{name: tensor.roll(rank, 0) for name, tensor in batch.items()}, target=labels)
    stage.sum_gradients()


def step_of(stage: Any, batch: dict[str, Tensor]) -> None:
    """Makes gradients in this stage alone."""
    stage(*given(stage, ROWS[:2]), **batch).sum().backward()


def given(stage: Any, ids: Tensor) -> list[Tensor]:
    """What the stage before would hand on for these ids."""
    return [torch.zeros(*ids.shape, stage.model.config.hidden_size, dtype=torch.float64)] if stage.index else []


def main(folder: str, base: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found: dict[str, Any] = {name: in_stages(case, rank, f"{folder}/{name}") for name, case in CASES.items()}
    found["refusals"] = refusals(base)
    found["several"] = several(in_stages=True)
    found["offloaded"] = offloaded(base, folder, rank)
    report(folder, rank, found)
    leave()


def offloaded(base: str, folder: str, rank: int) -> dict[str, Any]:
    """A model of which a process holds its own layers alone: the others stay in the files until they are let go of."""
    where: dict[str, Any] = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    where |= {f"model.layers.{i}": "cpu" if i == rank else "disk" for i in range(2)}
    model = AutoModelForCausalLM.from_pretrained(base, device_map=where, offload_folder=f"{folder}/offload-{rank}")
    handle = prefixcore.attach(model.eval(), PREFIX)
    case = CASES["float32"]
    stage = prefixcore.pipeline_stage(handle)
    place = PipelineStage(stage, stage.index, stage.count, CPU)
    schedule = ScheduleGPipe(place, n_microbatches=2, loss_fn=case.loss, scale_grads=False)

    return {**train(case, handle, scheduled(stage, schedule)), "meta": sum(p.is_meta for p in model.parameters())}


if __name__ == "__main__":
    main(*sys.argv[1:])
