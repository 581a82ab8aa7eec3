"""The configuration of examples as a soft prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from .base import BaseConfig
from .checks import check_choice, is_count


@dataclass(frozen=True, eq=False)
class CPTConfig(BaseConfig):
    """Context-aware prompt tuning: examples as a soft prompt, moved a little (Blau et al., arXiv:2410.17222).

    Args:
        cpt_token_ids: the tokens of the examples; as many virtual tokens.
        cpt_mask: their attention mask; None: ones.
        cpt_tokens_type_mask: their types: modulo four, 1 is an input's template, 2 an input, 3 an answer's template, 0
            (that is 4, 8, ...) an answer; one quarter for each example. None: ones.
        opt_weighted_loss_type: "none" or "decay": earlier examples count less.
        opt_loss_decay_factor: how much less, for each example.
        opt_projection_epsilon: how far the embedding of an input's token may move.
        opt_projection_format_epsilon: how far that of a template's token may.
        seed, task_type, tokenizer_name_or_path, modules_to_save: as in `PromptTuningConfig`.
        num_virtual_tokens, init, init_text: said by the tokens; leave them out.

    Raises:
        ValueError: a value is out of range or two contradict each other.

    Examples:
        >>> config = prefixcore.CPTConfig(cpt_token_ids=[5, 6, 7, 8], cpt_tokens_type_mask=[1, 2, 3, 4])
        >>> config.num_virtual_tokens
        4
        >>> with prefixcore.attach(model, config):
        ...     loss = model(torch.tensor([[9, 10]]), labels=torch.tensor([[9, 10]])).loss
    """

    method: ClassVar[str] = "cpt"

    cpt_token_ids: list[int] = field(default_factory=lambda: [0])
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] = field(default=None)  # type: ignore[arg-type]
    opt_weighted_loss_type: str = "none"
    opt_loss_decay_factor: float = 1.0
    opt_projection_epsilon: float = 0.1
    opt_projection_format_epsilon: float = 0.1

    def __post_init__(self) -> None:
        if self.init not in (None, "tensor") or self.init_text is not None:
            raise ValueError("init of CPTConfig is the embeddings of cpt_token_ids; leave init and init_text out")
        ids = self.cpt_token_ids
        for name in ("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask"):
            values = getattr(self, name)
            if values is None:
                values = [1] * len(ids)
            if isinstance(values, str) or not isinstance(values, Sequence) or not all(map(is_count, values)):
                raise ValueError(f"{name} must be a list of integers from 0, got {values!r}")
            if len(values) != len(ids) or not ids:
                raise ValueError(f"{name} has {len(values)} numbers for {len(ids)} tokens: expected as many, and one")
            self._set(**{name: list(values)})
        if self.num_virtual_tokens not in (None, len(ids)):
            raise ValueError(f"num_virtual_tokens is {self.num_virtual_tokens}, but cpt_token_ids has {len(ids)}")
        self._set(num_virtual_tokens=len(ids), init="tensor")
        self._check_common()
        check_choice("opt_weighted_loss_type", self.opt_weighted_loss_type, ("none", "decay"))
        for name in ("opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 2**63:
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
