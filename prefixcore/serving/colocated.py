"""A `PrefixLLM` of this process, asked as a server is: for `ServedRollouts`, where training and vLLM share a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..adapters import AdapterError
from .client import ServingError

if TYPE_CHECKING:
    from .offline import PrefixLLM


class Colocated:
    """As much of `client.Client` as rollouts need.

    Args:
        llm: vLLM, with the registry that the adapter is put into.
    """

    url = "vLLM in this process"

    def __init__(self, llm: PrefixLLM) -> None:
        self._llm = llm

    def model_cards(self) -> list[dict[str, Any]]:
        """The adapters that can be served."""
        return [{"id": served.name, "digest": served.digest} for served in self._llm.catalog.served()]

    def ask(self, method: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request for completions, as a server words it.

        Raises:
            ServingError: vLLM refuses it, or cannot serve the adapter.
        """
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import StructuredOutputsParams

        fields = {name: value for name, value in body.items() if name not in ("model", "prompt", "return_token_ids")}
        if "structured_outputs" in fields:
            fields["structured_outputs"] = StructuredOutputsParams(**fields["structured_outputs"])
        prompt = body["prompt"]
        given = prompt if isinstance(prompt, str) else [{"prompt_token_ids": ids} for ids in prompt]
        try:
            params = SamplingParams(**fields)
            outputs = self._llm.generate(given, params, adapter=body["model"], use_tqdm=False)
        except (AdapterError, VLLMValidationError, ValueError, TypeError) as error:
            missing = not self._llm.catalog.holds(body["model"])
            raise ServingError(f"{self.url}: {error}", 404 if missing else 400) from error
        choices = [_choice(completion) for output in outputs for completion in output.outputs]
        return {"choices": [{"index": index, **choice} for index, choice in enumerate(choices)]}


def _choice(completion: Any) -> dict[str, Any]:
    """One answer: its token ids, and the log-probability of each."""
    ids = list(completion.token_ids)
    found = [of[token].logprob for token, of in zip(ids, completion.logprobs or (), strict=False)]
    return {"token_ids": ids, "logprobs": {"token_logprobs": [None if value != value else value for value in found]}}
