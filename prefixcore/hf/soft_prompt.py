"""A soft prompt attached to a model: virtual tokens put into every input, and taken out of every output."""

from __future__ import annotations

import uuid
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ..nn import SoftPrompt
from ..ops import soft_embedding, which_backend
from .attachment import Attachment, refuse_attention_weights, refuse_other_attention, refuse_replicas, warn_of_dropout
from .attention import ATTENTION
from .cache import cache_argument, cache_output
from .discover import check_reached
from .families import has_windows
from .layout import Layout
from .packing import set_empty_mask
from .positions import argument_names, as_keywords, check_limit, past_length, query_length

_LAYOUT = "_prefixcore_layout"
"""The attribute, a `Layout`, of input embeddings that hold the prompt."""

_PROMPT = "_prefixcore_prompt"
"""The attribute of a cache that names the soft prompt that it starts with."""

_TOKEN_ARGUMENTS = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "token_type_ids"}
"""Arguments with a value a token for which the value at virtual tokens is known."""


class SoftPromptAttachment(Attachment):
    """What connects a `SoftPrompt` to a model.

    The first call of a sequence gets the prompt, as embeddings before the text. A cache keeps it, so that later calls
    only have their mask and positions moved. The loss is that of the longer sequence, whose labels at virtual tokens
    are -100, as in PEFT: the first text token is predicted from the last virtual one.

    In a packed batch the prompt stands once, before all sequences. The model is causal, so virtual tokens do not depend
    on the text after them, and each sequence sees the prompt that it would see in a batch row of its own.

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
        self.prompt_id = uuid.uuid4().hex
        backbone = model.base_model
        self.backbone_names = argument_names(backbone)
        try:
            self.patch.freeze()
            self.patch.add_module(module, self)
            if backbone is not model:
                self.patch.hook_before(backbone, self.before_backbone)
            self.patch.hook_before(model, self.before_forward)
            self.patch.hook_after(model, self.after_forward)
        except BaseException:
            self.patch.undo()
            raise

    @property
    def can_pack(self) -> bool:
        """Whether packed batches can be given, and attention has a kernel for them.

        The model keeps its own attention until the first packed batch, so its dtype and device may still change.
        """
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
        if self.is_disabled:
            return args, self.disabled_arguments(self.decoder, kwargs) if self.model.base_model is model else kwargs
        refuse_replicas(model)
        kwargs = as_keywords(self.names, args, kwargs)
        _check_arguments(kwargs)
        if self.patch.attention and not isinstance(self.decoder, str):
            refuse_attention_weights(self.decoder, kwargs)
        past = past_length(kwargs)
        if kwargs.get("cu_seq_lens_q") is not None:
            self._start_packed(kwargs, int(past))
        elif past == 0:
            self._start_sequence(kwargs)
        else:
            self._continue_sequence(kwargs, int(past))
        return (), kwargs

    def before_backbone(
        self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The hook before each forward of the decoder inside: RuntimeError if the prompt was not put in."""
        if self.is_disabled:
            return args, self.disabled_arguments(self.decoder, kwargs)
        kwargs = as_keywords(self.backbone_names, args, kwargs)
        if past_length(kwargs) == 0 and not hasattr(kwargs.get("inputs_embeds"), _LAYOUT):
            raise RuntimeError(
                f"{type(backbone).__name__} was called without the soft prompt, which is put in when the model that it "
                f"is attached to ({type(self.model).__name__}) is called as model(...), not model.forward(...)"
            )
        return None

    def after_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The hook after each forward of the model: virtual tokens are taken out of the outputs."""
        layout = getattr(kwargs.get("inputs_embeds"), _LAYOUT, None)
        if layout is None:
            return output
        cache = cache_output(output)
        if isinstance(cache, Cache) and kwargs.get("cu_seq_lens_q") is None:
            setattr(cache, _PROMPT, self.prompt_id)
        return _without_prompt(output, layout)

    def _start_sequence(self, kwargs: dict[str, Any]) -> None:
        """Puts the prompt into the arguments of a call that starts a sequence, in place."""
        (batch_size, length), virtual = _tokens(kwargs).shape[:2], self.num_virtual_tokens
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        cache = cache_argument(kwargs)
        if mask is not None and mask.shape[1] < length:
            raise ValueError(f"attention_mask: expected a padding mask of all {length} tokens, got {list(mask.shape)}")
        layout = Layout.from_mask(mask, batch_size, length, virtual)
        padding = layout.left_padding
        if cache is not None and padding is not None and bool((padding == length).any()):
            raise ValueError(
                "a row of the first call with a cache is all padding, so there is no text yet that its soft prompt "
                "could precede: raise prefill_chunk_size above the longest padding, or leave it out"
            )
        if positions is not None and mask is None and bool((positions.diff(dim=-1) < 0).any()):
            raise NotImplementedError(
                "position_ids restart within a row (a packed batch), but there is no cu_seq_lens_q that says where: a "
                "soft prompt needs it (PackedCollator gives it); or pad the sequences into rows of their own"
            )

        if mask is not None:
            kwargs["attention_mask"] = layout.insert_value(mask, 1)
        if positions is not None:
            positions = positions.expand(batch_size, -1)
            prompt = layout.first_of_text(positions) + torch.arange(virtual, device=positions.device)
            kwargs["position_ids"] = layout.insert(positions + virtual, prompt)
        elif padding is not None and "position_ids" in self.names:
            kwargs["position_ids"] = (kwargs["attention_mask"].long().cumsum(1) - 1).clamp(min=0)
        if self.limit is not None and virtual + length > self.limit:
            given = kwargs.get("position_ids")
            check_limit(virtual + length if given is None else int(given.max()) + 1, virtual, self.limit)
        if kwargs.get("labels") is not None:
            kwargs["labels"] = layout.insert_value(kwargs["labels"], -100)
        self._insert_prompt(kwargs, layout)
        if isinstance(cache, Cache):
            setattr(cache, _PROMPT, self.prompt_id)

    def _start_packed(self, kwargs: dict[str, Any], past: int) -> None:
        """Puts the prompt before all sequences of a packed batch, in place."""
        batch_size, length = _tokens(kwargs).shape[:2]
        if batch_size != 1 or past:
            got = f"{batch_size} rows" if batch_size != 1 else f"a cache of {past} tokens"
            raise ValueError(f"expected one row and an empty cache in a packed batch (cu_seq_lens_q), got {got}")
        decoder = self._packing_decoder(kwargs, length)
        virtual = self.num_virtual_tokens
        layout = Layout(1, length, virtual)
        set_empty_mask(kwargs, virtual)
        cu_seqlens = kwargs["cu_seq_lens_q"]
        if has_windows(decoder) and len(cu_seqlens) > 1:  # read once here, and not in each layer: it makes a GPU wait
            kwargs["max_length_q"] = int(cu_seqlens.diff().max())
        positions = kwargs["position_ids"] + virtual
        kwargs["position_ids"] = layout.insert(positions, torch.arange(virtual, device=positions.device)[None])
        if self.limit is not None and virtual + length > self.limit:
            check_limit(int(positions.max()) + 1, virtual, self.limit)
        keep = kwargs.get("logits_to_keep")
        if isinstance(keep, Tensor):  # labels are those of the logits kept, none of which is at a virtual token
            keep = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
            kwargs["logits_to_keep"] = torch.where(keep < 0, keep, keep + virtual)  # negative ones count from the end
        elif kwargs.get("labels") is not None:
            kwargs["labels"] = layout.insert_value(kwargs["labels"], -100)
        self._switch_attention(decoder)
        self._insert_prompt(kwargs, layout)

    def _packing_decoder(self, kwargs: dict[str, Any], length: int) -> PreTrainedModel:
        """The decoder for a packed batch; NotImplementedError if one prompt for all sequences would not be right."""
        if isinstance(self.decoder, str):
            raise NotImplementedError(
                f"{type(self.model).__name__} cannot be given packed batches (cu_seq_lens_q) with a soft prompt: "
                f"{self.decoder}; pad the sequences into rows of their own"
            )
        refuse_attention_weights(self.decoder, kwargs)
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
        """Switches to our attention with the first packed batch, for good.

        Ours alone takes one: with a prompt that all sequences share, and without a mask [T, T].
        """
        if self.patch.attention:
            return refuse_other_attention(decoder)
        if any(parameter.requires_grad for parameter in self.module.parameters()):
            warn_of_dropout(self.model)
        self.patch.set_attention(decoder, ATTENTION)
        check_reached(decoder, [])

    def _insert_prompt(self, kwargs: dict[str, Any], layout: Layout) -> None:
        """Gives the call embeddings with the prompt in place of its input, and what has to go with them."""
        if isinstance(kwargs.get("logits_to_keep"), int) and kwargs["logits_to_keep"] > layout.length:
            kwargs["logits_to_keep"] = 0
        if (types := kwargs.get("token_type_ids")) is not None:
            kwargs["token_type_ids"] = layout.insert(
                types, layout.first_of_text(types).expand(-1, layout.num_virtual_tokens)
            )
        kwargs["inputs_embeds"] = self._embed(layout, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        kwargs["input_ids"] = None
        setattr(kwargs["inputs_embeds"], _LAYOUT, layout)

    def _embed(self, layout: Layout, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        """Embeddings [B, P + T, E] of an input with its prompt."""
        virtual = self.module()
        embed: Any = self.model.get_input_embeddings()
        if ids is not None and ids.numel():
            size = embed.weight.shape[0]
            low, high = torch.stack(torch.aminmax(ids)).tolist()  # together: each read makes a GPU wait
            if low < 0 or high >= size:
                raise IndexError(f"input_ids must be from 0 to {size - 1}, got {low} to {high}")
            if _is_plain_table(embed):
                # Ids from V upwards are virtual tokens to the op.
                virtual_ids = torch.arange(size, size + layout.num_virtual_tokens, device=ids.device, dtype=ids.dtype)
                ids = layout.insert(ids, virtual_ids.expand(layout.batch_size, -1))
                return soft_embedding(ids, embed.weight, virtual.to(embed.weight.device))
        if embeds is None:
            embeds = embed(ids)
        virtual = virtual.to(device=embeds.device, dtype=embeds.dtype)
        return layout.insert(embeds, virtual.expand(layout.batch_size, -1, -1))

    def _continue_sequence(self, kwargs: dict[str, Any], past: int) -> None:
        """Moves the mask and the positions of a call whose cache starts with the prompt, in place."""
        virtual, cache = self.num_virtual_tokens, cache_argument(kwargs)
        if getattr(cache, _PROMPT, None) != self.prompt_id:
            raise ValueError(
                f"the cache holds {past} tokens but does not start with this soft prompt: start it with the prompt "
                "attached, or detach"
            )
        seen = past + query_length(kwargs)
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        expected = None
        if mask is not None:
            expected = mask.shape[1]
            # The mask is of the whole sequence, so it shows the padding that the prompt stands after.
            kwargs["attention_mask"] = Layout.from_mask(mask, mask.shape[0], expected, virtual).insert_value(mask, 1)
        elif positions is not None and self._may_read(positions, cache, query_length(kwargs)):
            expected = int(positions.max()) + 1
        if expected is not None and expected + virtual != seen:
            raise ValueError(
                f"the mask or the positions speak of {expected} tokens, but cache and input hold {seen - virtual} "
                f"besides the {virtual} virtual ones; generate cannot go on from a cache that holds a soft prompt (it "
                "cuts the input by the length of the cache): pass the whole text without the cache, or attach a prefix"
            )
        if positions is not None:
            kwargs["position_ids"] = positions + virtual
        if self.limit is not None and seen > self.limit:
            given = kwargs.get("position_ids")
            check_limit(seen if given is None else int(given.max()) + 1, virtual, self.limit)

    @staticmethod
    def _may_read(positions: Tensor, cache: Cache, length: int) -> bool:
        """Whether to read the values of positions, which makes a GPU wait: not in each step of a plain generate."""
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
    cache, mask, positions = cache_argument(kwargs), kwargs.get("attention_mask"), kwargs.get("position_ids")
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
            "a soft prompt needs logits_to_keep as a number of last tokens, got a tensor of token indices, which is "
            "for packed batches"
        )
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if isinstance(tokens, Tensor) and tokens.dim() < 2:
        raise ValueError(f"the model needs input_ids [B, T] or inputs_embeds [B, T, E], got {list(tokens.shape)}")
    if not isinstance(tokens, Tensor) or tokens.shape[1] < 2:  # [B, 1] is also the shape of what is not per token
        return
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and name not in _TOKEN_ARGUMENTS and value.shape[:2] == tokens.shape[:2]:
            raise NotImplementedError(f"{name} has a value a token, and none is known for virtual tokens")


def _without_prompt(output: Any, layout: Layout) -> Any:
    """`output` with the virtual tokens taken out of every tensor [B, P + T] or [B, P + T, ...] in it.

    Attention weights [B, H, P + T, P + T] keep what they say about the prompt, and a cache what it holds.
    """
    if isinstance(output, Tensor):
        length = layout.num_virtual_tokens + layout.length
        if output.dim() in (2, 3) and output.shape[:2] == (layout.batch_size, length):
            return layout.remove(output)
        return output
    if isinstance(output, dict):  # transformers' ModelOutput
        for name in list(output):
            output[name] = _without_prompt(output[name], layout)
        return output
    if isinstance(output, (tuple, list)):
        return type(output)(_without_prompt(each, layout) for each in output)
    return output
