"""Whether a call has its soft prompts already, in its embeddings or in its cache, or lacks them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ..batch.tasks import Rows
from ..model.active import is_active
from ..positions.cache import cache_argument, get_label, label_to_continue
from ..positions.model_inputs import has_stand_ins
from ..positions.positions import batch_rows
from ..prompts.prompt_embeddings import is_inserted
from .handed import ROWS

if TYPE_CHECKING:
    from .bank import Bank


def continues_after_prompts(kwargs: dict[str, Any], rows: Rows) -> bool:
    """Whether the cache of a call holds soft prompts, be it only as padding of the rows that were selected."""
    cache = cache_argument(kwargs)
    label = get_label(cache)
    if label is None or not label.slots:
        return False
    return label_to_continue(cache, rows.keys(batch_rows(kwargs))) is not None


def lacks_prompt(bank: Bank, kwargs: dict[str, Any]) -> bool:
    """Whether a call of the model without its head starts a sequence by itself, without its soft prompt."""
    if ROWS in kwargs or is_active(bank.patch) or all(a.is_prefix for a in bank.adapters.values()):
        return False  # a model of images alone has no input embeddings to ask
    if torch.compiler.is_compiling():  # which sees no mark on embeddings or a cache
        return cache_argument(kwargs) is None
    if is_inserted(kwargs.get("inputs_embeds")):
        return False
    return not has_stand_ins(bank.model.get_input_embeddings()) and get_label(cache_argument(kwargs)) is None


def check_inserted(bank: Bank, module: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Raises RuntimeError in a call that starts a sequence of `module` by itself, without its soft prompt."""
    if bank.encoder is not None or not lacks_prompt(bank, kwargs):
        return
    raise RuntimeError(
        f"{type(module).__name__} was called without the soft prompt, which is put in when the model that it is "
        f"attached to ({type(bank.model).__name__}) is called"
    )
