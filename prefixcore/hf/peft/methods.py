"""PEFT's prompt-learning methods: which there are, and which PeftModels can be accelerated."""

from __future__ import annotations

from typing import Any

PREFIX_METHODS = frozenset({"PREFIX_TUNING", "CARTRIDGE"})
"""Methods whose virtual tokens are keys and values of every layer."""

PROMPT_METHODS = frozenset({"PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"})
"""Methods whose virtual tokens are embeddings before the text."""


def method(peft_model: Any) -> str:
    """The name of PEFT's method; all adapters of a PeftModel have the same."""
    return str(getattr(peft_model.peft_type, "value", peft_model.peft_type))


def is_prefix(peft_model: Any) -> bool:
    """Whether the adapters are prefixes, and not soft prompts."""
    return method(peft_model) in PREFIX_METHODS


def is_seq2seq(peft_model: Any) -> bool:
    """Whether it reads one sequence and writes another: a `PeftModelForSeq2SeqLM`."""
    from peft import PeftModelForSeq2SeqLM

    return isinstance(peft_model, PeftModelForSeq2SeqLM)


def active_config(peft_model: Any) -> Any:
    """The configuration of the active adapter; RuntimeError: none is active."""
    if not isinstance(peft_model.active_adapter, str):
        raise RuntimeError("no adapter is active: the last one was deleted; call add_adapter, then set_adapter")
    return peft_model.peft_config[peft_model.active_adapter]


def check_peft_model(peft_model: Any) -> None:
    """Raises unless `peft_model` is one that PEFT puts virtual tokens into a decoder, or an encoder-decoder, with."""
    from peft import PeftModel, __version__
    from transformers import PreTrainedModel

    if not isinstance(peft_model, PeftModel):
        raise TypeError(
            f"expected a peft.PeftModel, or a transformers model and a PEFT configuration or an adapter's folder, got "
            f"{type(peft_model).__name__}"
        )
    # What `accelerate` has positions and token types made by, as PEFT's own `forward` does.
    if not hasattr(PeftModel, "_adjust_prompt_learning_kwargs"):
        raise NotImplementedError(
            "accelerate calls PeftModel._adjust_prompt_learning_kwargs, which PEFT has from 0.20 on, and not in "
            f"{__version__}: pip install 'peft>=0.20', or save the PeftModel and give its folder to prefixcore.load"
        )
    if method(peft_model) not in PREFIX_METHODS | PROMPT_METHODS:
        raise NotImplementedError(
            f"{method(peft_model)} learns no virtual tokens; prefixcore accelerates "
            f"{', '.join(sorted(PREFIX_METHODS | PROMPT_METHODS))}"
        )
    base = peft_model.base_model
    name = type(base).__name__
    if not isinstance(base, PreTrainedModel):
        raise NotImplementedError(f"the base model is {name}, not a transformers PreTrainedModel")
    if type(peft_model) is PeftModel:
        raise NotImplementedError(
            "the adapter has no task_type, and PEFT puts no virtual tokens into such a model: give its configuration "
            "one, as task_type='CAUSAL_LM'"
        )
    _check_stacks(peft_model)
    if base.main_input_name != "input_ids":
        raise NotImplementedError(f"{name} reads {base.main_input_name}; virtual tokens are for models of input_ids")
    if any(parameter.is_meta for parameter in peft_model.parameters()):
        raise ValueError("the model has parameters without values (on the meta device): load its weights first")


def _check_stacks(peft_model: Any) -> None:
    """Raises NotImplementedError for a task that is not the base model's, or virtual tokens for other stacks."""
    name, config = type(peft_model.base_model).__name__, peft_model.base_model.config
    if config.is_encoder_decoder != is_seq2seq(peft_model):
        kind = "an encoder-decoder, and" if config.is_encoder_decoder else "no encoder-decoder, but"
        raise NotImplementedError(
            f"{name} is {kind} its PeftModel is a {type(peft_model).__name__}: accelerate takes encoder-decoders, and "
            "no others, with task_type='SEQ_2_SEQ_LM'"
        )
    allowed = ((2,) if is_prefix(peft_model) else (1, 2)) if config.is_encoder_decoder else (1,)
    for adapter, each in peft_model.peft_config.items():
        if each.num_transformer_submodules not in (None, *allowed):
            raise NotImplementedError(
                f"adapter {adapter!r} has num_transformer_submodules={each.num_transformer_submodules}; with "
                f"{method(peft_model)} on {name} accelerate takes {' or '.join(map(str, allowed))}: leave it out, and "
                f"PEFT chooses {allowed[-1]}"
            )
