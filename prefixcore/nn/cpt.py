"""Context-aware prompt tuning: examples as a soft prompt, moved a little, and a loss over their answers too."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import CPTConfig
from .initialization import check_tensor
from .trained import fixed

_FORMAT_TOKENS = (1, 3)
_INPUT_TOKENS = (2,)
"""Types of tokens, modulo four: 1 and 3 are the template around an input and an answer, 2 the input, 0 the answer."""


class CPTPrompt(nn.Module):
    """Embeddings of the tokens of some examples and what is learned in addition (Blau et al., arXiv:2410.17222).

    What is learned for a token has a norm of at most an epsilon: after each step it is projected back, at the next
    forward. The tokens of answers stay as they are. As in PEFT.

    Args:
        hidden_size: E, the width of the model's embeddings.
        config: the tokens, their types, the epsilons.
        initial: the embeddings of `config.cpt_token_ids`, `[P, E]`; copied, in fp32.

    Attributes:
        hidden_size: E.
        num_virtual_tokens: P.
        config: what is trained.
        fixed: the names of what is not trained: parameters of these names have no gradient.

    Raises:
        ValueError: values that do not fit.

    Examples:
        >>> from prefixcore.nn import CPTConfig, CPTPrompt
        >>> config = CPTConfig(cpt_token_ids=[5, 6, 7, 8], cpt_tokens_type_mask=[1, 2, 3, 4])
        >>> prompt = CPTPrompt(32, config, torch.randn(4, 32))
        >>> prompt().shape
        torch.Size([4, 32])
    """

    is_reparameterized = True
    fixed = ("embedding",)
    _is_trained: Tensor
    _epsilon: Tensor

    def __init__(self, hidden_size: int, config: CPTConfig, initial: Tensor) -> None:
        super().__init__()
        self.hidden_size, self.num_virtual_tokens = hidden_size, len(config.cpt_token_ids)
        check_tensor("initial soft prompt", initial, (self.num_virtual_tokens, hidden_size))
        self.config = config
        self.embedding = fixed(initial.detach().float().clone(memory_format=torch.contiguous_format))
        self.delta_embedding = nn.Parameter(torch.zeros(self.num_virtual_tokens, hidden_size))
        kinds = [kind % 4 for kind in config.cpt_tokens_type_mask]
        scale = math.sqrt(hidden_size / 2048)
        by_kind = dict.fromkeys(_FORMAT_TOKENS, config.opt_projection_format_epsilon * scale)
        by_kind |= dict.fromkeys(_INPUT_TOKENS, config.opt_projection_epsilon * scale)
        epsilon = [by_kind.get(kind, 1e-10) for kind in kinds]
        trained = [kind != 0 for kind in kinds]
        self.register_buffer("_epsilon", torch.tensor(epsilon).unsqueeze(1), persistent=False)
        self.register_buffer("_is_trained", torch.tensor(trained).unsqueeze(1), persistent=False)

    @torch.no_grad()
    def projected(self) -> Tensor:
        """What is learned, `[P, E]`, each row no longer than its epsilon."""
        norm = self.delta_embedding.norm(dim=1, keepdim=True)
        return torch.where(norm > 0, self.delta_embedding * (self._epsilon / norm.maximum(self._epsilon)), 0.0)

    def forward(self) -> Tensor:
        """`[P, E]`, differentiable; where a gradient is wanted, what is learned is first projected for good."""
        delta = self.delta_embedding
        if not (torch.is_grad_enabled() and delta.requires_grad):
            return self.embedding.detach() + self.projected()
        with torch.no_grad():
            delta.copy_(self.projected())
        return self.embedding.detach() + torch.where(self._is_trained, delta, delta.detach())

    @torch.no_grad()
    def bake(self) -> Tensor:
        """The final prompt, detached and in memory of its own."""
        return self.embedding + self.projected()


def cpt_labels(config: CPTConfig, labels: Tensor, types: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The labels of prompt and text, and their types of tokens, which `cpt_loss` wants.

    Args:
        config: of the prompt.
        labels: of the text, `[B, T]`; -100 where there is none.
        types: of the text's tokens, `[B, T]`; None: all are answers.

    Returns:
        Labels and types `[B, P + T]`. Only answers have a label.

    Examples:
        >>> from prefixcore.nn import CPTConfig
        >>> from prefixcore.nn import cpt_labels
        >>> config = CPTConfig(cpt_token_ids=[5, 6], cpt_tokens_type_mask=[1, 4])
        >>> cpt_labels(config, torch.tensor([[7, 8]]))
        (tensor([[-100,    6,    7,    8]]), tensor([[1, 4, 8, 8]]))
    """
    rows = labels.shape[0]
    if types is None:
        types = torch.full_like(labels, 4)
    types = types.to(labels)
    prompt_types = torch.tensor(config.cpt_tokens_type_mask, device=labels.device, dtype=labels.dtype)
    types = torch.where(types > 0, types + prompt_types.max(), types)
    types = torch.cat((prompt_types.expand(rows, -1), types), dim=1)
    ids = torch.tensor(config.cpt_token_ids, device=labels.device, dtype=labels.dtype)
    labels = torch.cat((ids.expand(rows, -1), labels), dim=1)
    return labels.masked_fill(~((types > 0) & (types % 4 == 0)), -100), types


def cpt_loss(config: CPTConfig, logits: Tensor, labels: Tensor, types: Tensor) -> Tensor:
    """The loss over every answer, in the prompt and in the text; with "decay", an earlier one counts less.

    Args:
        config: of the prompt.
        logits: of prompt and text, `[B, P + T, V]`.
        labels, types: from `cpt_labels`.

    Returns:
        The mean of the weighted losses.

    Examples:
        >>> from prefixcore.nn import CPTConfig
        >>> from prefixcore.nn import cpt_labels, cpt_loss
        >>> config = CPTConfig(cpt_token_ids=[5, 6], cpt_tokens_type_mask=[1, 4])
        >>> labels, types = cpt_labels(config, torch.tensor([[7, 8]]))
        >>> cpt_loss(config, torch.zeros(1, 4, 10), labels, types)
        tensor(2.3026)
    """
    labels, types = labels[:, 1:], types[:, 1:]
    losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=-100, reduction="none")
    weights = torch.ones_like(losses)
    if config.opt_weighted_loss_type == "decay":
        for row, kinds in zip(weights, types, strict=True):
            answers = kinds[(kinds > 0) & (kinds % 4 == 0)].unique()
            for age, kind in enumerate(answers.flip(0).tolist()):
                row[kinds == kind] = config.opt_loss_decay_factor**age
    counted = labels != -100
    return (losses * weights)[counted].mean()
