"""What `attach` says about every class of transformers with a causal head, and whether the first real calls agree.

    python -m tests.hf.every_model        writes the table of decoders in docs/models.md anew
    python -m tests.hf.every_encoder          that of encoders
    python -m tests.hf.every_encoder_decoder  that of encoder-decoders

A class works if virtual tokens made of a text act as the model does that reads the text: in a forward, in a short
`generate` with padding, and after a step of training, when embeddings belong to no token any more.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig
from prefixcore.hf.attention.discover import has_other_layers
from prefixcore.hf.positions.model_inputs import has_axes, reads_ids, stand_in

from .columns import COLUMNS, columns
from .hybrids import hybrid_fault
from .models_page import METHODS, Verdict, cell, row, write_table
from .tiny_models import every_class, make

TEXT, PADDING, NEW = 3, 2, 3
TOLERANCE = 2e-3
"""The share of the text's effect that may be missing."""


def judge(name: str, model_type: str, method: str, **changes: Any) -> Verdict:
    """The verdict on one class; `method` is "prefix" or "soft prompt", `changes` are fields of its configuration."""
    model = make(name, model_type, **changes)
    try:
        handle = _attach(model, method)
    except (NotImplementedError, ValueError) as error:
        if not is_ours(error):
            return Verdict(False, str(error), f"raw {type(error).__name__} out of attach: {error}")
        return Verdict(False, str(error))
    except Exception as error:
        return Verdict(False, str(error), f"raw {type(error).__name__} out of attach: {error}")
    text = text_ids()
    if method == "soft prompt" and reads_ids(model) and not has_axes(model):
        handle.detach()  # the model sees stand-ins for virtual tokens, so the text to compare with is of these
        text = torch.full((TEXT,), stand_in(model))
        handle = _attach(model, method, stand_in(model))
    bare = make(name, model_type, **changes)
    if method == "prefix" and has_other_layers(model, handle._bank.layers):
        return Verdict(True, "hybrid", _hybrid_fault(model, handle, bare, text))
    return Verdict(True, fault=_fault(model, handle, bare, text))


def _hybrid_fault(model: Any, handle: Any, bare: Any, text: Tensor) -> str | None:
    try:
        return hybrid_fault(model, handle, bare) or _check_training(model, handle, bare, text, _ids())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def is_ours(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "/prefixcore/" in trace.tb_frame.f_code.co_filename


def _attach(model: Any, method: str, only: int | None = None) -> Any:
    config = PrefixTuningConfig if method == "prefix" else PromptTuningConfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return prefixcore.attach(model, config(init_text="abc"), tokenizer=_Words(only))


class _Words:
    name_or_path = "tests/three-words"

    def __init__(self, only: int | None) -> None:
        self.ids = text_ids().tolist() if only is None else [only] * TEXT

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.ids}

    def __len__(self) -> int:
        return 128


def text_ids() -> Tensor:
    return torch.tensor([17, 40, 63])


def _ids() -> Tensor:
    return torch.tensor([[11, 58, 33, 70, 22], [44, 9, 66, 13, 51]])


def _fault(model: Any, handle: Any, bare: Any, text: Tensor) -> str | None:
    """The first thing that is wrong with an attached model."""
    ids = _ids()
    text = text.expand(2, -1)
    for what, check in (
        ("forward", _check_forward),
        ("generate", _check_generate),
        ("training", _check_training),
    ):
        try:
            fault = check(model, handle, bare, text, ids)
        except Exception as error:
            return f"{what}: {type(error).__name__}: {error}"
        if fault:
            return f"{what}: {fault}"
    return None


def _check_forward(model: Any, handle: Any, bare: Any, text: Tensor, ids: Tensor) -> str | None:
    with torch.no_grad():
        try:
            expected = bare(input_ids=torch.cat((text, ids), 1)).logits[:, TEXT:]
            without = bare(input_ids=ids).logits
        except Exception as error:
            return _bare_fault(bare, f"forward: {type(error).__name__}: {error}")
        got = model(input_ids=ids).logits
    return _difference(expected, got, without)


