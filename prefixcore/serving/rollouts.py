"""`ServedRollouts`: answers that TRL's trainers learn from, written by a server that has the virtual tokens."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ..adapters.registry_entry import is_entry_name
from ..hf.baking.publishing import Publisher
from ..hf.callback import find_handle
from .client import Client, ServingError, choices_of
from .colocated import Colocated
from .rollout_settings import check_settings, corrects, samples_plainly, sampling

if TYPE_CHECKING:
    from .offline import PrefixLLM

__all__ = ["ServedRollouts"]

_COMPLETIONS = "/v1/completions"


class ServedRollouts:
    """Has `prefixcore serve` write the answers for TRL's `GRPOTrainer`, `RLOOTrainer` or `DistillationTrainer`.

    It takes the place of TRL's own use of vLLM, and has its interface. TRL sends every weight of the model to vLLM
    after each step; here the model is frozen, and what goes to the server is the adapter: a folder in the registry that
    it serves, which the next request sees. A soft prompt goes as the prefix that the frozen model computes of it.

    The server may run on another GPU or machine, as long as it sees the folder that the first process writes:

        prefixcore serve --model MODEL --adapters adapters -- --logprobs-mode processed_logprobs

    Where vLLM is to run in the training's own process, as with TRL's `vllm_mode="colocate"`, a `PrefixLLM` takes its
    place: `PrefixLLM(MODEL, "adapters", gpu_memory_utilization=0.3, logprobs_mode="processed_logprobs")`.

    TRL's importance sampling correction (`vllm_importance_sampling_correction`) works as with TRL's own vLLM.

    Args:
        trainer: made with `use_vllm` left off; something is attached to its model.
        server: its address, or a `PrefixLLM`.
        adapters: the folder that it serves, as this process sees it.
        name: the adapter's in that folder, replaced at each step; one of its own for each training.
        api_key: where the server wants one; None: the environment's `OPENAI_API_KEY`, if there is one.
        timeout: seconds without a byte from the server.

    Attributes:
        handle: what is attached to the trainer's model.
        name: the adapter's.

    Raises:
        TypeError: not a trainer whose answers vLLM may write.
        ValueError: nothing is attached to its model, it has a vLLM already, the name is another model's or adapter's,
            or `generation_kwargs` that a server does not know.
        NotImplementedError: a soft prompt to which no prefix is equal; more is trained than what is attached, or the
            model has an adapter of PEFT's.
        ServingError: the server does not answer.

    Examples:
        >>> def train(trainer):  # a GRPOTrainer
        ...     prefixcore.ServedRollouts(trainer, "http://127.0.0.1:8000", "adapters")
        ...     trainer.train()
    """

    def __init__(
        self,
        trainer: Any,
        server: str | PrefixLLM,
        adapters: str | Path,
        *,
        name: str = "rollouts",
        api_key: str | None = None,
        timeout: float = 1800.0,
    ) -> None:
        check_settings(trainer)
        if not is_entry_name(name):
            raise ValueError(f"name: expected that of a folder, got {name!r}")
        self._trainer, self.name = trainer, name
        self.handle = find_handle(trainer.model)
        self._publisher = Publisher(self.handle, Path(adapters) / name)
        self._client: Client | Colocated
        if isinstance(server, str):
            self._client = Client(server, api_key=api_key, timeout=timeout)
        else:
            self._client = Colocated(server)
        if any(card.get("id") == name and "digest" not in card for card in self._client.model_cards()):
            raise ValueError(f"name: {name!r} is a model of the server's own; give another")
        self._digest = ""
        self._is_checked = False
        trainer.use_vllm, trainer.vllm_mode, trainer.vllm_generation = True, "server", self
        self._forget()
        trainer.add_callback(_Forgetting(self._forget))

    def _forget(self) -> None:
        """Has TRL ask for `sync_weights` before the next answers, whatever step they are of."""
        self._trainer._last_loaded_step = -1

    def sync_weights(self) -> None:
        """Puts the virtual tokens as they are now into the server's folder, and waits until the server has them."""
        accelerator = self._trainer.accelerator
        digest = self._publisher.write(is_writer=accelerator.is_main_process)
        if digest is not None:
            self._wait_for(digest)
        self._digest = _from_main_process(accelerator, digest)
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
            images: None; the server is asked by token ids, among which there are none.
            num_generations: how often TRL repeats a prompt, over all processes.
            profiler: a block that is timed.

        Returns:
            Of each answer the prompt's ids, its own, the log-probability of each of these, and the id that it is of.
        """
        if images is not None and any(images):
            raise NotImplementedError(
                "images cannot be handed to a server that is asked by token ids: leave ServedRollouts out"
            )
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
        body = {**sampling(self._trainer), "model": self.name, "prompt": prompts, "n": times}
        if body.get("seed") is not None:  # else processes that share a prompt would get the same answers
            body["seed"] += self._trainer.accelerator.process_index << 20
        choices = choices_of(self._client.ask("POST", _COMPLETIONS, body))
        if not self._is_served(self._digest):  # nobody but this training puts it there, so it was all the time
            raise ServingError(
                f"{self._client.url}: {self.name!r} was replaced or removed while it answered: does another training "
                "have the same name? Give each its own"
            )
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

    def _wait_for(self, digest: str, patience: float = 60.0) -> None:
        """Returns once the server lists this very adapter: it may see a shared folder a little later."""
        end = time.monotonic() + patience
        folder = self._publisher.folder
        while not self._is_served(digest):
            try:
                self._client.ask("POST", _COMPLETIONS, {"model": self.name, "prompt": "a", "max_tokens": 1})
            except ServingError as error:
                if error.status != 404:  # why it cannot be served
                    raise
            if time.monotonic() > end:
                raise ServingError(
                    f"{self._client.url} does not see {folder} as it was written: is {folder.parent} the "
                    "folder that it serves (prefixcore serve --adapters)?"
                )
            time.sleep(0.2)

    def _is_served(self, digest: str) -> bool:
        return any(card.get("id") == self.name and card.get("digest") == digest for card in self._client.model_cards())

    def _check_logprobs(self) -> None:
        """Warns where TRL's correction would compare with log-probabilities of another distribution.

        With one token allowed, and log-probabilities of what was sampled from, that token's is 0.
        """
        trainer = self._trainer
        if not corrects(trainer) or samples_plainly(trainer) or not trainer.accelerator.is_main_process:
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


class _Forgetting(TrainerCallback):
    """Between what it stands for the values may change and the step may not: resuming, the best ones at the end."""

    def __init__(self, forget: Callable[[], None]) -> None:
        self._forget = forget

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._forget()

    on_train_end = on_evaluate = on_train_begin


def _from_main_process(accelerator: Any, value: Any) -> Any:
    """The value that the main process has; the others wait for it."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]
