"""`accelerate`: one line that lets an existing PEFT model run on prefixcore's ops."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attaching import check_model
from ..attention.discover import NotOnInterfaceError, discover, find_backbone, has_other_layers, is_encoder
from ..attention.discover_cached import discover_cached
from ..attention.patch import frozen_run
from ..attention.recording import AttentionCall
from ..attention.refusals import warn_of_dropout
from ..families import is_known_encoder_decoder, text_config
from ..model.active import activate
from ..model.own_words import own_words
from ..reaching import is_tested
from .accelerated import ACCELERATED, Accelerated
from .checkpointing import checkpointing_hidden
from .methods import check_peft_model, is_prefix, is_seq2seq, method
from .prefix import PeftBank, PeftPrefix, prefix_shapes
from .resume import resume

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

_TOLERANCE = {torch.float32: 0.01, torch.float64: 0.01}
"""The share of the prefix's effect by which the outputs may differ from PEFT's."""

_HALF_TOLERANCE = 0.1
"""The same in bfloat16 and float16, whose rounding takes some hundredths."""


def accelerate(
    model: PeftModel | PreTrainedModel,
    adapter: PeftConfig | str | Path | None = None,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> Accelerated:
    """Lets a PEFT model with virtual tokens run on prefixcore's ops, in place.

    For PREFIX_TUNING, CARTRIDGE, PROMPT_TUNING, P_TUNING, MULTITASK_PROMPT_TUNING and CPT on decoders and encoders, and
    all but CPT on encoder-decoders (`task_type="SEQ_2_SEQ_LM"`). The model goes on with the same parameters (an
    optimizer that was made before keeps them), `state_dict`, `save_pretrained`, `generate`, `set_adapter`,
    `disable_adapter`, `add_adapter` and `delete_adapter`, and computes the same loss, logits (P + T of them for soft
    prompts on decoders) and gradients.

    A prefix is no longer expanded to the batch nor put into the cache: a cache that is returned holds the text alone,
    and may be given to the next call. Layers with a sliding window see it at any distance, where PEFT's lose it once
    the window has passed it. With padding on the left and no `position_ids`, PEFT's positions count the
    padding in `forward`; a model of a family outside `FAMILIES` may count them otherwise, so give them there. Calls
    with `output_attentions=True` are refused. A soft prompt stands where PEFT puts it, before the padding.

    More than with PEFT alone: gradient checkpointing with a prefix (`use_reentrant=False`; also what
    `prepare_model_for_kbit_training` turns on), and training that goes on from an adapter that was loaded.

    Args:
        model: a `peft.PeftModel`; or the transformers model under one that is yet to be made.
        adapter: for a transformers model, PEFT's configuration of a new adapter, or the folder of a saved one. PEFT
            itself makes no prefix on a model whose gradient checkpointing is on.
        adapter_name: the name of that adapter.
        is_trainable: a loaded adapter's training goes on. PEFT's files hold virtual tokens and nothing that
            reparameterizes them (MLP, LSTM), so that the virtual tokens themselves are trained from then on.

    Returns:
        What undoes it: `undo()`, or the end of a `with` block. Its `model` is the PeftModel.

    Raises:
        TypeError: neither a PeftModel, nor a transformers model with an adapter.
        ValueError: the model is accelerated, or something is attached to its base model, already; or the accelerate
            library has prepared it for mixed precision.
        NotImplementedError: no method of virtual tokens, or a prefix on a base model whose attention has no place for
            ours (Bloom, Falcon, MPT, GPT-Neo; T5, whose bias of positions is for PEFT's virtual tokens, too): PEFT's
            prefix works there as it is, and of the former `load` reads its files. A task that is not the model's. Or
            PEFT is older than 0.20.

    After an error the model is as it was.

    Examples:
        >>> import peft
        >>> config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
        >>> peft_model = peft.get_peft_model(model, config)
        >>> optimizer = torch.optim.AdamW(peft_model.parameters(), lr=5e-3)
        >>> accelerated = prefixcore.accelerate(peft_model)
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> peft_model(input_ids=ids, labels=ids).loss.backward()
        >>> optimizer.step()
        >>> peft_model.save_pretrained("adapter")
        >>> accelerated.undo()
    """
    peft_model: Any = model
    if adapter is not None:
        peft_model = _make(model, adapter, adapter_name)
    check_peft_model(peft_model)
    if ACCELERATED in peft_model.__dict__:
        raise ValueError("the PeftModel is accelerated already; call undo() on what accelerate returned first")
    if "_original_forward" in peft_model.__dict__:
        raise ValueError(
            "the accelerate library has prepared the PeftModel for mixed precision, which would be lost: call "
            "prefixcore.accelerate first and Accelerator.prepare after it; one that is prepared already goes through "
            "Accelerator.unwrap_model(model, keep_fp32_wrapper=False) before"
        )
    accelerated = Accelerated(peft_model, _attach(peft_model) if is_prefix(peft_model) else None)
    if is_trainable:
        resume(peft_model, peft_model.active_adapter)
    return accelerated


def _make(model: Any, adapter: Any, adapter_name: str) -> Any:
    """A new PeftModel: of a configuration, or of a folder."""
    from peft import PeftConfig, PeftModel, get_peft_model

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"an adapter is for a transformers model, got {type(model).__name__}")
    with checkpointing_hidden(model):
        if isinstance(adapter, PeftConfig):
            return get_peft_model(model, adapter, adapter_name=adapter_name)
        return PeftModel.from_pretrained(model, adapter, adapter_name=adapter_name)


def _attach(peft_model: Any) -> PeftBank:
    base: Any = peft_model.base_model
    check_model(base)
    if base.config.output_attentions or text_config(base).output_attentions:
        raise ValueError("config.output_attentions is on, but prefix attention never forms weights: set it to False")
    calls = _find_calls(base)
    backbone = find_backbone(base, calls)
    expected = None
    if not is_encoder(base, calls) and not is_seq2seq(peft_model) and has_other_layers(base, calls):
        expected = _outputs(peft_model)  # before anything is said of layers, as PEFT's prefix has none for these
    module = PeftPrefix(peft_model, prefix_shapes(peft_model, calls))
    if expected is None and not is_tested(base) and not is_known_encoder_decoder(base):
        expected = _outputs(peft_model)
    if any(parameter.requires_grad for parameter in peft_model.prompt_encoder.parameters()):
        warn_of_dropout(base)
    bank = PeftBank(base, backbone, module, calls)
    if expected is not None:
        try:
            _compare(peft_model, bank, *expected)
        except BaseException:
            bank.undo()
            raise
    return bank


def _find_calls(base: PreTrainedModel) -> list[AttentionCall]:
    """The attention calls of the base model; NotImplementedError: not all of them can be made ours."""
    with suppress(NotOnInterfaceError), own_words(base, "a prefix"):
        return discover(base)
    name = type(base).__name__
    refusal = (
        f"{name} has attention of its own, in whose place prefixcore cannot put another, so accelerate would make "
        "nothing faster: the PeftModel works as it is"
    )
    try:
        discover_cached(base)
    except NotImplementedError:
        raise NotImplementedError(refusal) from None
    raise NotImplementedError(
        f"{refusal}. To go on in prefixcore, save it and give the folder to prefixcore.load, which passes the prefix "
        f"to {name} as PEFT does, and as quickly"
    )


def _outputs(peft_model: Any) -> tuple[Tensor, Tensor]:
    """What PEFT computes for a few tokens, with its prefix and without."""
    given = _probe(peft_model)
    with frozen_run(peft_model.base_model):
        try:
            expected = type(peft_model).forward(peft_model, **given)[0]
        except Exception as error:
            raise NotImplementedError(
                f"PEFT's own {method(peft_model)} fails on {type(peft_model.base_model).__name__}, so there is nothing "
                f"to compare with: {type(error).__name__}: {str(error).rstrip('.')}. prefixcore.attach and "
                "prefixcore.load compare with the model itself and may take a prefix: give PrefixTuningConfig to the "
                "one; or save the PeftModel, and give its folder to the other"
            ) from error
        return expected, peft_model.base_model(**given)[0]


def _compare(peft_model: Any, bank: PeftBank, expected: Tensor, without: Tensor) -> None:
    """Raises NotImplementedError unless the model computes what PEFT does, measured by the effect of the prefix."""
    with frozen_run(peft_model.base_model), activate(bank):
        got = peft_model.base_model(**_probe(peft_model))[0]
    effect, missing = (expected - without).float().norm(), (expected - got).float().norm()
    if not missing <= _TOLERANCE.get(expected.dtype, _HALF_TOLERANCE) * effect + 1e-6 * expected.float().norm():
        raise NotImplementedError(
            f"{method(peft_model)} on {type(peft_model.base_model).__name__} does not compute what PEFT does (off by "
            f"{float(missing):.3g}, where the prefix changes the output by {float(effect):.3g}), so this family "
            f"({text_config(peft_model.base_model).model_type}) is not supported"
        )


def _probe(peft_model: Any) -> dict[str, Tensor]:
    """A call with [1, 5] ids spread evenly over the vocabulary, which a decoder behind an encoder reads too."""
    vocabulary = text_config(peft_model.base_model).vocab_size
    ids = (torch.arange(1, 6, device=peft_model.base_model.device) * vocabulary // 7).unsqueeze(0)
    return {"input_ids": ids, "decoder_input_ids": ids} if is_seq2seq(peft_model) else {"input_ids": ids}
