"""The forward of a PeftModel with soft prompts: embeddings of prompt and text in one pass.

Where the prompt stands, and what mask, positions, labels and token types go with it, is PEFT's: the prompt comes first,
padding on the left after it, outputs have P + T tokens, positions that are given are left out with a warning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops import soft_embedding
from ..model.devices import is_plain
from .encoder import prompt
from .methods import active_config, method


def soft_prompt_forward(
    peft_model: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    task_ids: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """One forward with the active adapter's soft prompt; arguments and output are those of the PeftModel's own."""
    from peft import PeftModelForCausalLM, PeftModelForFeatureExtraction

    config, adapter = active_config(peft_model), str(peft_model.active_adapter)
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    if tokens is None:
        raise ValueError("You must provide either input_ids or inputs_embeds")
    batch_size, virtual = tokens.shape[0], config.num_virtual_tokens
    if attention_mask is not None:
        attention_mask = torch.cat((attention_mask.new_ones(batch_size, virtual), attention_mask), 1)
    is_causal = isinstance(peft_model, PeftModelForCausalLM)
    keeps_types = not is_causal and not isinstance(peft_model, PeftModelForFeatureExtraction)
    peft_model._adjust_prompt_learning_kwargs(config, kwargs=kwargs, remove_token_type_ids=not keeps_types)
    if (types := kwargs.get("token_type_ids")) is not None:
        kwargs["token_type_ids"] = torch.cat((types.new_zeros(batch_size, virtual), types), 1).long()
    if return_dict is None and keeps_types:
        return_dict = getattr(peft_model.config, "return_dict", True)
    kwargs.update(
        attention_mask=attention_mask,
        inputs_embeds=embed(peft_model, prompt(peft_model, adapter, task_ids), input_ids, inputs_embeds),
        output_attentions=output_attentions,
        output_hidden_states=output_hidden_states,
        return_dict=return_dict,
    )
    if method(peft_model) == "CPT":
        return _cpt(peft_model, config, tokens, labels, kwargs)
    if is_causal and labels is not None:
        labels = torch.cat((labels.new_full((batch_size, virtual), -100), labels), 1)
    if labels is not None or is_causal:
        kwargs["labels"] = labels
    return peft_model.base_model(**kwargs)


def embed(peft_model: Any, virtual: Tensor, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
    """Embeddings [B, P + T, E] of the prompt, [P, E] or one a row [B, P, E], and then the text.

    Raises:
        IndexError: an id that the model has no embedding of.
    """
    table: Any = peft_model.word_embeddings
    if embeds is None and ids is not None and ids.numel() and _is_plain(peft_model, table):
        size = table.weight.shape[0]
        rows = virtual.flatten(0, -2)
        if rows.dtype not in (torch.float32, table.weight.dtype):
            rows = rows.to(table.weight.dtype)
        if torch.compiler.is_compiling():  # compiled code cannot read values: the op finds those beyond all its rows
            ids = torch.where(ids < size, ids, ids + len(rows))
        else:
            low, high = torch.stack(torch.aminmax(ids)).tolist()  # together: each read makes a GPU wait
            if low < 0 or high >= size:
                raise IndexError(f"input_ids must be from 0 to {size - 1}, got {low} to {high}")
        # Ids from V upwards are virtual tokens to the op.
        virtual_ids = torch.arange(size, size + len(rows), device=ids.device, dtype=ids.dtype)
        virtual_ids = virtual_ids.view(-1, virtual.shape[-2]).expand(ids.shape[0], -1)
        return soft_embedding(torch.cat((virtual_ids, ids), 1), table.weight, rows.to(table.weight.device))
    if embeds is None:
        embeds = table(ids)
    virtual = virtual.to(device=embeds.device, dtype=embeds.dtype)
    return torch.cat((virtual.expand(embeds.shape[0], -1, -1), embeds), 1)


def _is_plain(peft_model: Any, table: Any) -> bool:
    """Whether the embedding is a look-up and nothing else, but for hooks that make its output require a gradient.

    Such a hook is for gradient checkpointing, which needs an input with a gradient: virtual tokens have one.
    """
    base: Any = peft_model.base_model
    hooks = [*getattr(base, "_require_grads_hooks", ()), getattr(base, "_require_grads_hook", None)]
    harmless = {hook.id for hook in hooks if hook is not None}
    return (
        type(table).forward is torch.nn.Embedding.forward
        and "forward" not in table.__dict__
        and not table._forward_pre_hooks
        and set(table._forward_hooks) <= harmless
        and table.max_norm is None
        and not table.weight.requires_grad
        and is_plain(table.weight)
    )


def _cpt(peft_model: Any, config: Any, tokens: Tensor, labels: Tensor | None, kwargs: dict[str, Any]) -> Any:
    """The call of the base model and the loss of context-aware prompt tuning, whose prompt has labels of its own."""
    types = kwargs.pop("input_type_mask", None)
    if labels is None:
        return peft_model.base_model(**kwargs)
    batch_size, device = tokens.shape[0], labels.device
    types = labels.new_full(tokens.shape[:2], 4) if types is None else types.to(device).clone()
    prompt_types = torch.tensor(config.cpt_tokens_type_mask, device=device).expand(batch_size, -1)
    types = torch.where(types > 0, types + prompt_types.max(), types)  # so that no type is in both
    types = torch.cat((prompt_types, types), 1)
    prompt_labels = torch.tensor(config.cpt_token_ids, device=device).expand(batch_size, -1)
    labels = torch.cat((prompt_labels, labels), 1)
    labels = torch.where((types > 0) & (types % 4 == 0), labels, -100)
    encoder = peft_model.prompt_encoder[str(peft_model.active_adapter)]
    return encoder.calculate_loss(peft_model.base_model(**kwargs, labels=labels), labels, types, config)
