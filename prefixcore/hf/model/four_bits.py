"""bitsandbytes' 4-bit layers on a CPU, kept in the form that gradients pass through.

With bfloat16 products, a forward in evaluation mode lays their weights out anew for a kernel that has no backward.
From then on no gradient passes them, in training mode either, and nothing says so.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ...adapters.weights import laid_out_as_loaded

SWITCH = "support_avx512bf16_for_cpu"
"""The attribute of a layer by which it lays its weights out anew."""


def layers_with_switch(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of `model` that would lay their weights out anew, or have."""
    return (module for module in model.modules() if getattr(module, SWITCH, False))


def lay_out_as_loaded(layer: nn.Module) -> None:
    """Puts the weight of a layer back into the form that it was loaded in, if it was laid out anew.

    The scales stay rounded to 16 bits, as that has made them.
    """
    weight = layer._parameters.get("weight")
    if weight is not None and getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        packed, state = laid_out_as_loaded(weight)
        weight.data, weight.quant_state = packed, state  # type: ignore[attr-defined]
