"""The trainable prefix: keys and values of virtual tokens, for every layer that has one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .config import KeyValues, PrefixTuningConfig
from .initialization import LayerShape, random_init, seeded, split_layers, tensor_init, zero_init
from .reparameterization import LowRank, Mlp, RandomBasis, without_autocast
from .trained import fixed


class KeyValue(nn.Module):
    """One layer's key `[Hkv, P, D]` and value `[Hkv, P, Dv]`: parameters, with a gradient if `trainable`."""

    key: Tensor
    value: Tensor

    def __init__(self, key: Tensor, value: Tensor, *, trainable: bool):
        super().__init__()
        self.trainable = trainable
        for name, tensor in (("key", key), ("value", value)):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
            self.register_parameter(name, nn.Parameter(tensor) if trainable else fixed(tensor))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Both, by a call, in which DeepSpeed's ZeRO-3 puts its parts together; afterwards it takes them away again."""
        if not self.trainable:
            return self.key.detach(), self.value.detach()
        if hasattr(self.key, "ds_id"):
            return self.key.view_as(self.key), self.value.view_as(self.value)
        return self.key, self.value


class Prefix(nn.Module):
    """Keys and values of P virtual tokens for each of `layers`, or what reparameterizes them.

    Args:
        layers: the shape of each layer that gets a prefix, in the model's order.
        config: what to train. `num_virtual_tokens` may be None if `initial` is given.
        initial: the initial values, one `(key [Hkv, P, D], value [Hkv, P, Dv])` a layer; copied, in fp32. None:
            `config.init` must be "random" or "zero".

    Attributes:
        shapes: `layers` as a tuple.
        config: what is trained, its `num_virtual_tokens` set.
        num_virtual_tokens: P.
        num_frozen_tokens: how many of them, from the first, never change.
        fixed: the names of what is not trained: parameters in it have no gradient.

    Raises:
        ValueError: no initial values, values that do not fit, or a reparameterization larger than the prefix.

    Examples:
        >>> from prefixcore.nn import LayerShape, Prefix, PrefixTuningConfig
        >>> config = PrefixTuningConfig(num_virtual_tokens=20, init="random")
        >>> prefix = Prefix([LayerShape(2, 16, 16)] * 4, config)
        >>> pairs = prefix()  # one a layer
        >>> len(pairs), pairs[0][0].shape
        (4, torch.Size([2, 20, 16]))
    """

    fixed = ("frozen", "initial")

    def __init__(
        self, layers: Sequence[LayerShape], config: PrefixTuningConfig, initial: KeyValues | None = None
    ) -> None:
        super().__init__()
        if len(layers) == 0:
            raise ValueError("layers is empty: a prefix needs at least one layer")
        self.shapes = tuple(layers)
        self.num_frozen_tokens = config.num_frozen_tokens
        if initial is not None:
            initial = tensor_init(initial, self.shapes, config.num_virtual_tokens)
            self.num_virtual_tokens = initial[0][0].shape[1]
        elif config.num_virtual_tokens is not None and config.init in ("random", "zero"):
            self.num_virtual_tokens = config.num_virtual_tokens
        else:
            raise ValueError(
                f"init={config.init_name!r} needs a model to start from: give `initial`, one "
                "(key [Hkv, P, D], value [Hkv, P, Dv]) a layer, or take init='random' or 'zero'"
            )
        self.config = config.resolved(self.num_virtual_tokens)
        frozen = self.num_frozen_tokens
        num_trained = self.num_virtual_tokens - frozen
        if num_trained < 0 or (num_trained == 0 and config.reparameterization != "none"):
            raise ValueError(
                f"num_frozen_tokens is {frozen} of {self.num_virtual_tokens} virtual tokens: "
                "none would be left to train"
            )
        self.layers: nn.ModuleList | None = None
        self.frozen: nn.ModuleList | None = None
        self.initial: nn.ModuleList | None = None
        self.reparameterization: nn.Module | None = None
        # An MLP without initial values makes the whole prefix, as in PEFT; all else is added to initial values.
        from_nothing = config.reparameterization == "mlp" and initial is None
        with seeded(config.seed):
            if initial is None and not (from_nothing and frozen == 0):
                make = random_init if config.init == "random" else zero_init
                initial = make(self.shapes, self.num_virtual_tokens)
            if initial is not None and frozen:
                self.frozen = _stack([(k[:, :frozen], v[:, :frozen]) for k, v in initial], trainable=False)
                initial = [(k[:, frozen:], v[:, frozen:]) for k, v in initial]
            if config.reparameterization == "none":
                assert initial is not None
                self.layers = _stack(initial, trainable=True)
                return
            self.reparameterization = self._reparameterize(config, num_trained, from_nothing)
            if initial is not None and not from_nothing:
                self.initial = _stack(initial, trainable=False)

    def _reparameterize(self, config: PrefixTuningConfig, num_tokens: int, from_nothing: bool) -> nn.Module:
        """What is trained in place of `num_tokens` virtual tokens; `from_nothing`: it is added to no initial values."""
        widths = [shape.width for shape in self.shapes]
        if config.reparameterization == "low_rank":
            return LowRank(num_tokens, widths, config.rank)
        if config.reparameterization == "random_basis":
            return RandomBasis(num_tokens, sum(widths), config.num_basis, config.seed or 0)
        token_dim = max(shape.key_width for shape in self.shapes)
        hidden = config.encoder_hidden_size or token_dim
        begin_at_zero = not from_nothing or config.init == "zero"
        return Mlp(num_tokens, token_dim, hidden, sum(widths), begin_at_zero=begin_at_zero)

    @property
    def is_reparameterized(self) -> bool:
        """Whether something else than the prefix itself is trained."""
        return self.reparameterization is not None

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """One contiguous `(key [Hkv, P, D], value [Hkv, P, Dv])` a layer, differentiable, in the parameters' dtype."""
        if self.reparameterization is None:
            pairs = _pairs(self.layers)
        else:
            pairs = _split_contiguous(without_autocast(self.reparameterization), self.shapes)
            if self.initial is not None:
                pairs = [(k + dk, v + dv) for (k, v), (dk, dv) in zip(_pairs(self.initial), pairs, strict=True)]
        if self.frozen is not None:
            frozen = _pairs(self.frozen)
            pairs = [
                (torch.cat((fk, k), 1), torch.cat((fv, v), 1)) for (fk, fv), (k, v) in zip(frozen, pairs, strict=True)
            ]
        return [(key.contiguous(), value.contiguous()) for key, value in pairs]

    @torch.no_grad()
    def bake(self) -> list[tuple[Tensor, Tensor]]:
        """The final prefix, as `forward` returns it, detached and in memory of its own."""
        return [(key.clone(), value.clone()) for key, value in self()]

    @torch.no_grad()
    def bake_some(self, start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
        """What `bake` returns of the virtual tokens from `start` to before `stop`, in the memory of as many."""
        if self.reparameterization is None:
            return [(key[:, start:stop].clone(), value[:, start:stop].clone()) for key, value in self()]
        trained = [max(0, place - self.num_frozen_tokens) for place in (start, stop)]
        pairs = split_layers(without_autocast(self.reparameterization, *trained), self.shapes)
        some = slice(*trained)
        if self.initial is not None:
            initial = _pairs(self.initial)
            pairs = [(k[:, some] + dk, v[:, some] + dv) for (k, v), (dk, dv) in zip(initial, pairs, strict=True)]
        if self.frozen is not None:
            frozen = [(key[:, start:stop], value[:, start:stop]) for key, value in _pairs(self.frozen)]
            pairs = [
                (torch.cat((fk, k), 1), torch.cat((fv, v), 1)) for (fk, fv), (k, v) in zip(frozen, pairs, strict=True)
            ]
        return pairs


def _split_contiguous(flat: Tensor, shapes: Sequence[LayerShape]) -> list[tuple[Tensor, Tensor]]:
    """What `split_layers` returns, contiguous where all layers have one shape with D = Dv: by a single copy."""
    shape, tokens = shapes[0], flat.shape[0]
    if len(set(shapes)) > 1 or shape.key_dim != shape.value_dim:
        return split_layers(flat, shapes)
    layers = flat.view(tokens, 2 * len(shapes), shape.num_kv_heads, shape.key_dim).permute(1, 2, 0, 3).contiguous()
    both = layers.unbind()  # its gradient is one stack; that of indexing would be a whole tensor for each layer
    return list(zip(both[::2], both[1::2], strict=True))


def _stack(pairs: KeyValues, *, trainable: bool) -> nn.ModuleList:
    return nn.ModuleList(KeyValue(key, value, trainable=trainable) for key, value in pairs)


def _pairs(stack: nn.ModuleList | None) -> list[tuple[Tensor, Tensor]]:
    assert stack is not None
    return [layer() for layer in stack]
