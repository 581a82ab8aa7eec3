"""What stands outside the softmax of attention, composed for the experiments that the suite makes with it.

The gate of LLaMA-Adapter and the module of Prefix-Tuning+ add something to what attention over the sequence gives:
nothing at all before the first step, so that the model is then the bare model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from prefixcore.hf.attention.interface import ATTENTION, LAYER
from prefixcore.hf.attention.prefix import KeyValue, PrefixCall
from prefixcore.ops import prefix_attention


class Seen(NamedTuple):
    """What one layer has at hand in a call.

    Attributes:
        query: [B, H, T, D], after the rotary embedding.
        unrotated: the same before it.
        key, value: [B, Hkv, S, D] and [B, Hkv, S, Dv] of the sequence.
        prefix: key [Hkv, P, D] and value [Hkv, P, Dv].
        scale: of the scores; None: 1 / sqrt(D).
    """

    query: Tensor
    unrotated: Tensor
    key: Tensor
    value: Tensor
    prefix: KeyValue
    scale: float | None


class Gate(nn.Module):
    """`tanh(g) * softmax(q P_k^T) P_v`, a softmax over the prefix alone; g is a number a head and begins at zero.

    Zhang et al., arXiv:2303.16199 (zero-initialised attention), with the tanh of the authors' code.

    Args:
        heads: H.
        head_dim: D.
        rate: how many times the learning rate of all else g has.
    """

    replaces_prefix = True

    def __init__(self, heads: int, head_dim: int, rate: float = 1.0) -> None:
        super().__init__()
        self.rate, self.gate = rate, nn.Parameter(torch.zeros(heads))

    def forward(self, seen: Seen) -> Tensor:
        nothing = seen.key[:, :, :0], seen.value[:, :, :0]
        out = prefix_attention(seen.query, *nothing, *seen.prefix, is_causal=False, scale=seen.scale)
        return out * torch.tanh(self.rate * self.gate)[:, None, None]


class FeatureMap(nn.Module):
    """`elu(W_q x) M`: a matrix M [D, D] a head, which begins at zero, on the query before its rotary embedding.

    Wang et al., arXiv:2506.13674: `phi(W_q x)^T M` beside the softmax, with phi = elu.

    Args:
        heads: H.
        head_dim: D.
        rate: how many times the learning rate of all else M has.
    """

    replaces_prefix = True

    def __init__(self, heads: int, head_dim: int, rate: float = 1.0) -> None:
        super().__init__()
        self.rate, self.matrix = rate, nn.Parameter(torch.zeros(heads, head_dim, head_dim))

    def forward(self, seen: Seen) -> Tensor:
        matrix = (self.rate * self.matrix).to(seen.unrotated.dtype)
        return functional.elu(seen.unrotated) @ matrix


class FeatureMapBesidePrefix(FeatureMap):
    """The same beside a prefix that attention sees as ever."""

    replaces_prefix = False


Make = Callable[[int, int], nn.Module]
"""Makes what stands beside one layer's softmax, of the numbers of heads and of dimensions of a head."""


@contextmanager
def outside(handle: Any, make: Make) -> Iterator[Sequence[nn.Parameter]]:
    """A block in which each attention layer with a prefix gives what `make` makes, too; its parameters.

    Args:
        handle: of a prefix on a model of Llama's kind.
        make: called once a layer.
    """
    model = handle.model
    numbers = {each: each.__dict__[LAYER].numbers[0] for each in model.modules() if LAYER in each.__dict__}
    size = model.config
    head_dim = next(iter(numbers)).head_dim
    beside = {each: make(size.num_attention_heads, head_dim) for each in numbers}
    unrotated: dict[nn.Module, Tensor] = {}
    attend = AttentionInterface()[ATTENTION]

    def attend_both(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        prefixcore_prefixes: PrefixCall | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        mine = beside.get(module)
        if mine is None or prefixcore_prefixes is None:
            return attend(module, query, key, value, mask, prefixcore_prefixes=prefixcore_prefixes, **kwargs)
        pair = prefixcore_prefixes.at(numbers[module], query.device)
        assert pair is not None
        call = PrefixCall([]) if mine.replaces_prefix else prefixcore_prefixes
        out, weights = attend(module, query, key, value, mask, prefixcore_prefixes=call, **kwargs)
        projected = unrotated.pop(module).view(query.shape[0], query.shape[2], -1, head_dim).transpose(1, 2)
        more = mine(Seen(query, projected, key, value, pair, kwargs.get("scaling")))
        return out + more.transpose(1, 2).to(out.dtype), weights

    with ExitStack() as stack:
        for module in numbers:

            def keep(_: Any, __: Any, out: Tensor, module: nn.Module = module) -> None:
                unrotated[module] = out

            stack.callback(module.get_submodule("q_proj").register_forward_hook(keep).remove)
        AttentionInterface.register(ATTENTION, attend_both)
        stack.callback(AttentionInterface.register, ATTENTION, attend)
        yield [parameter for each in beside.values() for parameter in each.parameters()]
