"""What all configurations share: initial values, the seed, the task type, modules that are trained along."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .checks import KeyValues, check_choice, check_positive, count_virtual_tokens, is_name

if TYPE_CHECKING:
    from typing_extensions import Self

TASK_TYPES = (
    "CAUSAL_LM",
    "SEQ_2_SEQ_LM",
    "SEQ_CLS",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that are trained along for a task type, as in PEFT."""

INITS = ("text", "vocab", "random", "zero", "tensor")
PEFT_INITS = {"TEXT": "text", "SAMPLE_VOCAB": "vocab", "RANDOM": "random"}
"""PEFT's names of initial values."""


@dataclass(frozen=True, eq=False)
class BaseConfig:
    """What all configurations share."""

    method: ClassVar[str]

    num_virtual_tokens: int | None = None
    init: str | Tensor | KeyValues | None = None
    init_text: str | None = None
    seed: int | None = field(default=None, kw_only=True)
    task_type: str | None = field(default="CAUSAL_LM", kw_only=True)
    tokenizer_name_or_path: str | None = field(default=None, kw_only=True)
    modules_to_save: list[str] | None = field(default=None, kw_only=True)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_common(self) -> None:
        if self.init is None:
            self._set(init="vocab" if self.init_text is None else "text")
        if isinstance(self.init, str):
            check_choice("init", self.init, INITS)
        elif isinstance(self.init, (Tensor, Sequence)):
            num_tokens = count_virtual_tokens(self.init)
            if self.num_virtual_tokens not in (None, num_tokens):
                raise ValueError(
                    f"num_virtual_tokens is {self.num_virtual_tokens} but init holds {num_tokens} of them; "
                    "leave num_virtual_tokens out or make them equal"
                )
            self._set(num_virtual_tokens=num_tokens)
        else:
            raise ValueError(
                f"init must be one of {', '.join(map(repr, INITS))} or tensors, got {type(self.init).__name__}"
            )
        if self.init == "text" and not self.init_text:
            raise ValueError("init='text' needs init_text, a text that is not empty")
        if self.init_text is not None and self.init != "text":
            raise ValueError(f"init_text is only read with init='text', but init is {self.init_name!r}")
        if self.num_virtual_tokens is not None:
            check_positive("num_virtual_tokens", self.num_virtual_tokens)
        elif self.init not in ("text", "tensor"):
            raise ValueError(
                f"init={self.init!r} needs num_virtual_tokens (a text and tensors have a length of their own)"
            )
        if self.seed is not None and (
            isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63
        ):
            raise ValueError(f"seed must be an integer from 0 to 2**63 - 1 or None, got {self.seed!r}")
        for name in ("init_text", "tokenizer_name_or_path"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ValueError(f"{name} must be a string or None, got {getattr(self, name)!r}")
        if self.task_type is not None:
            check_choice("task_type", self.task_type, TASK_TYPES)
        names = self.modules_to_save
        if names is not None:
            if isinstance(names, str) or not isinstance(names, Sequence) or not all(map(is_name, names)):
                raise ValueError(f"modules_to_save must be a list of names of modules or None, got {names!r}")
            self._set(modules_to_save=list(dict.fromkeys(names)))

    @property
    def is_reparameterized(self) -> bool:
        """Whether something else than the virtual tokens themselves is trained."""
        return getattr(self, "reparameterization", "encoder") != "none"

    @property
    def head_names(self) -> list[str]:
        """What `modules_to_save` names; where it is None, the heads that PEFT trains along for `task_type`."""
        return list(HEADS.get(self.task_type or "", ())) if self.modules_to_save is None else self.modules_to_save

    @property
    def init_name(self) -> str:
        """The name of `init`; "tensor" where it was given as tensors."""
        return self.init if isinstance(self.init, str) else "tensor"

    def resolved(self, num_virtual_tokens: int) -> Self:
        """A copy with this P, in which tensors given as `init` are the word "tensor"."""
        return dataclasses.replace(self, num_virtual_tokens=num_virtual_tokens, init=self.init_name)

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON can hold it; tensors given as `init` become the word 'tensor'."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {**values, "init": self.init_name}
