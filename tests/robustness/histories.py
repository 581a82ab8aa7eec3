"""A model that lives through a random history, and after each step answers as a fresh one does.

A `History` holds one tiny model, on which virtual tokens come and go, and which is called in every way between. What it
answers to a call is compared with a model made for this one call: the same weights, the same virtual tokens attached to
it directly. Nothing that was done before may show.
"""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig, PTuningConfig

from ..hf import models
from .history_calls import (
    ENCODERS,
    MAKERS,
    PAIRS,
    WAYS,
    Refused,
    batch_of,
    generated,
    gradients,
    options_of_a_call,
    outcome,
    same,
    tasks_of_a_call,
)
from .history_picture import difference_of, picture

KINDS: dict[str, Callable[[int], Any]] = {
    "prefix": lambda seed: PrefixTuningConfig(num_virtual_tokens=4, init="random", seed=seed),
    "one layer": lambda seed: PrefixTuningConfig(num_virtual_tokens=3, init="random", seed=seed, layers=[1]),
    "at zero": lambda seed: PrefixTuningConfig(num_virtual_tokens=4, init="random", seed=seed, position_offset=False),
    "low rank": lambda seed: PrefixTuningConfig(num_virtual_tokens=4, reparameterization="mlp", seed=seed),
    "prompt": lambda seed: PromptTuningConfig(num_virtual_tokens=5, init="random", seed=seed),
    "long prompt": lambda seed: PromptTuningConfig(num_virtual_tokens=9, init="vocab", seed=seed),
    "p-tuning": lambda seed: PTuningConfig(num_virtual_tokens=3, seed=seed),
}


class Attachment(NamedTuple):
    """What is attached: the handles by their names, None for one that is no bank's; the bank, if there is one."""

    kinds: dict[str | None, tuple[str, int]]
    handles: dict[str | None, prefixcore.Handle]
    bank: prefixcore.PromptBank | None


class Conversation(NamedTuple):
    """A cache that is gone on from.

    Attributes:
        cache: of the model with the history.
        calls: the ids and masks of its calls so far.
        tasks: its rows' names.
        generation: of the virtual tokens behind which it was begun.
        kind: of the cache.
    """

    cache: Any
    calls: list[tuple[Tensor, Tensor]]
    tasks: list[str | None] | None
    generation: int
    kind: str


