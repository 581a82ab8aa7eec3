"""Whether texts that begin alike may be computed once in a batch, as the branches of a tree."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .families import text_config
from .positions.model_inputs import has_axes

if TYPE_CHECKING:
    from .handle import Handle


def sharing_width(handle: Handle) -> int:
    """The hidden size of a model whose prefix lets it read a tree of texts; 0: it cannot.

    A tree is one row with a mask of its own, in which each token sees those on its way from the root. That says
    everything only where each layer lets a token see all that come before it, at positions that are given. A soft
    prompt, which stands in the row itself, has no place in such a mask. The loss of routers would weigh a text that is
    read once for several as one.
    """
    bank = handle._bank
    if getattr(text_config(handle.model), "output_router_logits", False):
        return 0
    if not handle._adapter.is_prefix or not handle.can_pack or not bank.only_full_attention or has_axes(handle.model):
        return 0
    return int(text_config(handle.model).hidden_size)
