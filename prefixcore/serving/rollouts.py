"""`ServedRollouts`: answers that TRL's trainers learn from, written by a server that has the virtual tokens."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

from ..hf.baking.publishing import Publisher
from ..hf.callback import find_handle
from .client import Client, ServingError, choices_of

__all__ = ["ServedRollouts"]

_COMPLETIONS = "/v1/completions"


class ServedRollouts:
    """Has `prefixcore serve` write the answers for TRL's `GRPOTrainer` or `RLOOTrainer`.

    It takes the place of TRL's own use of vLLM, and has its interface. TRL sends every weight of the model to vLLM
    after each step; here the model is frozen, and what goes to the server is the adapter: a folder in the registry that
    it serves, which the next request sees. A soft prompt goes as the prefix that the frozen model computes of it.

    The server may run on another GPU or machine, as long as both see the folder:

        prefixcore serve --model MODEL --adapters adapters -- --logprobs-mode processed_logprobs

    TRL's importance sampling correction (`vllm_importance_sampling_correction`) works as with TRL's own vLLM.

    Args:
        trainer: made with `use_vllm` left off; something is attached to its model.
        url: the server's address.
        adapters: the folder that the server serves, as this process sees it.
        name: the adapter's in that folder; what has this name there is replaced.
        timeout: seconds without a byte from the server.

    Attributes:
        handle: what is attached to the trainer's model.
        name: the adapter's.

    Raises:
        TypeError: not a trainer whose answers vLLM may write.
        ValueError: nothing is attached to its model, or it has a vLLM already.
        NotImplementedError: a soft prompt to which no prefix is equal.
        ServingError: the server does not answer.

    Examples:
        trainer = GRPOTrainer(model, rewards, args=arguments, train_dataset=dataset)
        prefixcore.ServedRollouts(trainer, "http://127.0.0.1:8000", "adapters")
        trainer.train()
    """

    def __init__(
        self, trainer: Any, url: str, adapters: str | Path, *, name: str = "rollouts", timeout: float = 1800.0
    ) -> None:
        if not hasattr(trainer, "use_vllm"):
            raise TypeError(
                "expected a trainer of TRL's whose answers vLLM may write, such as GRPOTrainer, got "
                f"{type(trainer).__name__}"
            )
        if trainer.use_vllm:
            raise ValueError("the trainer has a vLLM of its own: leave use_vllm off, and ServedRollouts sets it")
        self._trainer, self.name = trainer, name
        self.handle = find_handle(trainer.model)
        self._publisher, self._folder = Publisher(self.handle), Path(adapters) / name
        self._client = Client(url, timeout=timeout)
        self._client.models()
        self._is_checked = False
        trainer.use_vllm, trainer.vllm_mode = True, "server"
        trainer.vllm_generation, trainer._last_loaded_step = self, -1

    def sync_weights(self) -> None:
        """Puts the virtual tokens as they are now into the server's folder, and waits until the server has them."""
        digest = self._publisher.write(self._folder)
        self._trainer.accelerator.wait_for_everyone()
        self._wait_for(digest)
        if not self._is_checked:
            self._is_checked = True
            self._check_logprobs()

    def generate(
        self,
        prompts: Sequence[list[int]],
        images: Sequence[Any] | None,
        num_generations: int,
        profiler: AbstractContextManager[Any] | None = None,
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float | None]]], list[list[list[int]]]]:
        """An answer to each prompt, sampled as the trainer's arguments say.

        Args:
            prompts: token ids of this process's prompts, each as often as it has answers.
            images: None; a server reads no images with an adapter.
            num_generations: how often TRL repeats a prompt, over all processes.
            profiler: a block that is timed.

        Returns:
            Of each answer the prompt's ids, its own, the log-probability of each of these, and the id that it is of.
        """
        if images is not None and any(images):
            raise NotImplementedError("images cannot be read together with an adapter by a server: leave use_vllm off")
        runs = [(prompt, len(list(same))) for prompt, same in groupby(prompts)]
        answers: dict[int, list[dict[str, Any]]] = {}
        with profiler or nullcontext():
            for times in {times for _, times in runs}:  # most often one; a group may be divided among processes
                asked = [number for number, (_, other) in enumerate(runs) if other == times]
                answers |= zip(asked, self._ask([runs[number][0] for number in asked], times), strict=True)
        choices = [choice for number in range(len(runs)) for choice in answers[number]]
        ids = [choice["token_ids"] for choice in choices]
        logprobs = [choice["logprobs"]["token_logprobs"] for choice in choices]
        return (
            [list(prompt) for prompt in prompts],
            ids,
            [[[value] for value in of] for of in logprobs],
            [[[token] for token in made] for made in ids],
        )

    def _ask(self, prompts: list[list[int]], times: int) -> list[list[dict[str, Any]]]:
        """So many answers to each prompt."""
        body = {**self._sampling(), "prompt": prompts, "n": times}
        if body.get("seed") is not None:  # else processes that share a prompt would get the same answers
            body["seed"] += self._trainer.accelerator.process_index * times
        choices = choices_of(self._client.ask("POST", _COMPLETIONS, body))
        choices.sort(key=lambda choice: choice.get("index", 0))
        if len(choices) != len(prompts) * times:
            raise ServingError(f"{self._client.url}: expected {len(prompts) * times} answers, got {len(choices)}")
        for choice in choices:
            made, of = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
            if not made or not of or len(made) != len(of):
                raise ServingError(
                    f"{self._client.url}: expected the ids of the tokens that were made (token_ids) and as many of "
                    "their log-probabilities, as vLLM 0.32 answers"
                )
        return [choices[start : start + times] for start in range(0, len(choices), times)]

    def _sampling(self) -> dict[str, Any]:
        """The trainer's settings as fields of a request."""
        trainer = self._trainer
        regex = getattr(trainer.args, "vllm_structured_outputs_regex", None)
        return {
            "model": self.name,
            "max_tokens": trainer.max_completion_length,
            "temperature": trainer.temperature,
            "top_p": trainer.top_p,
            "top_k": trainer.top_k or 0,
            "min_p": trainer.min_p or 0.0,
            "repetition_penalty": trainer.repetition_penalty,
            "logprobs": 0,
            "return_token_ids": True,
            **({"structured_outputs": {"regex": regex}} if regex is not None else {}),
            **(trainer.args.generation_kwargs or {}),
        }

    def _wait_for(self, digest: str, patience: float = 60.0) -> None:
        """Returns once the server lists this very adapter: it may see a shared folder a little later."""
        end = time.monotonic() + patience
        while not any(_is(card, self.name, digest) for card in self._client.model_cards()):
            try:
                self._client.ask("POST", _COMPLETIONS, {"model": self.name, "prompt": "a", "max_tokens": 1})
            except ServingError as error:
                if error.status != 404:  # why it cannot be served
                    raise
            if time.monotonic() > end:
                raise ServingError(
                    f"{self._client.url} does not see {self._folder} as it was written: is {self._folder.parent} the "
                    "folder that it serves (prefixcore serve --adapters)?"
                )
            time.sleep(0.2)

    def _check_logprobs(self) -> None:
        """Warns where TRL's correction would compare with log-probabilities of another distribution.

        With one token allowed, and log-probabilities of what was sampled from, that token's is 0.
        """
        trainer = self._trainer
        if not getattr(trainer, "vllm_importance_sampling_correction", False) or self._samples_plainly():
            return
        if not trainer.accelerator.is_main_process:
            return
        one = {"prompt": "a", "max_tokens": 1, "allowed_token_ids": [1], "temperature": 1.0, "logprobs": 0}
        choice = choices_of(self._client.ask("POST", _COMPLETIONS, {"model": self.name, **one}))[0]
        found = (choice.get("logprobs") or {}).get("token_logprobs") or [None]
        if found[0] is None or abs(found[0]) > 1e-3:
            warnings.warn(
                "the server says log-probabilities before temperature and top-k, which biases TRL's importance "
                "sampling correction: start it with prefixcore serve ... -- --logprobs-mode processed_logprobs, or set "
                "vllm_importance_sampling_correction=False",
                stacklevel=2,
            )

    def _samples_plainly(self) -> bool:
        """Whether an answer is sampled from the model's own distribution."""
        plain = {"temperature": (1.0,), "top_p": (1.0, None), "top_k": (0, -1), "min_p": (0.0,)}
        plain["repetition_penalty"] = (1.0,)
        sampling = self._sampling()
        return (
            all(sampling[name] in values for name, values in plain.items()) and not self._trainer.args.generation_kwargs
        )


def _is(card: Mapping[str, Any], name: str, digest: str) -> bool:
    return card.get("id") == name and card.get("digest") == digest
