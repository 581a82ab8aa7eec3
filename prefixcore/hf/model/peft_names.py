"""What stands here in the place of the names that a PeftModel has, for whoever looks for them on a handle."""

from __future__ import annotations

_BANK = "several adapters are a prefixcore.PromptBank: bank.attach, bank.load, task_ids="
_MODEL = "the model itself is called, trained and moved: handle.model"
_DISABLED = "with handle.disabled():"
_NO_WEIGHTS = "virtual tokens are no weights, and cannot be merged into them; they stay attached, or handle.detach()"

INSTEAD = {
    "print_trainable_parameters": "print(handle), or handle.num_trainable",
    "get_nb_trainable_parameters": "handle.num_trainable",
    "save_pretrained": "handle.save(folder)",
    "from_pretrained": "prefixcore.load(model, folder), or its name on the Hub",
    "get_prompt": "handle.bake()",
    "peft_config": "handle.config",
    "active_peft_config": "handle.config",
    "base_model": "handle.model",
    "get_base_model": "handle.model",
    "state_dict": "handle.module.state_dict()",
    "disable_adapter": _DISABLED,
    "disable_adapters": _DISABLED,
    "unload": "handle.detach()",
    "delete_adapter": "handle.detach(), or bank.remove of a prefixcore.PromptBank",
    "merge_adapter": _NO_WEIGHTS,
    "merge_and_unload": _NO_WEIGHTS,
    **dict.fromkeys(("add_adapter", "load_adapter", "set_adapter", "active_adapter", "active_adapters"), _BANK),
    **dict.fromkeys(("forward", "generate", "train", "eval", "to", "cuda", "cpu", "device", "dtype"), _MODEL),
}
"""A name of PEFT's -> what to write."""


def missing(name: str) -> AttributeError:
    """The error for a name that a handle does not have."""
    hint = f"; {INSTEAD[name]}" if name in INSTEAD else ""
    return AttributeError(f"'Handle' object has no attribute {name!r}{hint}")
