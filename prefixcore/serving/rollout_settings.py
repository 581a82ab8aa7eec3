"""The settings of a trainer of TRL's, as fields of a request."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

_READ = ("max_completion_length", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_OURS = ("model", "prompt", "n", "stream", "return_token_ids")
_SAID = ("max_tokens", "logprobs", "return_token_ids")
_PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def check_settings(trainer: Any) -> None:
    """Raises TypeError or ValueError unless a server can write the trainer's answers as its arguments say."""
    if not hasattr(trainer, "use_vllm") or not all(hasattr(trainer, name) for name in _READ):
        raise TypeError(
            "expected a trainer of TRL's whose answers vLLM may write, such as GRPOTrainer, got "
            f"{type(trainer).__name__}"
        )
    if trainer.use_vllm:
        raise ValueError("the trainer has a vLLM of its own: leave use_vllm off, and ServedRollouts sets it")
    given = trainer.args.generation_kwargs or {}
    unknown = [name for name in given if name in _OURS or (hasattr(GenerationConfig(), name) and name not in _PLAIN)]
    if unknown:
        raise ValueError(
            f"generation_kwargs: {', '.join(unknown)} would not be heeded; what is sent are the sampling parameters of "
            "vLLM (stop for stop_strings, top_k=1 for do_sample=False, max_tokens for max_new_tokens)"
        )
    mode = getattr(trainer, "vllm_importance_sampling_mode", None)
    if getattr(trainer, "loss_type", None) == "vespo" and corrects(trainer) and not str(mode).startswith("token_"):
        raise ValueError(  # as TRL says of use_vllm, when the trainer is made
            f"loss_type 'vespo' wants vllm_importance_sampling_mode 'token_truncate' or 'token_mask', got {mode!r}"
        )


def corrects(trainer: Any) -> bool:
    """Whether the trainer weighs answers by how likely the server found them."""
    return bool(getattr(trainer, "vllm_importance_sampling_correction", False))


def sampling(trainer: Any) -> dict[str, Any]:
    """The fields of a request that say how an answer is sampled; all said, for the server has defaults of its own."""
    regex = getattr(trainer.args, "vllm_structured_outputs_regex", None)
    given = {name: getattr(trainer, name) for name in _PLAIN}
    return {
        "max_tokens": trainer.max_completion_length,
        **{name: _PLAIN[name] if value is None else value for name, value in given.items()},
        "logprobs": 0,
        "return_token_ids": True,
        **({"structured_outputs": {"regex": regex}} if regex is not None else {}),
        **(trainer.args.generation_kwargs or {}),
    }


def samples_plainly(trainer: Any) -> bool:
    """Whether an answer is sampled from the model's own distribution."""
    fields = {name: value for name, value in sampling(trainer).items() if name not in _SAID}
    return {**fields, "top_k": max(fields["top_k"] or 0, 0)} == _PLAIN
