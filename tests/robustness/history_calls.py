"""What a model of a random history is asked, in every way that there is, and whether two answers are one.

Each way takes a model and the options that hypothesis drew, and returns what the model answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..hf import encoder_decoders, encoders, models
from ..hf.test_cached_attention import make as make_cached

MAKERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: models.make("llama"),
    "qwen2": lambda: models.make("qwen2", sliding_window=6),
    "qwen3": lambda: models.make("qwen3"),
    "gpt2": lambda: models.make("gpt2"),
    "gemma2": lambda: models.make("gemma2", sliding_window=6),
    "mistral": lambda: models.make("mistral", sliding_window=6),
    "gpt_oss": lambda: models.make("gpt_oss", sliding_window=6),
    "bert": lambda: encoders.make("bert", "ForMaskedLM", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "modernbert": lambda: encoders.make("modernbert", "ForMaskedLM"),
    "bart": lambda: encoder_decoders.make("bart", attention_dropout=0.0, activation_dropout=0.0),
    "t5": lambda: encoder_decoders.make("t5"),
    "bloom": lambda: make_cached("bloom", torch.float32),
    "falcon": lambda: make_cached("falcon", torch.float32),
}
ENCODERS, PAIRS = ("bert", "modernbert"), ("bart", "t5")
CACHES = [None, "dynamic", "static", "hybrid"]


class Refused(NamedTuple):
    """The error of a call."""

    what: str


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the error that it raises."""
    try:
        return call()
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError, IndexError, ImportError) as error:
        return Refused(f"{type(error).__name__}: {error}"[:200])


def same(got: Any, expected: Any, exact: bool, tolerance: float = 5e-4) -> str:
    """In what two outcomes differ; empty: in nothing."""
    if isinstance(got, Refused) or isinstance(expected, Refused):
        return "" if got == expected else f"got {got!r:.300}, expected {expected!r:.300}"
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a.shape != b.shape:
            return f"tensor {i}: shape {list(a.shape)}, expected {list(b.shape)}"
        if exact and not torch.equal(a, b):
            return f"tensor {i}: not bit for bit, by {(a.double() - b.double()).abs().max():.2e}"
        if not torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True):
            return f"tensor {i}: differs by {(a.double() - b.double()).abs().max():.2e}"
    return ""


def batch_of(family: str, side: str, seed: int, rows: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, models.VOCABULARY, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        length = (9, 6, 2)[row % 3]
        if side == "right":
            mask[row, length:] = 0
        elif side == "left":
            mask[row, : 9 - length] = 0
    return {"input_ids": ids * mask, **({} if side == "no mask" else {"attention_mask": mask})}


def shown(batch: dict[str, Tensor], logits: Tensor, family: str) -> Tensor:
    """Logits of the tokens that are no padding."""
    mask = batch.get("attention_mask")
    if mask is None or family in PAIRS or mask.shape[1] != logits.shape[1]:
        return logits
    return logits[mask.bool()]


AROUND: dict[str, Callable[[], Any]] = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def forward(model: Any, family: str, options: dict[str, Any], task_ids: Any) -> list[Tensor]:
    batch: dict[str, Any] = dict(batch_of(family, options["side"], options["seed"]))
    given = dict(batch)
    if options["embeds"]:
        given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids"))
    if family in PAIRS:
        given["labels" if options["labels"] else "decoder_input_ids"] = torch.tensor([[11, 23, 42, 7]] * 3)
    elif options["labels"]:
        given["labels"] = batch["input_ids"]
    if task_ids is not None:
        given["task_ids"] = task_ids
    if options["use_cache"] is not None and family not in ENCODERS:
        given["use_cache"] = options["use_cache"]
    if options["hidden"]:
        given["output_hidden_states"] = True
    with AROUND[options["around"]]():
        output = model(**given)
    found = [shown(batch, output.logits, family).float()]
    if options["hidden"] and family not in PAIRS:
        found += [shown(batch, each, family).float() for each in output.hidden_states]
    if options["labels"]:
        found.append(output.loss.float())
    return [each.detach().clone() for each in found]


def gradients(model: Any, family: str, options: dict[str, Any], task_ids: Any) -> list[Tensor]:
    wanted = [p for p in model.parameters() if p.requires_grad]
    batch = batch_of(family, options["side"], options["seed"])
    batch["labels"] = torch.tensor([[11, 23, 42, 7]] * 3) if family in PAIRS else batch["input_ids"]
    if task_ids is not None:
        batch["task_ids"] = task_ids
    loss = model(**batch).loss
    if not wanted or all(task is None for task in task_ids or [0]):  # whatever hooks for checkpointing make of it
        return [loss.detach().clone()]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [loss.detach().clone(), *(torch.zeros(1) if g is None else g for g in found)]


def generated(model: Any, family: str, options: dict[str, Any], task_ids: Any) -> list[Tensor]:
    if family in ENCODERS:
        return []
    batch: dict[str, Any] = dict(batch_of(family, options["side"], options["seed"]))
    if options["embeds"] and family not in PAIRS:
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    if task_ids is not None:
        batch["task_ids"] = task_ids
    if options["cache"] is not None:
        batch["cache_implementation"] = options["cache"]
    if options["guided"]:
        batch["guidance_scale"] = 1.5
    if options["lookup"]:  # of one row
        batch = {name: each if isinstance(each, (str, float)) else each[:1] for name, each in batch.items()}
        batch["prompt_lookup_num_tokens"] = 2
    torch.manual_seed(options["seed"])
    sampling = {"do_sample": True, "top_k": 5} if options["sample"] else {"do_sample": False}
    with AROUND["no_grad" if options["around"] == "autocast" else options["around"]]():
        found = model.generate(
            **batch,
            **sampling,
            max_new_tokens=5,
            num_beams=options["beams"],
            eos_token_id=None,
            disable_compile=True,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return [found.sequences, *(each.float() for each in found.logits)]


def batched(model: Any, family: str, options: dict[str, Any], task_ids: Any) -> list[Tensor]:
    from transformers import ContinuousBatchingConfig

    rows = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    made = model.generate_batch(
        rows,
        max_new_tokens=3,
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=32),
        progress_bar=False,
        **({} if task_ids is None else {"task_ids": task_ids}),
    )
    found = [torch.tensor(each.generated_tokens) for each in made.values()]
    if len(found) != 3:
        raise RuntimeError("generate_batch failed")
    return found


WAYS = {"forward": forward, "gradients": gradients, "generate": generated, "batched": batched}

options_of_a_call = st.fixed_dictionaries(
    {
        "side": st.sampled_from(["none", "no mask", "left", "right"]),
        "seed": st.integers(1, 3),
        "embeds": st.booleans(),
        "labels": st.booleans(),
        "use_cache": st.sampled_from([None, None, True, False]),
        "hidden": st.sampled_from([False, False, True]),
        "around": st.sampled_from(["plain", "no_grad", "no_grad", "inference", "autocast"]),
        "cache": st.sampled_from(CACHES),
        "beams": st.sampled_from([1, 1, 2]),
        "sample": st.booleans(),
        "lookup": st.sampled_from([False, False, False, False, True]),
        "guided": st.sampled_from([False, False, False, True]),
    }
)
tasks_of_a_call = st.lists(st.integers(-1, 2), min_size=3, max_size=3)
