"""Decoders with other layers than attention: a prefix in those with attention is concatenated keys and values."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .encoders import concatenated

TOLERANCE = 2e-3
NEW = 4


def inputs() -> dict[str, Any]:
    """Two rows, the second padded on the right."""
    ids = torch.tensor([[11, 58, 33, 70, 22, 19], [44, 9, 66, 13, 0, 0]])
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def hybrid_fault(model: Any, handle: Any, bare: Any) -> str | None:
    """The first thing that is wrong with a prefix on such a model, beside the same bare one; None: nothing."""
    bank, batch = handle._bank, inputs()
    decoder = dict(bare.named_modules())[next(n for n, m in model.named_modules() if m is bank.decoder)]
    seen = batch["attention_mask"].bool()
    positions = (torch.arange(6) + handle.num_virtual_tokens * bank.moves_positions)[None].expand(2, -1)
    if not hasattr(sys.modules[type(decoder).__module__], "eager_attention_forward"):
        return "no eager attention to compare with"
    with torch.no_grad():
        got, without = bank.decoder(**batch, use_cache=False)[0][seen], decoder(**batch, use_cache=False)[0][seen]
        with concatenated(decoder, handle.bake()):
            expected = decoder(**batch, use_cache=False, position_ids=positions)[0][seen]
    missing, effect = (got - expected).norm(), (expected - without).norm()
    if not missing <= TOLERANCE * effect:
        return f"off by {float(missing):.3g} of {float(effect):.3g}"
    return _generate_fault(model, batch["input_ids"][:1])


def _generate_fault(model: Any, ids: Tensor) -> str | None:
    """Whether generate with a cache has other logits than forwards without one."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    output = model.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
    got = torch.stack(output.logits)[:, 0]
    with torch.no_grad():
        expected = model(output.sequences[:, :-1], use_cache=False).logits[0, -NEW:]
    missing = (got - expected).norm()
    return None if missing <= TOLERANCE * expected.norm() else f"with a cache off by {float(missing):.3g}"
