"""A prefix that PEFT owns, attached to the base model and seen while the PeftModel is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...adapters.peft import pair_in_seq2seq
from ...nn import LayerShape, split_layers
from ..attention.disabled import is_disabled
from ..attention.prefix import KeyValue
from ..attention.recording import AttentionCall
from ..bank.attached import Attached
from ..bank.bank import Bank
from ..model.active import is_active
from .checkpointing import checkpoint_without_reentrance
from .encoder import flat_prefix
from .methods import active_config, is_seq2seq, method


class PeftPrefix(nn.Module):
    """The prefix of the active adapter, layer by layer.

    It has no parameters of its own: the base model's stay as they are, and PEFT, which freezes all that it finds in the
    base model when an adapter is added, does not freeze those of the other adapters.

    Args:
        peft_model: the model with the prompt encoders.
        shapes: the shape of each attention layer.
    """

    def __init__(self, peft_model: Any, shapes: Sequence[LayerShape]) -> None:
        super().__init__()
        self.__dict__["_peft_model"] = peft_model  # not a submodule: it is the parent
        self.shapes = tuple(shapes)

    @property
    def peft_model(self) -> Any:
        """The model with the prompt encoders."""
        return self.__dict__["_peft_model"]

    @property
    def num_virtual_tokens(self) -> int:
        """P of the active adapter."""
        return active_config(self.peft_model).num_virtual_tokens

    def forward(self) -> list[KeyValue]:
        """One (key [Hkv, P, D], value [Hkv, P, D]) a layer: views of what the prompt encoder yields."""
        flat = flat_prefix(self.peft_model, self.peft_model.active_adapter)
        if not is_seq2seq(self.peft_model):
            return split_layers(flat, self.shapes)
        num_pairs = active_config(self.peft_model).num_layers  # as many as the encoder has layers, if nothing was said
        _check_number(self.peft_model, str(self.peft_model.active_adapter), len(self.shapes))
        pairs = split_layers(flat, [self.shapes[0]] * num_pairs)
        return [pairs[pair_in_seq2seq(layer, num_pairs)] for layer in range(len(self.shapes))]


class PeftAttached(Attached):
    """The prefix of the active adapter. What trains, and what a cache was filled behind, is the active adapter's."""

    module: PeftPrefix

    @property
    def uid(self) -> str:
        """What tells the active adapter from all others."""
        return f"{self._uid} {self._peft_model.active_adapter}"

    @property
    def virtual_token_ids(self) -> None:
        """None: a prefix stands in no text."""

    @property
    def shift(self) -> int:
        """P: PEFT knows no other convention."""
        return self.num_virtual_tokens

    @property
    def trains(self) -> bool:
        """Whether something of the active adapter gets a gradient in a forward that records them."""
        encoder = self._peft_model.prompt_encoder[self._peft_model.active_adapter]
        return any(parameter.requires_grad for parameter in encoder.parameters())

    def values(self) -> dict[str, Tensor]:
        """The parameters of the active adapter's prompt encoder."""
        found: dict[str, Tensor] = self._peft_model.prompt_encoder[self._peft_model.active_adapter].state_dict()
        return found

    @property
    def _peft_model(self) -> Any:
        return self.module.peft_model


class PeftBank(Bank):
    """Lets the layers of the base model see the active adapter's prefix, while the PeftModel is what is called.

    Args:
        model: the base model.
        decoder: the decoder inside it that holds the attention layers.
        module: the prefix.
        calls: the attention layers.
    """

    def __init__(
        self, model: PreTrainedModel, decoder: PreTrainedModel, module: PeftPrefix, calls: Sequence[AttentionCall]
    ) -> None:
        super().__init__(model)
        self.set_decoder(decoder, calls)
        self.adapter = self.add(PeftAttached(module, prefix_layers(calls)))

    def freeze(self) -> None:
        """Nothing: PEFT says what is trained. Heads in modules_to_save are, and switching adapters changes it."""

    def register(self, adapter: Attached) -> None:
        """Nothing: the parameters are PEFT's."""

    def undo(self) -> None:
        """Puts the base model back to what it was."""
        self.remove(self.adapter)

    @property
    def is_disabled(self) -> bool:
        """Whether the running thread computes as if nothing were attached: outside of the PeftModel's calls it does."""
        # Not super().is_disabled: compiled code takes a property of super() for true.
        return not is_active(self) or is_disabled(self.patch)

    def call_model(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the base model."""
        if not self.is_disabled:
            checkpoint_without_reentrance(self.checkpointable)
        return super().call_model(forward, args, kwargs)

    def _call_bare(
        self, module: PreTrainedModel, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with self.disabled():  # masks too are those of the attention that the model had
            return super()._call_bare(module, forward, args, kwargs)


def prefix_layers(calls: Sequence[AttentionCall]) -> list[int]:
    """Which attention layers PEFT's cache reaches: all, of an encoder-decoder the decoder's self-attention."""
    return [i for i, call in enumerate(calls) if call.place in (None, "decoder")]


def prefix_shapes(peft_model: Any, calls: Sequence[AttentionCall]) -> list[LayerShape]:
    """The shape of each layer that PEFT's cache reaches.

    Raises:
        NotImplementedError: the layers are not those that PEFT's prefix has been made for.
    """
    name = type(peft_model.base_model).__name__
    reached = [calls[i] for i in prefix_layers(calls)]
    if any(call.kwargs.get("position_bias") is not None for call in reached):
        raise NotImplementedError(
            f"{name} adds a learned bias of positions to its scores. PEFT's {method(peft_model)} stands at positions, "
            "and prefix attention has no bias for a prefix: the PeftModel works as it is; or take a soft prompt"
        )
    shapes = [call.shape for call in reached]
    for adapter, config in peft_model.peft_config.items():
        made = (config.num_layers, config.num_attention_heads, config.token_dim // config.num_attention_heads)
        if any(shape != LayerShape(made[1], made[2], made[2]) for shape in shapes):
            raise NotImplementedError(
                f"adapter {adapter!r} is a prefix for {made[0]} layers of {made[1]} heads of dimension {made[2]}, but "
                f"{name} has the attention layers {sorted(set(map(str, shapes)))}, {len(shapes)} in all"
            )
        _check_number(peft_model, adapter, len(shapes))
    return shapes


def _check_number(peft_model: Any, adapter: str, num_layers: int) -> None:
    """Raises NotImplementedError if an adapter is a prefix for fewer layers than there are.

    Or for more: but on an encoder-decoder, where those behind the last layer are not read.
    """
    made = peft_model.peft_config[adapter].num_layers
    if made < num_layers or (made > num_layers and not is_seq2seq(peft_model)):
        raise NotImplementedError(
            f"adapter {adapter!r} is a prefix for {made} layers, but {type(peft_model.base_model).__name__} has "
            f"{num_layers} that PEFT's prefix reaches: make one with num_layers={num_layers}"
        )
