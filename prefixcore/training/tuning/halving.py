"""Successive halving (Jamieson and Talwalkar, arXiv:1502.07943): all train a little, and the better half goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ...hf import PromptBank
from ..averaging import Average
from ..causal import TO_LEARN, check_causal
from ..data import TokenizedExample, batches, pad_id
from ..options import PROMPT_LOSS_WEIGHT, TrainingOptions
from ..stopping import stop_on_signal
from .at_once import AtOnce
from .candidates import Candidate
from .result import Rung, Trial, Tuning
from .together import Together, groups

LAST_EVALUATIONS = 4
"""Held-out losses of the last rung, which trains longest, so that the best values are kept."""


def tune(
    bank: PromptBank,
    tokenizer: Any,
    candidates: Sequence[Candidate],
    examples: Sequence[TokenizedExample],
    held_out: Sequence[TokenizedExample],
    *,
    seconds: float,
    most_steps: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    prompt_loss_weight: float = PROMPT_LOSS_WEIGHT,
    packed: bool | None = None,
    show_progress: bool | None = None,
    on_rung: Callable[[Rung, Trial], None] | None = None,
) -> Tuning:
    """Finds the best of some candidates in a stated time, by successive halving.

    Jamieson and Talwalkar, arXiv:1502.07943. Each round has as much of the time, and half as many candidates as the one
    before: the one that is left trained for twice as long in each. All of them see the same examples in the same order.
    How many share a batch is found from the time that steps take.

    Args:
        bank: on a model, with nothing attached; afterwards it holds the best candidate, its values those of its least
            held-out loss.
        tokenizer: the model's.
        candidates: at least one.
        examples: what to learn.
        held_out: the validation split, which chooses. What it says of the chosen one flatters.
        seconds: for all of it. A step and a held-out loss that have begun are ended.
        most_steps: that any candidate is trained for; None: as many as there is time for.
        batch_size: examples a step.
        seed: of their order.
        prompt_loss_weight: as of `TrainingOptions`.
        packed: batches without padding; None: where all candidates can.
        show_progress: a progress bar on standard error; None: only on a terminal.
        on_rung: called after each round with it and with the best trial of it.

    Returns:
        What was found, the best first. Its best adapter is `bank[tuning.best.name]`.

    Raises:
        ValueError: no candidates, no examples, no held-out ones, or no time.
        NotImplementedError: an encoder, an encoder-decoder, or a model without a language model's head.

    Examples:
        >>> from prefixcore.training import Example, tokenize
        >>> from prefixcore.training.tuning import grid, tune
        >>> examples = tokenize(tokenizer, [Example("Peru ->", " Lima"), Example("Norway ->", " Oslo")])
        >>> candidates = grid(prefixcore.PrefixTuningConfig(num_virtual_tokens=4), [2, 4], [1e-3, 1e-2])
        >>> with prefixcore.PromptBank(model) as bank:
        ...     tuning = tune(bank, tokenizer, candidates, examples[:1], examples[1:], seconds=60, most_steps=7)
        ...     bank.names == [tuning.best.name], [rung.candidates for rung in tuning.rungs]
        (True, [4, 2, 1])
    """
    for what, given in (("candidates", candidates), ("examples", examples), ("held_out", held_out)):
        if not given:
            raise ValueError(f"{what}: expected at least one, got none")
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds must be a finite number above 0, got {seconds}")
    if most_steps is not None and most_steps < 1:
        raise ValueError(f"most_steps must be at least 1 or None, got {most_steps}")
    check_causal(bank.model, TO_LEARN)
    if len(bank):
        raise ValueError(f"the bank must hold nothing, and it has {', '.join(bank.names)}; remove them")
    TrainingOptions(batch_size=batch_size, seed=seed, prompt_loss_weight=prompt_loss_weight)  # raises what is wrong
    return _Run(bank, tokenizer, candidates, examples, held_out, batch_size, seed, prompt_loss_weight, packed).run(
        seconds, most_steps, show_progress, on_rung
    )


class _Run:
    """The state of a tuning."""

    def __init__(
        self,
        bank: PromptBank,
        tokenizer: Any,
        candidates: Sequence[Candidate],
        examples: Sequence[TokenizedExample],
        held_out: Sequence[TokenizedExample],
        batch_size: int,
        seed: int,
        prompt_loss_weight: float,
        packed: bool | None,
    ) -> None:
        self.began = time.perf_counter()
        self.bank, self.held_out = bank, held_out
        self.source = batches(examples, batch_size, seed)
        self.trials = [Trial(candidate, f"candidate-{i}") for i, candidate in enumerate(candidates)]
        for trial in self.trials:
            bank.attach(trial.name, trial.candidate.config, tokenizer=tokenizer)
        if packed is None:
            packed = all(bank[trial.name].can_pack for trial in self.trials)
        self.together = Together(
            bank.model,
            pad_id(tokenizer, bank.model),
            packed=packed,
            prompt_loss_weight=prompt_loss_weight,
            seed=seed,
        )
        parameters = [
            {"params": list(bank[trial.name].parameters()), "lr": trial.candidate.learning_rate}
            for trial in self.trials
        ]
        self.optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)
        self.averages = {trial.name: Average(list(bank[trial.name].parameters())) for trial in self.trials}
        tokens = min(batch_size, len(examples)) * sum(example.length for example in examples) // len(examples)
        self.at_once = AtOnce(len(self.trials), tokens)
        self.values: dict[str, list[Tensor]] = {}
        self.steps = 0
        self.evaluation_seconds = 0.0

    def run(
        self,
        seconds: float,
        most_steps: int | None,
        show_progress: bool | None,
        on_rung: Callable[[Rung, Trial], None] | None,
    ) -> Tuning:
        from tqdm.auto import tqdm

        deadline = self.began + seconds
        alive, rungs, interrupted = list(self.trials), [], False
        sizes = list(_sizes(len(alive)))
        was_training = self.bank.model.training
        self.bank.model.train()
        disable = None if show_progress is None else not show_progress
        try:
            with (
                stop_on_signal() as stopping,
                tqdm(total=round(seconds), desc="tuning", unit="s", disable=disable) as self.bar,
            ):
                self._evaluate(alive)
                for number, size in enumerate(sizes, start=1):
                    alive = self._keep(alive, size)
                    for trial in alive:
                        trial.rung = number
                    began = time.perf_counter()
                    until = began + (deadline - began) / (len(sizes) - number + 1)
                    most = (
                        None if most_steps is None else max(1, most_steps * 2 ** (number - 1) // (2 ** len(sizes) - 1))
                    )
                    before = self.steps
                    interrupted = self._train(
                        alive, until, most, LAST_EVALUATIONS if number == len(sizes) else 1, stopping
                    )
                    best = min(alive, key=lambda trial: trial.last_loss)
                    rung = Rung(size, self.steps - before, self.at_once(size), time.perf_counter() - began)
                    rungs.append(rung)
                    if on_rung is not None:
                        on_rung(rung, best)
                    interrupted |= stopping() and number < len(sizes)
                    if interrupted:
                        break
        finally:
            self.bank.model.train(was_training)
        trials = sorted(self.trials, key=lambda trial: (-trial.rung, trial.best[1]))
        self._leave(trials[0])
        taken = time.perf_counter() - self.began
        return Tuning(trials, rungs, taken, self.at_once.table(), interrupted)

    def _train(
        self, alive: list[Trial], until: float, most: int | None, evaluations: int, stopping: Callable[[], bool]
    ) -> bool:
        """Trains until the time is up, or for `most` steps; a held-out loss at the end, and others evenly before it.

        Returns:
            Whether it was stopped before.
        """
        first, began = self.steps, time.perf_counter()
        done = 0
        while not (stopped := stopping()):
            here = self.steps - first
            now = time.perf_counter()
            step_seconds = len(alive) * self.at_once.per_candidate(self.at_once(len(alive)))
            step_seconds = step_seconds if math.isfinite(step_seconds) else 0.0
            if here and (here == most or now + step_seconds + self.evaluation_seconds * len(alive) > until):
                break
            share = max((now - began) / max(until - began, 1e-9), here / most if most else 0.0)
            if here and done + 1 < evaluations and share >= (done + 1) / evaluations:
                self._evaluate(alive)
                done += 1
            self._step(alive)
        self._evaluate(alive)
        return stopped

    def _step(self, alive: list[Trial]) -> None:
        """One optimizer step of each candidate, on the same examples."""
        examples = next(self.source)
        at_once = self.at_once(len(alive))
        began = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        found: list[float] = []
        for losses, answers in self.together.losses(groups([trial.name for trial in alive], at_once), examples):
            losses.sum().backward()
            found += answers.detach().tolist()
        self.optimizer.step()
        for trial in alive:
            self.averages[trial.name].update()
        self.at_once.note(at_once, len(alive), time.perf_counter() - began)
        self.steps += 1
        for trial, loss in zip(alive, found, strict=True):
            trial.train_loss.append((self.steps, loss))
        self._show()

    def _evaluate(self, alive: list[Trial]) -> None:
        """Held-out losses now, of the averages over the steps, and these where they are the best so far."""
        began = time.perf_counter()
        with ExitStack() as stack:
            for trial in alive:
                stack.enter_context(self.averages[trial.name].in_place())
            found = self.together.held_out(
                [trial.name for trial in alive], self.held_out, at_once=self.at_once(len(alive)) if self.steps else 1
            )
            for trial, loss in zip(alive, found, strict=True):
                if trial.steps == self.steps and trial.held_out_loss:
                    continue  # measured already: no step has been made since
                trial.held_out_loss.append((self.steps, loss))
                if trial.best[0] == self.steps:
                    parameters = self.bank[trial.name].parameters()
                    self.values[trial.name] = [parameter.detach().clone() for parameter in parameters]
        self.evaluation_seconds = (time.perf_counter() - began) / len(alive)
        self._show()

    def _keep(self, alive: list[Trial], size: int) -> list[Trial]:
        """The best `size` of them; the others leave the bank and the optimizer."""
        ranked = sorted(alive, key=lambda trial: trial.last_loss)
        for trial in ranked[size:]:
            gone = {id(parameter) for parameter in self.bank[trial.name].parameters()}
            groups_left = [g for g in self.optimizer.param_groups if id(g["params"][0]) not in gone]
            for parameter in self.bank[trial.name].parameters():
                self.optimizer.state.pop(parameter, None)
            self.optimizer.param_groups[:] = groups_left
            self.bank.remove(trial.name)
            self.values.pop(trial.name, None)
            del self.averages[trial.name]
        return ranked[:size]

    def _leave(self, best: Trial) -> None:
        """Leaves the best candidate alone in the bank, with its best values."""
        with torch.no_grad():
            for parameter, value in zip(self.bank[best.name].parameters(), self.values[best.name], strict=True):
                parameter.copy_(value)
        for name in self.bank.names:
            if name != best.name:
                self.bank.remove(name)

    def _show(self) -> None:
        self.bar.set_postfix(steps=self.steps, refresh=False)
        self.bar.update(max(0, round(time.perf_counter() - self.began) - self.bar.n))


def _sizes(candidates: int) -> Iterator[int]:
    """How many take part in each round."""
    while candidates > 1:
        yield candidates
        candidates = -(-candidates // 2)
    yield 1
