"""`Attached`: one adapter on a model."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeAlias

from torch import Tensor
from torch.autograd import forward_ad

from ...nn import CPTPrompt, MultitaskPrompt, SoftPrompt

AnyPrompt: TypeAlias = SoftPrompt | MultitaskPrompt | CPTPrompt
"""A module that makes the embeddings of virtual tokens, [P, E], or of several tasks [tasks, P, E]."""


class Attached:
    """One adapter on a model.

    Attributes:
        name: its name in a bank of several; None: it is the only one.
        module: makes the virtual tokens: a `Prefix`, a `SoftPrompt`, or a module of the same interface.
        layers: of a prefix, the attention layers that have it, by their place in the model.
        first_task: the number of its first task.
        num_tasks: how many it has; one, but for multitask prompt tuning.
        trained: its parameters that were to be trained when it was attached.
        handle: the `Handle` that the user holds.
        base_model: the fingerprint of the whole model, where this process has let go of some of it; None: it has not.
        is_kept: whether its values stay on the model's device; else `Bank.residency` brings them there.
    """

    def __init__(self, module: Any, layers: Sequence[int] | None = None, name: str | None = None) -> None:
        self.module = module
        self.layers = None if layers is None else list(layers)
        self.name, self.first_task = name, 0
        self.num_tasks = getattr(module, "num_tasks", None) or 1
        self._uid = uuid.uuid4().hex
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.handle: Any = None
        self.base_model: dict[str, Any] | None = None
        self.is_kept = True

    @property
    def uid(self) -> str:
        """What tells it from all others; a copy of the model keeps it."""
        return self._uid

    @property
    def is_prefix(self) -> bool:
        """Whether its virtual tokens are keys and values; else embeddings."""
        return self.layers is not None

    @property
    def virtual_token_ids(self) -> int | list[int] | None:
        """The ids that stand for its virtual tokens in a text; None: they stand before it."""
        return getattr(self.module.config, "virtual_token_ids", None)

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        return self.module.num_virtual_tokens

    @property
    def shift(self) -> int:
        """How many positions further on a text stands behind it: P, or 0 by a prefix's `position_offset=False`."""
        return self.num_virtual_tokens if getattr(self.module.config, "position_offset", True) else 0

    @property
    def trains(self) -> bool:
        """Whether something of it gets a gradient in a forward that records them, or has a derivative going forward."""
        if any(parameter.requires_grad for parameter in self.module.parameters()):
            return True
        if forward_ad._current_level < 0:  # also inside torch.func.jvp
            return False
        return any(forward_ad.unpack_dual(parameter).tangent is not None for parameter in self.module.parameters())

    @property
    def version(self) -> tuple[tuple[int, int], ...]:
        """Another one once something that its virtual tokens are made from was changed in place, or replaced."""
        tensors = chain(self.module.parameters(), self.module.buffers())
        return tuple((each.data_ptr(), 0 if each.is_inference() else each._version) for each in tensors)

    def values(self) -> dict[str, Tensor]:
        """All that its virtual tokens are made from."""
        found: dict[str, Tensor] = self.module.state_dict()
        return found
