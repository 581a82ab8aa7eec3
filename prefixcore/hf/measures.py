"""What is worth watching of virtual tokens while they are trained: norms, gradients, and the attention on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapters.weights import is_sharded
from ..adapters.whole import whole_module
from ..nn import Prefix
from .attention.mass import watch_mass
from .batch.tasks import TASK_IDS
from .handle import Handle
from .model.sharded import reshard
from .model.signature import argument_names

_ANSWERS = ("labels", "start_positions", "end_positions", "next_sentence_label")
"""What a loss is computed from, which is not wanted here."""

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def measure(handle: Handle, batches: Mapping[str, Any] | Iterable[Mapping[str, Any]] = ()) -> dict[str, float]:
    """How the virtual tokens fare, as numbers by their names: for the tracker of any training loop.

    Called between the backward and the optimizer's step it has the gradients, too. What `PromptCallback` tells the
    trackers of transformers' Trainer and of TRL's, Lightning's `self.log_dict(...)`, `accelerator.log(..., step=step)`
    or a tracker of one's own gets by this:

    - `prefix_norm/layer_<n>`: of the layer's keys and values;
    - `prefix_grad_norm/layer_<n>`: of their gradient, where there is one; one `prefix_grad_norm` for a
      reparameterization;
    - `prefix_attention/layer_<n>`: the share of attention on the prefix, in `batches`; not of models with attention of
      their own (Bloom, Falcon and others with `handle.backend().name == "concatenated"`);
    - `prompt_norm`, `prompt_grad_norm`: of a soft prompt.

    Args:
        handle: what is attached.
        batches: arguments of the model, of one call or of several; the model runs them in evaluation mode, without
            gradients and beside the training. None given: the attention is not measured.

    Returns:
        The numbers. Where FSDP2 has the virtual tokens in parts, every process has to call, and all get the same.

    Raises:
        TypeError: something else than a handle, such as the model.

    Examples:
        >>> handle = prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=4))
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
        >>> model(**batch).loss.backward()
        >>> sorted(prefixcore.measure(handle, batch))[::2]
        ['prefix_attention/layer_0', 'prefix_grad_norm/layer_0', 'prefix_norm/layer_0']
    """
    if not isinstance(handle, Handle):
        raise TypeError(f"expected the handle that attach or load gave, got a {type(handle).__name__}")
    some = [batches] if isinstance(batches, Mapping) else batches
    return {**norms(handle), **attention_on_prefix(handle, (dict(batch) for batch in some))}


@torch.no_grad()
def norms(handle: Handle) -> dict[str, float]:
    """Norms of the virtual tokens, and of the gradients that their parameters have now.

    Of a prefix, `prefix_norm/layer_<n>` for each of its layers, over keys and values together, and
    `prefix_grad_norm/layer_<n>` where the layer's own values are trained. With a reparameterization, whose parameters
    belong to no layer, `prefix_grad_norm` is one number. Of a soft prompt `prompt_norm`, over the embeddings that the
    model reads (of all tasks together), and `prompt_grad_norm`, over what is trained.
    """
    module: Any = handle.module
    whole = whole_module(module)
    found: dict[str, Tensor] = {}
    if isinstance(module, Prefix):
        layers = handle._adapter.layers or range(len(module.shapes))
        names = layer_names(layers)
        for name, pair in zip(names, whole(), strict=True):
            found[f"prefix_norm/{name}"] = _norm(pair)
        if module.layers is not None:
            for name, layer in zip(names, module.layers, strict=True):
                _add_gradient(found, f"prefix_grad_norm/{name}", layer.parameters())
        else:
            _add_gradient(found, "prefix_grad_norm", module.parameters())
    else:
        found["prompt_norm"] = _norm([whole.bake()])  # not of the parameters, which may be factors, or added to others
        _add_gradient(found, "prompt_grad_norm", module.parameters())
    if not found:
        return {}
    values = torch.stack([value.cpu() if value.device.type != "cpu" else value for value in found.values()])
    return dict(zip(found, values.tolist(), strict=True))


def attention_on_prefix(handle: Handle, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The share of attention that falls on the prefix: `prefix_attention/layer_<n>`, between 0 and 1.

    The mean over heads and over the tokens of the batches, padding aside; empty where the virtual tokens are no prefix,
    or the model's own attention reads them (`handle.backend()` is "concatenated") and tells nothing of its weights.

    Args:
        handle: whose model is run, in evaluation mode and without gradients.
        batches: arguments of the model; of each what it is given to read is taken, and labels are left out
            where they are not read, too.
    """
    if not isinstance(handle.module, Prefix) or not handle.is_attached:
        return {}
    model: Any = handle.model
    bank = handle._bank
    known = {*argument_names(model), *_PACKED}
    # The decoder of an encoder-decoder reads the labels where it is given nothing else.
    left_out = {TASK_IDS, *(_ANSWERS if bank.encoder is None else ())}
    encoder = set() if bank.encoder is None else set(bank.encoder.modules())
    sums: dict[int, Tensor] = {}
    tokens: dict[int, Tensor] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                inputs = {n: x for n, x in batch.items() if x is not None and n in known and n not in left_out}
                inputs = {n: x.to(model.device) if isinstance(x, Tensor) else x for n, x in inputs.items()}
                with watch_mass() as masses:
                    model(**inputs, **({"use_cache": False} if "use_cache" in known else {}))
                for layer, mass in masses.items():  # [B, T]
                    in_decoder = bank.encoder is not None and bank.layers[layer] not in encoder
                    keep = _is_token(inputs, mass, in_decoder)
                    sums[layer] = sums.get(layer, 0) + (mass * keep).sum()
                    tokens[layer] = tokens.get(layer, 0) + keep.sum()
    finally:
        model.train(was_training)
        reshard(model)
    layers = sorted(sums)
    return {
        f"prefix_attention/{name}": float(sums[layer]) / float(tokens[layer])
        for name, layer in zip(layer_names(layers), layers, strict=True)
    }


def layer_names(layers: Sequence[int]) -> list[str]:
    """`layer_07`: numbers of one width, so that trackers sort them as they stand in the model."""
    width = len(str(max(layers, default=0)))
    return [f"layer_{layer:0{width}d}" for layer in layers]


def _is_token(inputs: dict[str, Any], mass: Tensor, in_decoder: bool) -> Tensor:
    """1 where a layer, of an encoder-decoder's decoder or of any other model, has a token, and 0 at padding: [B, T]."""
    mask = inputs.get("decoder_attention_mask" if in_decoder else "attention_mask")
    if mask is None and in_decoder and isinstance(inputs.get("labels"), Tensor):
        mask = inputs["labels"] != -100
    if isinstance(mask, Tensor) and mask.shape == mass.shape:
        return mask.to(mass.device, torch.float32)
    return torch.ones_like(mass)


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.detach().float().norm() for tensor in tensors]).norm()


def _add_gradient(found: dict[str, Tensor], name: str, parameters: Iterable[Any]) -> None:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    gradients = [grad.full_tensor() if is_sharded(grad) else grad for grad in gradients]
    if gradients:
        found[name] = _norm(gradients)
