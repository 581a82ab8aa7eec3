"""Multitask prompt tuning: one soft prompt for several tasks, and a low-rank factor for each of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .config import MultitaskPromptTuningConfig
from .initialization import check_tensor, fp32_copy, seeded

_STD = 0.02
"""Of the random factors, as in PEFT."""


class MultitaskPrompt(nn.Module):
    """A shared prompt `[P, E]`, times `cols[task] @ rows[task]` for each task (Wang et al., arXiv:2303.02861).

    Parameters have PEFT's names, shapes and order of initialization.

    Args:
        hidden_size: E, the width of the model's embeddings.
        config: what to train. `num_virtual_tokens` may be None if `initial` is given.
        initial: the initial shared prompt, `[P, E]`; copied, in fp32. None: `config.init` must be "random" or "zero".
        source: tensors of an adapter of the same kind to begin from, by PEFT's names; what is taken of them
            `config.prompt_tuning_init` says.

    Attributes:
        hidden_size: E.
        num_virtual_tokens: P.
        num_tasks: how many prompts `forward` makes.
        config: what is trained, its `num_virtual_tokens` set.

    Raises:
        ValueError: no initial values, or values that do not fit.

    Examples:
        >>> from prefixcore.nn import MultitaskPrompt, MultitaskPromptTuningConfig
        >>> config = MultitaskPromptTuningConfig(num_virtual_tokens=8, init="random", num_tasks=3, num_ranks=2)
        >>> prompts = MultitaskPrompt(32, config)
        >>> prompts().shape
        torch.Size([3, 8, 32])
    """

    is_reparameterized = False
    """What is trained is what the adapter's file holds."""

    def __init__(
        self,
        hidden_size: int,
        config: MultitaskPromptTuningConfig,
        initial: Tensor | None = None,
        source: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if config.source_init is not None:
            if source is None:
                raise ValueError(f"prompt_tuning_init={config.source_init!r} needs the tensors of a source adapter")
            initial = source["prompt_embeddings"]
        self.hidden_size, self.num_tasks = hidden_size, config.num_tasks
        tokens = config.num_virtual_tokens or (None if initial is None else initial.shape[0])
        if tokens is None or (initial is None and config.init not in ("random", "zero")):
            raise ValueError(
                f"init={config.init_name!r} needs the model's embeddings: give `initial`, a tensor "
                f"[P, {hidden_size}], or take init='random' or 'zero'"
            )
        self.num_virtual_tokens = tokens
        self.config = config.resolved(tokens)
        if initial is not None:
            check_tensor("initial soft prompt", initial, (tokens, hidden_size))
        with seeded(config.seed):
            if initial is None:
                initial = (torch.randn if config.init == "random" else torch.zeros)(tokens, hidden_size)
            cols = _STD * torch.randn(self.num_tasks, tokens, config.num_ranks)
            rows = _STD * torch.randn(self.num_tasks, config.num_ranks, hidden_size)
        if source is not None and config.source_init in ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK"):
            cols, rows = _of_source(config, source, cols.shape, rows.shape)
        self.embedding = nn.Parameter(fp32_copy(initial))
        self.prefix_task_cols = nn.Parameter(fp32_copy(cols))
        self.prefix_task_rows = nn.Parameter(fp32_copy(rows))

    def forward(self, tasks: Tensor | None = None) -> Tensor:
        """The prompts `[tasks, P, E]`, differentiable; with `tasks`, indices `[B]`, only those, `[B, P, E]`."""
        cols: Tensor = self.prefix_task_cols
        rows: Tensor = self.prefix_task_rows
        if tasks is not None:
            cols, rows = cols.index_select(0, tasks), rows.index_select(0, tasks)
        with torch.autocast(cols.device.type, enabled=False):
            return self.embedding * (cols @ rows)

    @torch.no_grad()
    def bake(self) -> Tensor:
        """The final prompts `[tasks, P, E]`, detached and in memory of their own."""
        return self()


def _of_source(
    config: MultitaskPromptTuningConfig, source: Mapping[str, Tensor], *shapes: torch.Size
) -> tuple[Tensor, Tensor]:
    """The factors of one source task, or their mean over all of them, for every task to begin from."""
    found = []
    for name, shape in zip(("prefix_task_cols", "prefix_task_rows"), shapes, strict=True):
        tensor = source[name].float()
        if config.source_init == "AVERAGE_SOURCE_TASKS":
            tensor = tensor.mean(0, keepdim=True)
        elif config.prompt_tuning_init_task < tensor.shape[0]:
            tensor = tensor[config.prompt_tuning_init_task].unsqueeze(0)
        else:
            raise ValueError(
                f"prompt_tuning_init_task is {config.prompt_tuning_init_task}, but the source has {len(tensor)} tasks"
            )
        check_tensor(f"{name} of the source", tensor, (1, *shape[1:]))
        found.append(tensor.expand(shape))
    return found[0], found[1]
