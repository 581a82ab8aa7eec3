"""A soft prompt attached to a model: virtual tokens put into every input, and taken out of every output."""

from __future__ import annotations

import uuid
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ..nn import SoftPrompt
from ..ops import soft_embedding, which_backend
from .attachment import Attachment, refuse_other_attention, refuse_replicas, refuse_weights, warn_of_dropout
from .attention import ATTENTION
from .cache import cache_in, cache_of
from .discover import check_reached
from .layout import Layout
from .packing import leave_mask_to_lengths
from .positions import argument_names, by_name, check_limit, past_length, query_length

_LAYOUT = "_prefixcore_layout"
"""The attribute of the embeddings of an input that got its prompt."""

_PROMPT = "_prefixcore_prompt"
"""The attribute of a cache that says which soft prompt it starts with."""

_PER_TOKEN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "token_type_ids"}


class SoftPromptAttachment(Attachment):
    """What connects a `SoftPrompt` to a model.

    The prompt enters with the first tokens of a sequence, as embeddings. With a cache it stays there, so that later
    calls only have their mask and positions moved. Loss and labels are those of the longer sequence, whose labels at
    virtual tokens are -100, as in PEFT: the first text token is predicted from the last virtual one.

    In a packed batch the prompt stands once, before all sequences. What becomes of a virtual token does not depend on
    the text after it, so each sequence sees the prompt that it would see in a row of its own.

    Args:
        model: the model as the user knows it.
        module: the soft prompt.
        decoder: the text decoder inside that holds the attention layers, if packed batches can be given to it; or why
            they cannot, in words.
    """

    def __init__(self, model: PreTrainedModel, module: SoftPrompt, decoder: PreTrainedModel | str) -> None:
        super().__init__(model, module)
        self.decoder = decoder
        self.names = argument_names(model)
        self.key = uuid.uuid4().hex  # what its caches are known by
        backbone = model.base_model
        self.backbone_names = argument_names(backbone)
        try:
            self.patch.freeze()
            self.patch.add_module(module, self)
            if backbone is not model:
                self.patch.before(backbone, self.before_backbone)
            self.patch.before(model, self.before_forward)
            self.patch.after(model, self.after_forward)
        except BaseException:
            self.patch.undo()
            raise

    @property
    def can_pack(self) -> bool:
        """Whether attention, which is the model's own until a packed batch comes, can be ours and gains by it."""
        if isinstance(self.decoder, str):
            return False
        try:
            choice = which_backend("prefix_attention", self.decoder.device, self.decoder.dtype)
        except (ValueError, RuntimeError):  # a backend is forced that has no attention, or nothing is compiled
            return False
        return choice.name != "reference" or choice.why == "forced"

    def before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The hook before each forward of the model."""
        if not self.enabled:
            return args, kwargs
        refuse_replicas(model)
        kwargs = by_name(self.names, args, kwargs)
        _check_arguments(kwargs)
        if self.patch.attention and not isinstance(self.decoder, str):
            refuse_weights(self.decoder, kwargs)
        past = past_length(kwargs)
        if kwargs.get("cu_seq_lens_q") is not None:
            self._start_packed(kwargs, int(past))
        elif past == 0:
            self._start(kwargs)
        else:
            self._go_on(kwargs, int(past))
        return (), kwargs

    def before_backbone(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook before each forward of the decoder inside: was the prompt put in?"""
        if not self.enabled:
            return
        kwargs = by_name(self.backbone_names, args, kwargs)
        if past_length(kwargs) == 0 and not hasattr(kwargs.get("inputs_embeds"), _LAYOUT):
            raise RuntimeError(
                f"{type(backbone).__name__} was called without the soft prompt, which is put in when the model that it "
                f"is attached to ({type(self.model).__name__}) is called as model(...), not model.forward(...)"
            )

    def after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The hook after each forward of the model: outputs get the length that the caller knows."""
        layout = getattr(kwargs.get("inputs_embeds"), _LAYOUT, None)
        if layout is None:
            return output
        cache = cache_in(output)
        if isinstance(cache, Cache) and kwargs.get("cu_seq_lens_q") is None:
            setattr(cache, _PROMPT, self.key)
        return _cut(output, layout)

    def _start(self, kwargs: dict[str, Any]) -> None:
        """Puts the prompt into the arguments of a call that starts a sequence, in place."""
        (rows, length), virtual = _tokens(kwargs).shape[:2], self.num_virtual_tokens
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        cache = cache_of(kwargs)
        if mask is not None and mask.shape[1] < length:
            raise ValueError(f"attention_mask: expected a padding mask of all {length} tokens, got {list(mask.shape)}")
        layout = Layout.of(mask, rows, length, virtual)
        if cache is not None and layout.lead is not None and bool((layout.lead == length).any()):
            raise ValueError(
                "a row of the first call with a cache is all padding, so there is no place yet for its soft prompt: "
                "raise prefill_chunk_size above the longest padding, or leave it out"
            )
        if positions is not None and mask is None and bool((positions.diff(dim=-1) < 0).any()):
            raise NotImplementedError(
                "position_ids restart within a row (a packed batch), but there is no cu_seq_lens_q that says where: a "
                "soft prompt needs it (PackedCollator gives it); or pad the sequences into rows of their own"
            )

        if mask is not None:
            kwargs["attention_mask"] = layout.fill(mask, 1)
        if positions is not None:
            positions = positions.expand(rows, -1)
            prompt = layout.first(positions) + torch.arange(virtual, device=positions.device)
            kwargs["position_ids"] = layout.insert(positions + virtual, prompt)
        elif layout.lead is not None and "position_ids" in self.names:
            kwargs["position_ids"] = (kwargs["attention_mask"].long().cumsum(1) - 1).clamp(min=0)
        if self.limit is not None and virtual + length > self.limit:
            given = kwargs.get("position_ids")
            check_limit(virtual + length if given is None else int(given.max()) + 1, virtual, self.limit)
        if kwargs.get("labels") is not None:
            kwargs["labels"] = layout.fill(kwargs["labels"], -100)
        self._put_in(kwargs, layout)
        if isinstance(cache, Cache):
            setattr(cache, _PROMPT, self.key)

    def _start_packed(self, kwargs: dict[str, Any], past: int) -> None:
        """Puts the prompt before all sequences of a packed batch, in place."""
        rows, length = _tokens(kwargs).shape[:2]
        if rows != 1 or past:
            got = f"{rows} rows" if rows != 1 else f"a cache of {past} tokens"
            raise ValueError(f"expected one row and an empty cache in a packed batch (cu_seq_lens_q), got {got}")
        decoder = self._packing_decoder(kwargs, length)
        virtual = self.num_virtual_tokens
        layout = Layout(1, length, virtual)
        leave_mask_to_lengths(kwargs, virtual)
        positions = kwargs["position_ids"] + virtual
        kwargs["position_ids"] = layout.insert(positions, torch.arange(virtual, device=positions.device)[None])
        if self.limit is not None and virtual + length > self.limit:
            check_limit(int(positions.max()) + 1, virtual, self.limit)
        keep = kwargs.get("logits_to_keep")
        if isinstance(keep, Tensor):  # the labels are those of the places kept
            keep = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
            kwargs["logits_to_keep"] = torch.where(keep < 0, keep, keep + virtual)  # from the end, or the beginning
        elif kwargs.get("labels") is not None:
            kwargs["labels"] = layout.fill(kwargs["labels"], -100)
        self._switch_attention(decoder)
        self._put_in(kwargs, layout)

    def _packing_decoder(self, kwargs: dict[str, Any], length: int) -> PreTrainedModel:
        """The decoder for a packed batch; NotImplementedError if one prompt for all sequences would not be right."""
        if isinstance(self.decoder, str):
            raise NotImplementedError(
                f"{type(self.model).__name__} cannot be given packed batches (cu_seq_lens_q) with a soft prompt: "
                f"{self.decoder}; pad the sequences into rows of their own"
            )
        refuse_weights(self.decoder, kwargs)
        if kwargs.get("output_router_logits") or getattr(self.decoder.config, "output_router_logits", False):
            raise NotImplementedError(
                "output_router_logits: a packed batch has its soft prompt once, so the router's loss would not be that "
                "of padded rows; leave it out, or pad the sequences into rows of their own"
            )
        if (types := kwargs.get("token_type_ids")) is not None:
            first = types[0, kwargs["cu_seq_lens_q"][:-1].long().clamp(max=length - 1)]
            if bool((first != first[0]).any()):
                raise NotImplementedError(
                    "token_type_ids: packed sequences begin with different types, but have one soft prompt, of one "
                    "type; pad them into rows of their own"
                )
        return self.decoder

    def _switch_attention(self, decoder: PreTrainedModel) -> None:
        """From the first packed batch on attention is ours, which alone can take one: with a prompt that is shared, and
        without a mask of all tokens by all tokens."""
        if self.patch.attention:
            return refuse_other_attention(decoder)
        if any(parameter.requires_grad for parameter in self.module.parameters()):
            warn_of_dropout(self.model)
        self.patch.set_attention(decoder, ATTENTION)
        check_reached(decoder, [])

    def _put_in(self, kwargs: dict[str, Any], layout: Layout) -> None:
        """Gives the call embeddings with the prompt in place of its input, and what has to go with them."""
        if isinstance(kwargs.get("logits_to_keep"), int) and kwargs["logits_to_keep"] > layout.length:
            kwargs["logits_to_keep"] = 0
        if (types := kwargs.get("token_type_ids")) is not None:
            kwargs["token_type_ids"] = layout.insert(types, layout.first(types).expand(-1, layout.virtual))
        kwargs["inputs_embeds"] = self._embed(layout, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        kwargs["input_ids"] = None
        setattr(kwargs["inputs_embeds"], _LAYOUT, layout)

    def _embed(self, layout: Layout, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        """Embeddings [B, P + T, E] of an input with its prompt."""
        virtual = self.module()
        embed: Any = self.model.get_input_embeddings()
        if ids is not None and ids.numel():
            size = embed.weight.shape[0]
            low, high = torch.aminmax(ids)
            if int(low) < 0 or int(high) >= size:
                raise IndexError(f"input_ids must be from 0 to {size - 1}, got {int(low)} to {int(high)}")
            if _is_plain_table(embed):
                names = torch.arange(size, size + layout.virtual, device=ids.device, dtype=ids.dtype)
                placed = layout.insert(ids, names.expand(layout.rows, -1))
                weight = embed.weight
                return soft_embedding(placed, weight, virtual.to(weight.device))
        if embeds is None:
            embeds = embed(ids)
        virtual = virtual.to(device=embeds.device, dtype=embeds.dtype)
        return layout.insert(embeds, virtual.expand(layout.rows, -1, -1))

    def _go_on(self, kwargs: dict[str, Any], past: int) -> None:
        """Moves the mask and the positions of a call whose cache starts with the prompt, in place."""
        virtual, cache = self.num_virtual_tokens, cache_of(kwargs)
        if getattr(cache, _PROMPT, None) != self.key:
            raise ValueError(
                f"the cache holds {past} tokens but does not start with this soft prompt: start it with the prompt "
                "attached, or detach"
            )
        seen = past + query_length(kwargs)
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        told = None
        if mask is not None:
            told = mask.shape[1]
            # A row's prompt stands after its padding, which the mask of the whole sequence shows.
            kwargs["attention_mask"] = Layout.of(mask, mask.shape[0], told, virtual).fill(mask, 1)
        elif positions is not None and self._may_look(positions, cache, query_length(kwargs)):
            told = int(positions.max()) + 1
        if told is not None and told + virtual != seen:
            raise ValueError(
                f"the mask or the positions speak of {told} tokens, but cache and input hold {seen - virtual} besides "
                f"the {virtual} virtual ones; generate cannot go on from a cache that holds a soft prompt (it cuts the "
                "input by the length of the cache): pass the whole text without the cache, or attach a prefix"
            )
        if positions is not None:
            kwargs["position_ids"] = positions + virtual
        if self.limit is not None and seen > self.limit:
            given = kwargs.get("position_ids")
            check_limit(seen if given is None else int(given.max()) + 1, virtual, self.limit)

    @staticmethod
    def _may_look(positions: Tensor, cache: Cache, length: int) -> bool:
        """Whether to look at the values of positions, which makes a GPU wait: not in each step of a plain generate."""
        return positions.device.type == "cpu" or length > 1 or getattr(cache, "_is_user_defined", False)


def _tokens(kwargs: dict[str, Any]) -> Tensor:
    """What the input of a call is given as: ids [B, T] or embeddings [B, T, E]."""
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    return cast(Tensor, embeds if ids is None else ids)


def _is_plain_table(embed: nn.Module) -> bool:
    """Whether the embedding is a look-up and nothing else: no scaling, no hooks, no other forward."""
    return (
        type(embed).forward is nn.Embedding.forward
        and "forward" not in embed.__dict__
        and not embed._forward_hooks
        and not embed._forward_pre_hooks
        and embed.max_norm is None
        and not embed.weight.requires_grad
    )


def _check_arguments(kwargs: dict[str, Any]) -> None:
    """Raises for arguments that a soft prompt cannot be put into."""
    cache, mask, positions = cache_of(kwargs), kwargs.get("attention_mask"), kwargs.get("position_ids")
    if cache is not None and cache.is_compileable:
        raise NotImplementedError(
            "a static cache has no room for the virtual tokens of a soft prompt: generate with a dynamic cache "
            "(leave cache_implementation out), or attach a prefix, which needs no room"
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise NotImplementedError(
            "a soft prompt needs attention_mask as a padding mask [B, T]: a mask made for the input alone says nothing "
            "about the virtual tokens"
        )
    if positions is not None and positions.dim() != 2:
        raise NotImplementedError(f"a soft prompt needs position_ids [B, T], got {list(positions.shape)}")
    if isinstance(kwargs.get("logits_to_keep"), Tensor) and kwargs.get("cu_seq_lens_q") is None:
        raise NotImplementedError(
            "a soft prompt needs logits_to_keep as a number of last tokens, got a tensor of places, which is for "
            "packed batches"
        )
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if isinstance(tokens, Tensor) and tokens.dim() < 2:
        raise ValueError(f"the model needs input_ids [B, T] or inputs_embeds [B, T, E], got {list(tokens.shape)}")
    if not isinstance(tokens, Tensor) or tokens.shape[1] < 2:  # one token: its shape tells nothing
        return
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and name not in _PER_TOKEN and value.shape[:2] == tokens.shape[:2]:
            raise NotImplementedError(f"{name} has a value a token, and none is known for virtual tokens")


def _cut(output: Any, layout: Layout) -> Any:
    """`output` with every tensor [B, P + T] or [B, P + T, ...] in it cut to the caller's T.

    Attention weights [B, H, P + T, P + T] keep what they say about the prompt, and a cache what it holds.
    """
    if isinstance(output, Tensor):
        if output.dim() in (2, 3) and output.shape[:2] == (layout.rows, layout.virtual + layout.length):
            return layout.cut(output)
        return output
    if isinstance(output, dict):  # transformers' ModelOutput
        for name in list(output):
            output[name] = _cut(output[name], layout)
        return output
    if isinstance(output, (tuple, list)):
        return type(output)(_cut(item, layout) for item in output)
    return output
