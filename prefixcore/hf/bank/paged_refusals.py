"""What is attached that continuous batching cannot show, said before it is started."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedModel
from transformers.integrations.eager_paged import eager_paged_attention_forward

from ..attention.discover import remembering_layers
from ..batch.tasks import Task
from ..families import text_config
from ..positions.rotary import why_fixed

if TYPE_CHECKING:
    from .bank import Bank


def check_paged(bank: Bank, tasks: Sequence[Task]) -> None:
    """Raises NotImplementedError for what would not be seen as `generate` shows it."""
    prefixes = [task.adapter for task in tasks if task.adapter.is_prefix]
    reason = None
    if bank.encoder is not None:
        reason = "the model has an encoder, whose output no request can hold"
    elif bank.stage is not None or bank.data_meshes or any(group is not None for group in bank.head_groups):
        reason = "the model is shared out among processes"
    elif bank.model.device.type == "meta":
        reason = "the weights of the model are offloaded"
    elif "position_ids" not in bank.names[bank.model]:
        reason = "the model counts positions by itself, from the first token of all requests"
    elif any(getattr(module, "is_causal", True) is False for module in bank.model.get_decoder().modules()):
        reason = "tokens of a text see later ones (as PaliGemma's), and in pages they do not"
    elif bank.cache_layers:
        reason = "the attention of the model is not one that reads them"
    elif any(task.adapter.virtual_token_ids is not None for task in tasks):
        reason = "a soft prompt stands within the text (virtual_token_ids)"
    elif bank.is_hybrid or remembering_layers(text_config(bank.model)):
        reason = "the model has other layers than attention, whose states no page holds"
    elif not bank.moves_positions:
        reason = "the model reads no positions"
    elif any(adapter.shift == 0 for adapter in prefixes) and (why := _why_fixed(bank)) is not None:
        reason = f"a prefix takes no positions (position_offset=False), and each token in a page has one: {why}"
    elif any(set(adapter.layers or ()) != set(range(len(bank.layers))) for adapter in prefixes):
        reason = "a prefix is seen by some layers alone, and all of them share a page's places"
    if reason is not None:
        raise NotImplementedError(
            f"continuous batching (generate_batch) keeps virtual tokens in its pages as tokens before the text, but "
            f"{reason}: call generate on padded batches (with task_ids for different adapters), or detach first"
        )


def _why_fixed(bank: Bank) -> str | None:
    """Why the keys of a prefix cannot be moved to the positions before a text, in words; None: they can."""
    with bank.disabled():  # a few tokens show it, and nothing may stand before them
        return why_fixed(bank.model)


def check_attention(model: PreTrainedModel) -> None:
    """Raises NotImplementedError where transformers' attention for pages would leave out what the model's has."""
    capped = getattr(text_config(model), "attn_logit_softcapping", None) is not None
    is_eager = model.config._attn_implementation == "paged|eager"
    if capped and is_eager and "softcap" not in inspect.signature(eager_paged_attention_forward).parameters:
        raise NotImplementedError(
            f"{type(model).__name__} caps its attention scores, which transformers' 'paged|eager' leaves out without a "
            "word: load the model with a flash attention, or call generate on padded batches"
        )
