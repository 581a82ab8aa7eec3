"""What is trained in place of a prefix or a soft prompt.

Every module here makes `num_tokens` virtual tokens: `forward()` returns `[num_tokens, width]`, where the width is a
soft prompt's hidden size, or that of a prefix in PEFT's layout (`split_layers`). Where the virtual tokens have
initial values, this is added to them and begins at exactly zero. Those that make each virtual token by itself take
`forward(start, stop)`, for some of them at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """`nn.Linear`, but no instance of it.

    What changes a model's linear layers by their class (PEFT's `target_modules="all-linear"`, quantisers) means those
    of the base model, and finds these in it too.
    """

    def __init__(self, input_width: int, width: int):
        super().__init__()
        made = nn.Linear(input_width, width)
        self.weight, self.bias = made.weight, made.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Mlp(nn.Module):
    """An embedding per virtual token, then linear, tanh, linear (Li and Liang, arXiv:2101.00190, section 4.3).

    Parameters have the names, shapes and order of initialization of PEFT's PrefixEncoder.
    """

    def __init__(self, num_tokens: int, input_width: int, hidden: int, width: int, *, begin_at_zero: bool):
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, input_width)
        first, last = Linear(input_width, hidden), Linear(hidden, width)
        self.transform = nn.Sequential(first, nn.Tanh(), last)
        if begin_at_zero:
            _zero(last)

    def forward(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.transform(self.embedding.weight[start:stop])


class LowRank(nn.Module):
    """`left [num_tokens, rank] @ right [rank, width]` for each of `widths` (layers); `right` begins at zero.

    As in LoRA (Hu et al., arXiv:2106.09685), one factor is random and the other begins at zero. `left` is drawn with
    variance 1/rank, so that a step of the optimizer in `right` moves the virtual tokens by about as much as the same
    step in themselves would.

    Raises:
        ValueError: the two factors hold no fewer numbers than their product.
    """

    def __init__(self, num_tokens: int, widths: Sequence[int], rank: int):
        super().__init__()
        for width in widths:
            max_rank = (num_tokens * width - 1) // (num_tokens + width)
            if rank > max_rank:
                mend = f"take rank <= {max_rank}" if max_rank else "take another reparameterization"
                raise ValueError(
                    f"rank {rank} is not low for {num_tokens} virtual tokens x {width}: it would train "
                    f"{rank * (num_tokens + width)} numbers in place of {num_tokens * width}; {mend}"
                )
        self.left = nn.ParameterList(torch.randn(num_tokens, rank) / math.sqrt(rank) for _ in widths)
        self.right = nn.ParameterList(torch.zeros(rank, width) for width in widths)

    def forward(self, start: int = 0, stop: int | None = None) -> Tensor:
        return torch.cat([left[start:stop] @ right for left, right in zip(self.left, self.right, strict=True)], dim=1)


class RandomBasis(nn.Module):
    """`basis @ coefficients` with a frozen random basis: `num_basis` numbers are trained in all.

    Training in a random subspace, `theta = theta_0 + P theta_d`, measures intrinsic dimension (Li et al.,
    arXiv:1804.08838; of fine-tuned language models Aghajanyan et al., arXiv:2012.13255). As in the Fastfood transform
    (Le et al., arXiv:1408.3060), the basis is a product of a Hadamard matrix and random signs and is never formed.
    Without Fastfood's permutation and Gaussian factors: the virtual tokens' numbers are cut into blocks of K, the
    power of two from `num_basis` up, and block b is `flip[b] * hadamard(sign[b] * coefficients) / sqrt(num_basis)`.
    So basis vectors are dense, of one magnitude everywhere and orthogonal within each whole block, and memory is that
    of the prefix. A step of the optimizer moves every number of the prefix by about as much as the same step would
    without the basis.

    `sign` [blocks, num_basis] and `flip` [blocks, K], int8, are bits of SHAKE-128 of the seed, the same on any device
    and with any version of torch, so they are not stored.

    Raises:
        ValueError: `num_basis` is more than the numbers that it is to move.
    """

    sign: Tensor
    flip: Tensor

    def __init__(self, num_tokens: int, width: int, num_basis: int, seed: int):
        super().__init__()
        size = num_tokens * width
        if num_basis > size:
            raise ValueError(f"num_basis is {num_basis} but only {size} numbers are to move; take fewer")
        self.num_tokens, self.width, self.num_basis = num_tokens, width, num_basis
        self.block = 1 << (num_basis - 1).bit_length()
        blocks = -(-size // self.block)
        self.coefficients = nn.Parameter(torch.zeros(num_basis))
        self.register_buffer("sign", _signs(seed, b"sign", blocks, num_basis), persistent=False)
        self.register_buffer("flip", _signs(seed, b"flip", blocks, self.block), persistent=False)

    def forward(self, start: int = 0, stop: int | None = None) -> Tensor:
        begin, end = start * self.width, (self.num_tokens if stop is None else stop) * self.width
        blocks = slice(begin // self.block, -(-end // self.block))
        signed = self.sign[blocks] * (self.coefficients / math.sqrt(self.num_basis))
        mixed = hadamard(nn.functional.pad(signed, (0, self.block - self.num_basis)))
        first = blocks.start * self.block
        return (self.flip[blocks] * mixed).flatten()[begin - first : end - first].view(-1, self.width)


class PromptEncoder(nn.Module):
    """P-tuning's encoder: an embedding per virtual token, then an MLP, or a bidirectional LSTM and an MLP.

    Liu et al., arXiv:2103.10385.

    Parameters have the names, shapes and order of initialization of PEFT's PromptEncoder.
    """

    def __init__(
        self,
        num_tokens: int,
        width: int,
        hidden: int,
        *,
        kind: str,
        num_layers: int,
        dropout: float,
        begin_at_zero: bool,
    ):
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, width)
        self.lstm_head: nn.LSTM | None = None
        steps: list[nn.Module]
        if kind == "LSTM":
            between = dropout if num_layers > 1 else 0.0
            self.lstm_head = nn.LSTM(width, hidden, num_layers, dropout=between, bidirectional=True, batch_first=True)
            steps = [Linear(2 * hidden, 2 * hidden), nn.ReLU()]
            last = Linear(2 * hidden, width)
        else:
            steps = [Linear(width, hidden), nn.ReLU(), Linear(hidden, hidden), nn.ReLU()]
            last = Linear(hidden, width)
        self.mlp_head = nn.Sequential(*steps, last)
        if begin_at_zero:
            _zero(last)

    def forward(self) -> Tensor:
        tokens = self.embedding.weight.unsqueeze(0)
        if self.lstm_head is not None:
            tokens = self.lstm_head(tokens)[0]
        return self.mlp_head(tokens)[0]


def without_autocast(module: nn.Module, *some: int) -> Tensor:
    """What `module` makes, under autocast too in the dtype of its parameters: rounded, small steps would be lost.

    `some`: start and stop of the virtual tokens to make, instead of all.
    """
    device = next(module.parameters()).device
    with nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False):
        return module(*some)


def hadamard(x: Tensor) -> Tensor:
    """`x` [..., K], K a power of two, times the K x K Hadamard matrix of +-1: in K log K additions."""
    half = 1
    while half < x.shape[-1]:
        low, high = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        half *= 2
    return x


def _signs(seed: int, purpose: bytes, rows: int, columns: int) -> Tensor:
    """`[rows, columns]` of +-1 as int8: the bits of SHAKE-128(purpose, seed), lowest bit of a byte first.

    On the CPU whatever device is the default: they are in no state that a module without memory could be given.
    """
    count = rows * columns
    stream = hashlib.shake_128(b"prefixcore random basis " + purpose + seed.to_bytes(8, "little"))
    octets = torch.frombuffer(bytearray(stream.digest(-(-count // 8))), dtype=torch.uint8)
    bits = (octets.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1
    return (1 - 2 * bits.flatten()[:count].to(torch.int8)).view(rows, columns)


def _zero(linear: Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