def _check_generate(model: Any, handle: Any, bare: Any, text: Tensor, ids: Tensor) -> str | None:
    """A batch without padding and one with, on the left: each row as it is by itself, after the text."""
    if not model.can_generate():
        return None
    for padding in (0, PADDING):
        mask = torch.ones_like(ids)
        mask[1, :padding] = 0
        rests = [ids[:1], ids[1:, padding:]]
        longer = [torch.cat((text[:1], rest), 1) for rest in rests]
        batch = torch.cat((longer[0], torch.cat((ids.new_zeros(1, padding), longer[1]), 1)))
        batch_mask = torch.cat((torch.ones_like(text), mask), 1).sort(1).values
        try:
            expected = [_generate(bare, each)[:, 0] for each in longer]
            without = [_generate(bare, rest)[:, 0] for rest in rests]
            batched = _generate(bare, batch, batch_mask)
        except Exception as error:
            return _bare_fault(bare, f"generate: {type(error).__name__}: {error}")
        got = _generate(model, ids * mask, mask)
        for one in range(2):
            if _difference(expected[one], batched[:, one], without[one]):
                _bare_fault(bare, f"generate: {padding} padding tokens in a batch change what is generated")
            elif fault := _difference(expected[one], got[:, one], without[one]):
                return f"{padding} padding tokens, row {one}: {fault}"
    return None


def _generate(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The logits [new, B, V] of a greedy generate."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    output = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)
    return torch.stack(output.logits)


def _bare_fault(bare: Any, what: str) -> None:
    """Notes what a bare model cannot do, so that nothing is promised."""
    bare_faults.append(f"{type(bare).__name__}: {what}")


bare_faults: list[str] = []
"""What a bare model cannot do, so that nothing is promised."""


def _check_training(model: Any, handle: Any, bare: Any, text: Tensor, ids: Tensor) -> str | None:
    optimizer = torch.optim.SGD(handle.parameters(), lr=1.0)
    labels = ids.clone()
    for _ in range(2):
        optimizer.zero_grad()
        output = model(input_ids=ids, labels=labels, use_cache=False)
        output.loss.backward()
        for name, parameter in handle.named_parameters():
            if parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.abs().max() > 0:
                return f"no gradient of {name}"
        for p in handle.parameters():
            p.grad /= p.grad.norm()
        optimizer.step()
    if [n for n, p in model.named_parameters() if p.grad is not None and not n.startswith("prefixcore.")]:
        return "a frozen weight has a gradient"
    with torch.no_grad():
        if not model(input_ids=ids, use_cache=False).logits.isfinite().all():
            return "not finite"
    return None


def _difference(expected: Tensor, got: Tensor, without: Tensor) -> str | None:
    effect, missing = (expected - without).float().norm(), (expected - got).float().norm()
    if not missing <= TOLERANCE * effect:
        return f"off by {float(missing):.3g} of {float(effect):.3g}"
    return None


UNTRIED = {
    "BltForCausalLM": "reads bytes, cut into patches by a second model",
    "FastVlmForConditionalGeneration": "needs timm",
    "Gemma3nForConditionalGeneration": "needs timm",
    "Gemma4AssistantForCausalLM": "drafts for another model, whose states it reads",
    "Gemma4UnifiedAssistantForCausalLM": "drafts for another model, whose states it reads",
    "InklingForConditionalGeneration": "needs scipy",
    "PerceptionLMForConditionalGeneration": "needs timm",
}
"""Classes without a tiny model, and why there is none."""


def cells(name: str, model_type: str) -> list[str]:
    """What the page says of a class, by method, and of a prefix on it in the other columns."""
    if name in UNTRIED:
        return [f"not tried: {UNTRIED[name]}"] * len(METHODS) + [""] * len(COLUMNS)
    said = [_cell_of(name, model_type, method) for method in METHODS]
    if not said[0].startswith("works"):
        return [*said, *[""] * len(COLUMNS)]
    changes = {"is_decoder": True} if "is_decoder" in said[0] else {}
    return [*said, *columns(make(name, model_type, **changes), make(name, model_type, **changes))]


def _cell_of(name: str, model_type: str, method: str) -> str:
    """What the page says of a class that is an encoder or a decoder, as its configuration says, is of the decoder."""
    verdict = judge(name, model_type, method)
    if "is_decoder=True" not in verdict.reason:
        return cell(verdict)
    said = cell(judge(name, model_type, method, is_decoder=True))
    return f"{said} with `is_decoder=True`" if said.startswith("works") else said


HEADER = f"| class | `model_type` | prefix | soft prompt | {' | '.join(COLUMNS)} |"


if __name__ == "__main__":
    write_table(HEADER, [row(name, kind, cells(name, kind)) for name, kind in sorted(every_class().items())])
