"""The check of a decoder that has other layers than attention: state spaces, linear attention, convolutions.

A prefix is in its attention layers alone, and what the others remember of a text is not in it, so it does not act as a
text. It is compared with the obvious implementation, as an encoder's, and what is generated with a cache with what is
computed without one.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..nn import Prefix, PrefixTuningConfig
from .attention.patch import frozen_run
from .attention.recording import AttentionCall
from .bank.attached import Attached
from .bank.bank import Bank
from .model.devices import device_of
from .model.own_words import own_words
from .positions.model_inputs import plain_ids
from .verify import CONTINUATION, NEW, PADDING, TEXT, first, generate_after_text, generate_tokens, tolerance
from .verify_encoder import verify_encoder


def verify_hybrid(model: PreTrainedModel, backbone: PreTrainedModel, calls: list[AttentionCall]) -> None:
    """Raises NotImplementedError unless a prefix in the attention layers is keys and values before the text's."""
    verify_encoder(model, backbone, calls)
    if not model.can_generate():
        return
    ids = plain_ids(model, TEXT + CONTINUATION)
    with own_words(model, "a prefix"):
        bare = generate_after_text(model, ids)
        if bare is None:
            return
        module = Prefix([call.shape for call in calls], PrefixTuningConfig(TEXT, init="random", seed=0))
        bank = Bank(model)
        try:
            bank.set_decoder(backbone, calls)
            bank.add(Attached(module.to(device_of(model)), range(len(calls))))
            _compare_with_cache(model, ids[:, TEXT:], bare.pads)
        finally:
            bank.patch.undo()


def _compare_with_cache(model: PreTrainedModel, ids: torch.Tensor, pads: bool) -> None:
    rows = ids.repeat(2, 1)
    mask = torch.ones_like(rows)
    rows[1, :PADDING] = mask[1, :PADDING] = 0
    logits, tokens = generate_tokens(model, rows, mask)  # [new, 2, V], [2, new]
    for row in range(2 if pads else 1):
        whole = torch.cat((rows[row, PADDING * row :], tokens[row, :-1]))[None]
        with frozen_run(model):
            expected = first(model(input_ids=whole, use_cache=False))[0, -NEW:]
        missing, size = (expected - logits[:, row]).float().norm(), expected.float().norm()
        if not missing <= tolerance(model) * size:
            raise NotImplementedError(
                f"a prefix on {type(model).__name__} does not generate with a cache what it computes without one (off "
                f"by {float(missing):.3g} of {float(size):.3g}), so this family is not supported"
            )
