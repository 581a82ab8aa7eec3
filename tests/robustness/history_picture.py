"""What a model is besides the values of its weights, to compare one with another."""

from __future__ import annotations

from typing import Any


def difference_of(got: Any, expected: Any) -> str:
    if isinstance(got, dict):
        keys = [k for k in {**got, **expected} if got.get(k, "-") != expected.get(k, "-")]
        return "; ".join(f"{k}: {got.get(k, '-')!r:.200}, expected {expected.get(k, '-')!r:.200}" for k in keys[:5])
    return f"{got!r:.300}, expected {expected!r:.300}"


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_state_dict_pre_hooks",
)


def picture(model: Any) -> dict[str, Any]:
    """All that a model is besides its weights' values."""
    modules = dict(model.named_modules(remove_duplicate=False))
    hidden = ("_parameters", "_modules", "_buffers", "config", "generation_config", *_HOOKS)
    return {
        "modules": list(modules),
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": {name: parameter.grad is not None for name, parameter in model.named_parameters()},
        "buffers": {name: tuple(buffer.shape) for name, buffer in model.named_buffers()},
        "training": {name: module.training for name, module in modules.items()},
        "hooks": {
            name: [
                each
                for hook in _HOOKS
                for each in module.__dict__[hook].values()
                if str(getattr(each, "__module__", "")).startswith("prefixcore")
            ]
            for name, module in modules.items()
            if name
        },
        "attributes": {
            f"{name}.{key}": value if isinstance(value, (int, str, float, bool, type(None))) else key
            for name, module in modules.items()
            for key, value in module.__dict__.items()
            if key not in hidden and (key[0] != "_" or "prefixcore" in key) and "gradient_checkpointing" not in key
        },
        "config": model.config.to_dict(),
        "generation config": model.generation_config.to_dict() if model.can_generate() else None,
        "attention": [m.config._attn_implementation for m in modules.values() if hasattr(m, "set_attn_implementation")],
    }
