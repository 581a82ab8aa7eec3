"""The trainable soft prompt: embeddings of virtual tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import PromptTuningConfig, PTuningConfig
from .initialization import check_tensor, seeded
from .reparameterization import LowRank, PromptEncoder, RandomBasis, without_autocast
from .trained import fixed


class SoftPrompt(nn.Module):
    """Embeddings `[P, E]` of P virtual tokens, or what reparameterizes them.

    Args:
        hidden_size: E, the width of the model's embeddings.
        config: what to train. `num_virtual_tokens` may be None if `initial` is given.
        initial: the initial values, `[P, E]`; copied, in fp32. None: `config.init` must be "random" or "zero".

    Attributes:
        hidden_size: E.
        num_virtual_tokens: P.
        config: what is trained, its `num_virtual_tokens` set.
        fixed: the names of what is not trained: parameters of these names have no gradient.

    Raises:
        ValueError: no initial values, values that do not fit, or a reparameterization larger than the prompt.

    Examples:
        >>> from prefixcore.nn import PromptTuningConfig, SoftPrompt
        >>> config = PromptTuningConfig(
        ...     num_virtual_tokens=8, init="random", reparameterization="random_basis", num_basis=10
        ... )
        >>> prompt = SoftPrompt(32, config)
        >>> prompt().shape, sum(each.numel() for each in prompt.parameters() if each.requires_grad)
        (torch.Size([8, 32]), 10)
    """

    fixed = ("initial",)

    def __init__(
        self, hidden_size: int, config: PromptTuningConfig | PTuningConfig, initial: Tensor | None = None
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        if initial is not None:
            self.num_virtual_tokens = config.num_virtual_tokens or initial.shape[0]
            check_tensor("initial soft prompt", initial, (self.num_virtual_tokens, hidden_size))
            initial = initial.detach().to(torch.float32).clone(memory_format=torch.contiguous_format)
        elif config.num_virtual_tokens is not None and config.init in ("random", "zero"):
            self.num_virtual_tokens = config.num_virtual_tokens
        else:
            raise ValueError(
                f"init={config.init_name!r} needs the model's embeddings: give `initial`, a tensor "
                f"[P, {hidden_size}], or take init='random' or 'zero'"
            )
        num_tokens = self.num_virtual_tokens
        self.config = config.resolved(num_tokens)
        self.embedding: nn.Parameter | None = None
        self.reparameterization: nn.Module | None = None
        self.initial: nn.Parameter | None = None
        with seeded(config.seed):
            if isinstance(config, PTuningConfig):
                self.reparameterization = PromptEncoder(
                    num_tokens,
                    hidden_size,
                    config.encoder_hidden_size or hidden_size,
                    kind=config.encoder_reparameterization_type,
                    num_layers=config.encoder_num_layers,
                    dropout=config.encoder_dropout,
                    begin_at_zero=initial is not None or config.init == "zero",
                )
                # Without initial values the encoder makes the whole prompt, as in PEFT.
                self.initial = None if initial is None else fixed(initial)
                return
            if initial is None:
                make = torch.randn if config.init == "random" else torch.zeros
                initial = make(num_tokens, hidden_size)
            if config.reparameterization == "none":
                self.embedding = nn.Parameter(initial)
                return
            self.initial = fixed(initial)
            if config.reparameterization == "low_rank":
                self.reparameterization = LowRank(num_tokens, [hidden_size], config.rank)
            else:
                self.reparameterization = RandomBasis(num_tokens, hidden_size, config.num_basis, config.seed or 0)

    @property
    def is_reparameterized(self) -> bool:
        """Whether something else than the prompt itself is trained."""
        return self.reparameterization is not None

    def forward(self) -> Tensor:
        """`[P, E]`, differentiable, in the dtype of the parameters."""
        if self.reparameterization is None:
            assert self.embedding is not None
            return self.embedding
        prompt = without_autocast(self.reparameterization)
        return prompt if self.initial is None else self.initial.detach() + prompt

    def bake(self) -> Tensor:
        """The final prompt without dropout, detached and in memory of its own."""
        training = self.training
        self.eval()
        try:
            with torch.enable_grad():  # without gradients an LSTM takes another kernel, which rounds differently
                return self().detach().clone()
        finally:
            self.train(training)

    @torch.no_grad()
    def bake_some(self, start: int, stop: int) -> Tensor:
        """What `bake` returns of the virtual tokens from `start` to before `stop`, in the memory of as many.

        P-tuning's encoder may make each from all of them, so there it makes all.
        """
        if self.reparameterization is None or isinstance(self.reparameterization, PromptEncoder):
            return self.bake()[start:stop]
        prompt = without_autocast(self.reparameterization, start, stop)
        return prompt if self.initial is None else self.initial[start:stop] + prompt
