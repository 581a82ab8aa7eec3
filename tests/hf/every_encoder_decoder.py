"""What `attach` says about every encoder-decoder of transformers, and whether the first real calls agree.

    python -m tests.hf.every_encoder_decoder      writes their table in docs/models.md anew

A prefix, in all attention, works if outputs are those of the model's own eager attention with the prefix concatenated,
and if generate writes the same with its caches and without; a soft prompt if it acts as the text whose embeddings it
has.
"""

from __future__ import annotations

import sys
import warnings
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig
from prefixcore.hf.model.sample_inputs import sample_inputs
from prefixcore.hf.model.signature import argument_names
from prefixcore.hf.positions.decoder_positions import embed_positions, moved

from .encoders import P, concatenated
from .every_model import TOLERANCE, bare_faults, is_ours
from .models_page import Verdict, cell, row, write_table
from .tiny_models import WITH_IMAGES, every_class, make, tiny_config

IDS = torch.tensor([[11, 58, 33, 70, 2], [44, 9, 2, 0, 0]])
DECODER_IDS = torch.tensor([[1, 17, 40], [1, 63, 22]])
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def every_encoder_decoder() -> dict[str, str]:
    """The classes that read one sequence and write another, with their `model_type`."""
    found: dict[str, str] = dict(WITH_IMAGES)
    for names in (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES):
        for model_type, classes in names.items():
            for name in (classes,) if isinstance(classes, str) else classes:
                if name not in every_class() and _is_encoder_decoder(model_type):
                    found.setdefault(name, model_type)
    return found


@cache
def _is_encoder_decoder(model_type: str) -> bool:
    """Whether a configuration says so: many that read speech are decoders."""
    return bool(getattr(getattr(transformers, CONFIG_MAPPING_NAMES[model_type]), "is_encoder_decoder", False)) or bool(
        getattr(tiny_config(model_type), "is_encoder_decoder", False)
    )


def judge(name: str, model_type: str, method: str) -> Verdict:
    """The verdict on one class; `method` is "prefix" or "soft prompt"."""
    try:
        model, bare = (make(name, model_type, decoder_start_token_id=1) for _ in range(2))
    except Exception as error:
        return Verdict(False, f"no tiny model: {type(error).__name__}")
    text = torch.tensor([17, 40, 63, 80])
    config: Any = PrefixTuningConfig(P, init="random", seed=0, task_type="SEQ_2_SEQ_LM", modules_to_save=[])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            if method == "soft prompt":
                config = PromptTuningConfig(P, init="text", init_text="text", modules_to_save=[])
                if model.main_input_name != "input_ids":
                    config = PromptTuningConfig(P, init="zero")
            handle = prefixcore.attach(model, config, tokenizer=lambda words: {"input_ids": text.tolist()})
    except (NotImplementedError, ValueError) as error:
        fault = None if is_ours(error) else f"raw {type(error).__name__} out of attach: {error}"
        return Verdict(False, str(error), fault)
    except Exception as error:
        return Verdict(False, str(error), f"raw {type(error).__name__} out of attach: {error}")
    check = _prefix_fault if method == "prefix" else _prompt_fault
    try:
        fault = check(model, handle, bare) or _generate_fault(model, bare) or _training_fault(model, handle)
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    return Verdict(True, fault=fault)


def _inputs(model: Any) -> dict[str, Tensor]:
    inputs = sample_inputs(model, IDS, 2, DECODER_IDS)
    inputs.pop("use_cache", None)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = (IDS != 0).long()
    return inputs


def _prefix_fault(model: Any, handle: Any, bare: Any) -> str | None:
    inputs = _inputs(model)
    with torch.no_grad():
        got, without = model(**inputs).logits, bare(**inputs).logits
        modeling = sys.modules[type(bare).__module__]
        if not hasattr(modeling, "eager_attention_forward"):
            bare_faults.append(f"{type(bare).__name__}: no eager attention of its own to compare with")
            return None
        positions = handle._bank.positions
        if positions is not None:
            decoder = bare.get_decoder()
            embed, forward = decoder.embed_positions, decoder.embed_positions.forward
            names = argument_names(embed)
            embed.forward = lambda *args, **kwargs: embed_positions(names, forward, args, kwargs)
        with moved([P]), concatenated(bare, handle.bake()):
            expected = bare(**inputs).logits
    return _difference(expected, got, without)


def _prompt_fault(model: Any, handle: Any, bare: Any) -> str | None:
    inputs = _inputs(model)
    longer = torch.cat((torch.tensor([[17, 40, 63, 80]] * 2), IDS), 1)
    with torch.no_grad():
        got, without = model(**inputs).logits, bare(**inputs).logits
        more = {**inputs, "input_ids": longer, "attention_mask": (longer != 0).long()}
        expected = bare(**more).logits
    return _difference(expected, got, without)


def _generate_fault(model: Any, bare: Any) -> str | None:
    inputs = _inputs(model)
    inputs.pop("decoder_input_ids")
    try:
        bare.generate(**inputs, **GREEDY)
    except Exception as error:
        bare_faults.append(f"{type(bare).__name__}: generate: {type(error).__name__}: {error}")
        return None
    cached, uncached = (model.generate(**inputs, **GREEDY, use_cache=use) for use in (True, False))
    if not torch.equal(cached, uncached):
        one, other = (bare.generate(**inputs, **GREEDY, use_cache=use) for use in (True, False))
        if torch.equal(one, other):
            return "generate writes something else with caches"
        bare_faults.append(f"{type(bare).__name__}: generate writes something else with caches")
    return None


def _training_fault(model: Any, handle: Any) -> str | None:
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**_inputs(model)).logits.square().mean().backward()
        for name, parameter in handle.named_parameters():
            if parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.abs().max() > 0:
                return f"no gradient of {name}"
        optimizer.step()
    return None


def _difference(expected: Tensor, got: Tensor, without: Tensor) -> str | None:
    missing, effect = (got - expected).float().norm(), (expected - without).float().norm()
    return None if missing <= TOLERANCE * effect else f"off by {float(missing):.3g} of {float(effect):.3g}"


def peft_cell(name: str, model_type: str) -> str:
    """What PEFT's prefix, in self-attention of the decoder, is beside ours."""
    import tempfile

    import peft

    model, bare = (make(name, model_type, decoder_start_token_id=1) for _ in range(2))
    inputs = _inputs(model)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        try:
            options: dict[str, Any] = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": P}
            theirs = peft.get_peft_model(bare, peft.PrefixTuningConfig(**options)).eval()
            expected = theirs(**inputs).logits
            theirs.save_pretrained(folder)
        except Exception:
            return "PEFT cannot"
        try:
            prefixcore.load(model, folder)
        except prefixcore.AdapterError as error:
            if "learned bias" not in str(error):
                raise
            return "refused: PEFT's has a bias by position"
    got = model(**inputs).logits
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3), f"{name}: {(got - expected).abs().max()} off PEFT's"
    return "equal"


HEADER = "| encoder-decoder | `model_type` | prefix | soft prompt | the decoder's prefix beside PEFT's |"


def cells(name: str, model_type: str) -> list[str]:
    """What the page says of a class: the two methods, and the comparison with PEFT."""
    prefix, prompt = (cell(judge(name, model_type, method)) for method in ("prefix", "soft prompt"))
    return [prefix, prompt, peft_cell(name, model_type) if prefix == "works" else ""]


if __name__ == "__main__":
    write_table(HEADER, [row(name, kind, cells(name, kind)) for name, kind in sorted(every_encoder_decoder().items())])
