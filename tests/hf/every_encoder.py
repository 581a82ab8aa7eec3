"""What `attach` says about every encoder of transformers, and whether the first real calls agree.

    python -m tests.hf.every_encoder      writes the table of encoders in docs/models.md anew

A prefix works if it is what it would be if the model's own eager attention had it concatenated with keys and values; a
soft prompt, as in `tests.hf.every_model`, if it acts as the text whose embeddings it has.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

import prefixcore
from prefixcore import PrefixTuningConfig
from prefixcore.hf.model.sample_inputs import sample_inputs

from .encoders import P, concatenated
from .every_model import TOLERANCE, bare_faults, is_ours, judge
from .models_page import Verdict, cell, row, write_table
from .tiny_models import every_class, make

UNTRIED = {
    "DinatForImageClassification": "needs natten",
    "DonutSwinForImageClassification": "attention within windows of an image",
    "LevitForImageClassification": "its sizes depend on each other",
    "LevitForImageClassificationWithTeacher": "its sizes depend on each other",
    "PerceiverForImageClassificationConvProcessing": "its sizes depend on each other",
    "PerceiverForImageClassificationFourier": "its sizes depend on each other",
    "PerceiverForImageClassificationLearned": "its sizes depend on each other",
    "PerceiverForMaskedLM": "its sizes depend on each other",
    "ReformerForMaskedLM": "hashes queries and keys into buckets",
    "SwinForImageClassification": "attention within windows of an image",
    "Swinv2ForImageClassification": "attention within windows of an image",
    "TimmWrapperForImageClassification": "needs timm",
}
"""Classes without a tiny model, and why there is none."""

PEFT_CANNOT = "PEFT cannot"


def every_encoder() -> dict[str, str]:
    """The classes with a masked-language head, and those that classify images, with their `model_type`."""
    found: dict[str, str] = {}
    for names in (MODEL_FOR_MASKED_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES):
        for model_type, classes in names.items():
            for name in (classes,) if isinstance(classes, str) else classes:
                # Not the encoder-decoders that fill masks, too, nor what the table of decoders has.
                if not name.endswith("ForConditionalGeneration") and name not in every_class():
                    found.setdefault(name, model_type)
    return found


def judge_encoder(name: str, model_type: str, method: str) -> Verdict:
    """The verdict on one class; `method` is "prefix" or "soft prompt"."""
    if method == "soft prompt":
        return judge(name, model_type, method)
    model = make(name, model_type)
    try:
        handle = attached(model)
    except (NotImplementedError, ValueError) as error:
        fault = None if is_ours(error) else f"raw {type(error).__name__} out of attach: {error}"
        return Verdict(False, str(error), fault)
    except Exception as error:
        return Verdict(False, str(error), f"raw {type(error).__name__} out of attach: {error}")
    try:
        return Verdict(True, fault=_fault(model, handle, make(name, model_type)))
    except Exception as error:
        return Verdict(True, fault=f"{type(error).__name__}: {error}")


def attached(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return prefixcore.attach(
            model, PrefixTuningConfig(P, init="random", seed=0, task_type=None, modules_to_save=[])
        )


def _inputs(model: Any) -> dict[str, Tensor]:
    """Two rows, the second padded on the right; or two images."""
    ids = torch.tensor([[11, 58, 33, 70, 22, 19], [44, 9, 66, 13, 0, 0]])
    inputs = sample_inputs(model, ids, 2)
    inputs.pop("use_cache", None)
    if "attention_mask" in inputs:
        inputs["attention_mask"][1, 4:] = 0
    return inputs


def _fault(model: Any, handle: Any, bare: Any) -> str | None:
    """The first thing that is wrong with an attached encoder."""
    inputs = _inputs(model)
    seen = inputs["attention_mask"].bool() if "attention_mask" in inputs else slice(None)
    bank = handle._bank
    encoder = dict(bare.named_modules())[next(n for n, m in model.named_modules() if m is bank.decoder)]
    with torch.no_grad():
        got, without = bank.decoder(**inputs)[0][seen], encoder(**inputs)[0][seen]
        if bank.moves_positions:
            mask = inputs["attention_mask"]
            counted = (mask.cumsum(1) - 1).clamp(min=0) + bank.first_position + P
            inputs["position_ids"] = counted.masked_fill(mask == 0, max(0, bank.first_position - 1))
        modeling = sys.modules[type(encoder).__module__]
        if hasattr(modeling, "eager_attention_forward"):
            with concatenated(encoder, handle.bake()):
                expected = encoder(**inputs)[0][seen]
            missing, effect = (got - expected).norm(), (expected - without).norm()
            if not missing <= TOLERANCE * effect:
                return f"off by {float(missing):.3g} of {float(effect):.3g}"
        else:
            bare_faults.append(f"{type(bare).__name__}: no eager attention of its own to compare with")
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    inputs.pop("position_ids", None)
    for _ in range(2):
        optimizer.zero_grad()
        output = model(**inputs)
        (output.logits if hasattr(output, "logits") else output[0]).square().mean().backward()
        for name, parameter in handle.named_parameters():
            if parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.abs().max() > 0:
                return f"no gradient of {name}"
        optimizer.step()
    return None


def peft_cell(name: str, model_type: str) -> str:
    """What PEFT's prefix on the model without its head is beside ours: "equal", or that PEFT cannot."""
    import peft

    model, bare = make(name, model_type), make(name, model_type).base_model
    inputs = _inputs(model)
    seen = inputs["attention_mask"].bool() if "attention_mask" in inputs else slice(None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            options = {"task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": P}
            theirs = peft.get_peft_model(bare, peft.PrefixTuningConfig(**options)).eval()
            expected = theirs(**inputs)[0][seen]
        except Exception:
            return PEFT_CANNOT
    handle = attached(model)
    weight = theirs.prompt_encoder["default"].embedding.weight.detach()
    layers = handle.module.layers
    flat = weight.view(P, 2 * len(layers), *layers[0].key.shape[::2]).permute(1, 2, 0, 3)
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.key.copy_(flat[2 * i])
            layer.value.copy_(flat[2 * i + 1])
        got = model.base_model(**inputs)[0][seen]
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-4), (
        f"{name}: PEFT's prefix is {(got - expected).abs().max()} off"
    )
    return "equal"


HEADER = "| encoder | `model_type` | prefix | soft prompt | the prefix beside PEFT's |"


def cells(name: str, model_type: str) -> list[str]:
    """What the page says of a class: the two methods, and the comparison with PEFT."""
    if name in UNTRIED:
        return [f"not tried: {UNTRIED[name]}"] * 2 + [""]
    prefix, prompt = (cell(judge_encoder(name, model_type, method)) for method in ("prefix", "soft prompt"))
    return [prefix, prompt, peft_cell(name, model_type) if prefix == "works" else ""]


if __name__ == "__main__":
    write_table(HEADER, [row(name, kind, cells(name, kind)) for name, kind in sorted(every_encoder().items())])
