"""Going on with the training of an adapter that was loaded, which PEFT refuses for virtual tokens.

PEFT's files hold the virtual tokens, and nothing of an MLP or LSTM that they came out of. What goes on is the training
of the virtual tokens themselves, from the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch

from .methods import method


def resume(peft_model: Any, adapter: str) -> None:
    """Makes a loaded adapter trainable: what has a value of its own in the file gets gradients again.

    PEFT's `inference_mode` stays on where it means that the virtual tokens are read as they are, without an MLP.
    """
    encoder, config = peft_model.prompt_encoder[adapter], peft_model.peft_config[adapter]
    if method(peft_model) == "CPT":
        _split_off_delta(peft_model, adapter)
        config.inference_mode = False
        encoder.delta_embedding.requires_grad_(True)
        return
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name != "frozen_embedding")


def _split_off_delta(peft_model: Any, adapter: str) -> None:
    """Context-aware prompts are trained as the difference to the embeddings of their tokens, which is kept small."""
    encoder, config = peft_model.prompt_encoder[adapter], peft_model.peft_config[adapter]
    ids = torch.tensor(config.cpt_token_ids, device=peft_model.word_embeddings.weight.device)
    with torch.no_grad():
        learned = encoder.embedding.weight
        start = peft_model.word_embeddings(ids).to(learned)
        encoder.delta_embedding.weight.data = learned - start
        encoder.embedding.weight.data = start