class History(RuleBasedStateMachine):
    """See the module."""

    families = tuple(MAKERS)
    ways = ("forward", "forward", "gradients", "generate", "generate")
    answered: ClassVar[Counter[bool]] = Counter()
    """How many calls had an answer, and how many ended in the error that a fresh model raises, too."""

    def __init__(self) -> None:
        super().__init__()
        self.attachment: Attachment | None = None
        self.folder = tempfile.TemporaryDirectory()
        self.saved: list[tuple[Path, str, int]] = []
        self.changes: list[Callable[[Any], None]] = []
        self.training = self.checkpointing = False
        self.talk: Conversation | None = None
        self.generation = 0

    def teardown(self) -> None:
        self.folder.cleanup()

    @initialize(data=st.data())
    def begin(self, data: Any) -> None:
        self.family = data.draw(st.sampled_from(self.families))
        self.model = MAKERS[self.family]()
        seeds, kinds = st.integers(1, 3), st.sampled_from(list(KINDS))
        first = data.draw(st.sampled_from(["one", "one", "bank", "nothing"]))
        if first == "one":
            self.attach(data.draw(kinds), data.draw(seeds))
        elif first == "bank":
            self.bank(data.draw(st.sampled_from([None, 0])))
            for name in ("a", "b"):
                self.add(name, data.draw(kinds), data.draw(seeds))

    # -- fresh models

    def bare(self) -> Any:
        """A new model with the same weights and settings, and nothing attached."""
        model = MAKERS[self.family]()
        for change in self.changes:
            change(model)
        model.train(self.training)
        if self.checkpointing:
            model.gradient_checkpointing_enable()
        return model

    def fresh(self) -> Any:
        """The same with the same virtual tokens."""
        model, attachment = self.bare(), self.attachment
        if attachment is None:
            return model
        bank = None if attachment.bank is None else prefixcore.PromptBank(model)
        for name, (kind, seed) in attachment.kinds.items():
            config = KINDS[kind](seed)
            handle = prefixcore.attach(model, config) if bank is None else bank.attach(name, config)
            mine = attachment.handles[name]
            if mine.num_trainable:
                handle.module.load_state_dict(mine.module.state_dict())
            else:
                handle.detach()
                folder = mine.save(Path(self.folder.name) / "fresh")
                if bank is None:
                    prefixcore.load(model, folder)
                else:
                    bank.load(name, folder)
        model.train(self.training)
        return model

    def tasks(self, numbers: list[int]) -> list[str | None] | None:
        if self.attachment is None or self.attachment.bank is None:
            return None
        names = list(self.attachment.kinds)
        return [names[n] if 0 <= n < len(names) else None for n in numbers]

    # -- what comes and goes

    def nothing_attached(self) -> bool:
        return self.attachment is None

    @precondition(nothing_attached)
    @rule(kind=st.sampled_from(list(KINDS)), seed=st.integers(1, 3))
    def attach(self, kind: str, seed: int) -> None:
        handle = outcome(lambda: prefixcore.attach(self.model, KINDS[kind](seed)))
        if isinstance(handle, Refused):
            return
        self.generation += 1
        self.attachment = Attachment({None: (kind, seed)}, {None: handle}, None)
        self.model.train(self.training)

    @precondition(nothing_attached)
    @rule(memory=st.sampled_from([None, 0]))
    def bank(self, memory: int | None) -> None:
        self.generation += 1
        self.attachment = Attachment({}, {}, prefixcore.PromptBank(self.model, memory=memory))

    @precondition(lambda self: self.attachment is not None and self.attachment.bank is not None)
    @rule(name=st.sampled_from(["a", "b", "c"]), kind=st.sampled_from(list(KINDS)), seed=st.integers(1, 3))
    def add(self, name: str, kind: str, seed: int) -> None:
        attachment = self.attachment
        replace = name in attachment.kinds
        handle = outcome(lambda: attachment.bank.attach(name, KINDS[kind](seed), replace=replace))
        if isinstance(handle, Refused):
            return
        self.generation += 1
        attachment.kinds.pop(name, None)
        attachment.kinds[name], attachment.handles[name] = (kind, seed), handle
        self.model.train(self.training)

    @precondition(lambda self: self.attachment is not None and self.attachment.bank is not None)
    @rule(name=st.sampled_from(["a", "b", "c"]))
    def remove(self, name: str) -> None:
        if name in self.attachment.kinds:
            self.generation += 1
            self.attachment.bank.remove(name)
            del self.attachment.kinds[name], self.attachment.handles[name]

    @precondition(lambda self: self.attachment is not None)
    @rule(sure=st.sampled_from([False, False, True]))
    def detach(self, sure: bool) -> None:
        if not sure:
            return
        self.generation += 1
        attachment, self.attachment = self.attachment, None
        (attachment.handles[None] if attachment.bank is None else attachment.bank).detach()

    @precondition(lambda self: self.attachment is not None and self.attachment.handles)
    @rule(data=st.data())
    def save(self, data: Any) -> None:
        name = data.draw(st.sampled_from(list(self.attachment.kinds)))
        folder = Path(self.folder.name) / f"saved-{len(self.saved)}"
        self.attachment.handles[name].save(folder)
        self.saved.append((folder, *self.attachment.kinds[name]))

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), trainable=st.booleans(), name=st.sampled_from(["a", "b"]))
    def load(self, data: Any, trainable: bool, name: str) -> None:
        folder, kind, seed = data.draw(st.sampled_from(self.saved))
        if self.attachment is None:
            handle = prefixcore.load(self.model, folder, trainable=trainable)
            self.attachment = Attachment({None: (kind, seed)}, {None: handle}, None)
        elif self.attachment.bank is not None:
            handle = self.attachment.bank.load(name, folder, trainable=trainable, replace=True)
            self.attachment.kinds.pop(name, None)
            self.attachment.kinds[name], self.attachment.handles[name] = (kind, seed), handle
        self.generation += 1
        self.model.train(self.training)

    # -- what changes the model

    @rule(training=st.booleans())
    def mode(self, training: bool) -> None:
        self.training = training
        self.model.train(training)

    @rule(on=st.booleans())
    def checkpoint(self, on: bool) -> None:
        if on:
            self.model.gradient_checkpointing_enable()
        else:
            self.model.gradient_checkpointing_disable()
        self.checkpointing = on

    @precondition(nothing_attached)
    @rule(name=st.sampled_from(["eager", "sdpa"]))
    def attention(self, name: str) -> None:
        if isinstance(outcome(lambda: self.model.set_attn_implementation(name)), Refused):
            return
        self.changes.append(lambda model: model.set_attn_implementation(name))

    @precondition(nothing_attached)
    @rule(size=st.sampled_from([97, 101, 112]))
    def resize(self, size: int) -> None:
        def change(model: Any) -> None:
            torch.manual_seed(5)
            model.resize_token_embeddings(size, mean_resizing=False)

        change(self.model)
        self.model.train(self.training)
        self.changes.append(change)

    @precondition(lambda self: self.attachment is not None)
    @rule()
    def copied(self) -> None:
        """The history goes on with a copy of the model."""
        if isinstance(outcome(lambda: copy.deepcopy(self.model)), Refused):  # torch copies no hook that was removed
            return
        if self.attachment.bank is not None:
            bank = copy.deepcopy(self.attachment.bank)
            self.model = bank.model
            self.attachment = Attachment(self.attachment.kinds, {n: bank[n] for n in self.attachment.kinds}, bank)
        else:
            self.model = copy.deepcopy(self.model)
            handle = prefixcore.hf.attached(self.model)
            self.attachment = Attachment(self.attachment.kinds, {None: handle}, None)

    @precondition(lambda self: self.attachment is not None)
    @rule(options=options_of_a_call, numbers=tasks_of_a_call, lr=st.sampled_from([1e-2, 0.5]))
    def train_a_step(self, options: dict[str, Any], numbers: list[int], lr: float) -> None:
        wanted = [p for p in self.model.parameters() if p.requires_grad]
        if not wanted:
            return
        found = outcome(lambda: gradients(self.model, self.family, options, self.tasks(numbers)))
        if isinstance(found, Refused) or len(found) == 1:
            return
        optimizer = torch.optim.AdamW(wanted, lr=lr)
        for parameter, gradient in zip(wanted, found[1:], strict=True):
            parameter.grad = gradient if gradient.shape == parameter.shape else None
        optimizer.step()
        optimizer.zero_grad()
        self.talk = None

    @precondition(lambda self: self.attachment is None and self.family not in ENCODERS)
    @rule(method=st.sampled_from(["prefix", "prompt"]), options=options_of_a_call)
    def accelerated(self, method: str, options: dict[str, Any]) -> None:
        import peft

        kind = "SEQ_2_SEQ_LM" if self.family in PAIRS else "CAUSAL_LM"
        made = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[method]
        flags = {name: p.requires_grad for name, p in self.model.named_parameters()}

        def run() -> None:
            wrapped = peft.get_peft_model(self.model, made(task_type=kind, num_virtual_tokens=4))
            with prefixcore.accelerate(wrapped):
                outcome(lambda: generated(wrapped, self.family, {**options, "cache": None}, None))

        outcome(run)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(flags[name])
        for name in ("peft_config", "prepare_inputs_for_generation"):  # PEFT's own
            self.model.__dict__.pop(name, None)
        if self.checkpointing:  # PEFT turns it off for a prefix
            self.model.gradient_checkpointing_enable()
        else:
            self.model.gradient_checkpointing_disable()
        self.model.train(self.training)

    # -- calls

    @rule(data=st.data())
    def call(self, data: Any) -> None:
        for _ in range(data.draw(st.integers(1, 3))):
            which = data.draw(st.sampled_from(self.ways))
            self.call_one(which, data.draw(options_of_a_call), data.draw(tasks_of_a_call))

    def call_one(self, which: str, options: dict[str, Any], numbers: list[int]) -> None:
        if self.family in ENCODERS and which in ("generate", "batched"):
            which = "forward"
        tasks = self.tasks(numbers)
        got = outcome(lambda: WAYS[which](self.model, self.family, options, tasks))
        expected = outcome(lambda: WAYS[which](self.fresh(), self.family, options, tasks))
        self.answered[not isinstance(got, Refused)] += 1
        autocast = which == "forward" and options["around"] == "autocast"
        difference = same(got, expected, self.attachment is None, 0.2 if autocast else 5e-4)
        assert not difference, f"{self.family} {which} {options} {tasks}: {difference}"

    @rule(
        way=st.sampled_from(["forward", "gradients", "generate"]),
        options=options_of_a_call,
        numbers=tasks_of_a_call,
        calls=st.integers(0, 9),
    )
    def interrupted(self, way: str, options: dict[str, Any], numbers: list[int], calls: int) -> None:
        """A call that ends in an error somewhere inside."""
        if self.family in ENCODERS and way == "generate":
            way = "forward"
        modules = [
            m for name, m in self.model.named_modules() if name.endswith((".mlp", "attn", "attention", ".fc1", ".o"))
        ]
        left = [calls]

        def stop(module: Any, args: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("stopped")

        hooks = [module.register_forward_pre_hook(stop) for module in modules]
        try:
            outcome(lambda: WAYS[way](self.model, self.family, options, self.tasks(numbers)))
        finally:
            for hook in hooks:
                hook.remove()

    @precondition(lambda self: self.attachment is not None and self.attachment.handles)
    @rule(way=st.sampled_from(["forward", "gradients", "generate"]), options=options_of_a_call)
    def disabled(self, way: str, options: dict[str, Any]) -> None:
        if self.family in ENCODERS and way == "generate":
            way = "forward"
        handle = next(iter(self.attachment.handles.values()))

        def run() -> Any:
            with handle.disabled():
                return WAYS[way](self.model, self.family, options, None)

        def reference() -> Any:
            model = self.bare().requires_grad_(False)
            return WAYS[way](model, self.family, options, None)

        got, expected = outcome(run), outcome(reference)
        if way == "gradients" and not isinstance(got, Refused) and not isinstance(expected, Refused):
            got, expected = got[:1], expected[:1]
        if way == "gradients" and isinstance(got, Refused) and "does not require grad" in got.what:
            return
        difference = same(got, expected, True)
        assert not difference, f"{self.family} disabled {way} {options}: {difference}"

    @precondition(lambda self: self.family not in (*ENCODERS, *PAIRS))
    @rule(
        side=st.sampled_from(["none", "left"]),
        numbers=tasks_of_a_call,
        kind=st.sampled_from(["own", "dynamic", "static"]),
    )
    def begin_talk(self, side: str, numbers: list[int], kind: str) -> None:
        batch = batch_of(self.family, side, 2)
        talk = Conversation(
            None, [(batch["input_ids"], batch["attention_mask"])], self.tasks(numbers), self.generation, kind
        )
        got = outcome(lambda: self.replay(self.model, talk, None))
        expected = outcome(lambda: self.replay(self.fresh(), talk, None))
        if not isinstance(got, Refused):
            self.talk = talk._replace(cache=got[1])
            got = got[:1]
        if not isinstance(expected, Refused):
            expected = expected[:1]
        difference = same(got, expected, self.attachment is None)
        assert not difference, f"{self.family} begin {talk}: {difference}"

    def replay(self, model: Any, talk: Conversation, cache: Any) -> tuple[Tensor, Any]:
        """All calls of a conversation, or with a cache the last one; the last logits and the cache."""
        from transformers import DynamicCache, StaticCache

        calls = talk.calls if cache is None else talk.calls[-1:]
        if cache is None and talk.kind != "own":
            made = {"dynamic": lambda: DynamicCache(config=model.config)}
            made["static"] = lambda: StaticCache(config=model.config, max_cache_len=64)
            cache = made[talk.kind]()
        given = {} if talk.tasks is None else {"task_ids": talk.tasks}
        for ids, mask in calls:
            with torch.no_grad():
                output = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, **given)
            cache = output.past_key_values
        return output.logits[:, -1:].clone(), cache

    @precondition(lambda self: self.talk is not None)
    @rule(length=st.sampled_from([1, 1, 3]), seed=st.integers(4, 8), aside=st.booleans())
    def go_on(self, length: int, seed: int, aside: bool) -> None:
        talk = self.talk
        if aside and talk.generation == self.generation:  # a copy of the cache is gone on from by itself
            other = torch.full((3, 2), seed)
            mask = torch.cat((talk.calls[-1][1], torch.ones_like(other)), 1)
            outcome(lambda: self.replay(self.model, talk._replace(calls=[(other, mask)]), copy.deepcopy(talk.cache)))
        ids = torch.randint(3, models.VOCABULARY, (3, length), generator=torch.Generator().manual_seed(seed))
        mask = torch.cat((talk.calls[-1][1], torch.ones_like(ids)), 1)
        talk = talk._replace(calls=[*talk.calls, (ids, mask)])
        if talk.generation != self.generation:
            self.talk = None
            if talk.kind == "static" or self.attachment is None and talk.generation == 0:
                return
            if self.attachment is not None and self.attachment.bank is not None:
                return
            got = outcome(lambda: self.replay(self.model, talk._replace(tasks=None), talk.cache))
            if self.attachment is None and not isinstance(got, Refused):
                expected = self.replay(self.bare(), talk._replace(tasks=None), None)
                assert torch.allclose(got[0], expected[0], atol=1e-4), f"{self.family}: another's cache, in silence"
                return
            assert isinstance(got, Refused), f"{self.family}: a cache of others was gone on from: {talk}"
            return
        got = outcome(lambda: self.replay(self.model, talk, talk.cache))
        expected = outcome(lambda: self.replay(self.fresh(), talk, None))
        self.talk = None if isinstance(got, Refused) else talk
        if isinstance(got, Refused) and isinstance(expected, Refused):  # of which call of them is another matter
            return
        difference = same(*(each if isinstance(each, Refused) else each[:1] for each in (got, expected)), False)
        assert not difference, f"{self.family} goes on {talk}: {difference}"

    # -- what a model is

    @invariant()
    def the_model_is_what_it_was(self) -> None:
        if not hasattr(self, "model"):
            return
        if self.attachment is not None:
            trained = {id(p) for handle in self.attachment.handles.values() for p in handle.parameters()}
            for name, parameter in self.model.named_parameters():
                assert not parameter.requires_grad or id(parameter) in trained, f"{self.family}: {name} is trained"
            return
        mine, reference = picture(self.model), picture(self.bare())
        for what, expected in reference.items():
            assert mine[what] == expected, f"{self.family}: {what}: {difference_of(mine[what], expected)}"
