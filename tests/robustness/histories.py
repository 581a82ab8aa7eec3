"""A model that lives through a random history, and after each step answers as a fresh one does.

A `History` holds one tiny model, on which virtual tokens come and go, and which is called in every way between. What it
answers to a call is compared with a model made for this one call: the same weights, the same virtual tokens attached to
it directly. Nothing that was done before may show.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig, PTuningConfig

from ..hf import encoder_decoders, encoders, models
from ..hf.test_cached_attention import make as make_cached

MAKERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: models.make("llama"),
    "qwen2": lambda: models.make("qwen2", sliding_window=6),
    "qwen3": lambda: models.make("qwen3"),
    "gpt2": lambda: models.make("gpt2"),
    "gemma2": lambda: models.make("gemma2", sliding_window=6),
    "mistral": lambda: models.make("mistral", sliding_window=6),
    "gpt_oss": lambda: models.make("gpt_oss", sliding_window=6),
    "bert": lambda: encoders.make("bert", "ForMaskedLM", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "modernbert": lambda: encoders.make("modernbert", "ForMaskedLM"),
    "bart": lambda: encoder_decoders.make("bart", attention_dropout=0.0, activation_dropout=0.0),
    "t5": lambda: encoder_decoders.make("t5"),
    "bloom": lambda: make_cached("bloom", torch.float32),
    "falcon": lambda: make_cached("falcon", torch.float32),
}
ENCODERS, PAIRS, CACHED = ("bert", "modernbert"), ("bart", "t5"), ("bloom", "falcon")

KINDS: dict[str, Callable[[int], Any]] = {
    "prefix": lambda seed: PrefixTuningConfig(num_virtual_tokens=4, init="random", seed=seed),
    "one layer": lambda seed: PrefixTuningConfig(num_virtual_tokens=3, init="random", seed=seed, layers=[1]),
    "at zero": lambda seed: PrefixTuningConfig(num_virtual_tokens=4, init="random", seed=seed, position_offset=False),
    "low rank": lambda seed: PrefixTuningConfig(num_virtual_tokens=4, reparameterization="mlp", seed=seed),
    "prompt": lambda seed: PromptTuningConfig(num_virtual_tokens=5, init="random", seed=seed),
    "long prompt": lambda seed: PromptTuningConfig(num_virtual_tokens=9, init="vocab", seed=seed),
    "p-tuning": lambda seed: PTuningConfig(num_virtual_tokens=3, seed=seed),
}
CACHES = [None, "dynamic", "static", "hybrid"]


class Attachment(NamedTuple):
    """What is attached: the handles by their names, None for one that is no bank's; the bank, if there is one."""

    kinds: dict[str | None, tuple[str, int]]
    handles: dict[str | None, prefixcore.Handle]
    bank: prefixcore.PromptBank | None


class Refused(NamedTuple):
    """The error of a call."""

    what: str


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the error that it raises."""
    try:
        return call()
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError, IndexError, ImportError) as error:
        return Refused(f"{type(error).__name__}: {error}"[:200])


def same(got: Any, expected: Any, exact: bool, tolerance: float = 5e-4) -> str:
    """In what two outcomes differ; empty: in nothing."""
    if isinstance(got, Refused) or isinstance(expected, Refused):
        return "" if got == expected else f"got {got!r:.300}, expected {expected!r:.300}"
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a.shape != b.shape:
            return f"tensor {i}: shape {list(a.shape)}, expected {list(b.shape)}"
        if exact and not torch.equal(a, b):
            return f"tensor {i}: not bit for bit, by {(a.double() - b.double()).abs().max():.2e}"
        if not torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True):
            return f"tensor {i}: differs by {(a.double() - b.double()).abs().max():.2e}"
    return ""


def batch_of(family: str, side: str, seed: int, rows: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, models.VOCABULARY, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        length = (9, 6, 2)[row % 3]
        if side == "right":
            mask[row, length:] = 0
        elif side == "left":
            mask[row, : 9 - length] = 0
    return {"input_ids": ids * mask, **({} if side == "no mask" else {"attention_mask": mask})}


def shown(batch: dict[str, Tensor], logits: Tensor, family: str) -> Tensor:
    """Logits of the tokens that are no padding."""
    mask = batch.get("attention_mask")
    if mask is None or family in PAIRS or mask.shape[1] != logits.shape[1]:
        return logits
    return logits[mask.bool()]


AROUND: dict[str, Callable[[], Any]] = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def forward(model: Any, family: str, options: dict[str, Any], task_ids: Any) -> list[Tensor]:
    batch: dict[str, Any] = dict(batch_of(family, options["side"], options["seed"]))
    given = dict(batch)
    if options["embeds"]:
        given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids"))
    if family in PAIRS:
        given["labels" if options["labels"] else "decoder_input_ids"] = torch.tensor([[11, 23, 42, 7]] * 3)
    elif options["labels"]:
        given["labels"] = batch["input_ids"]
    if task_ids is not None:
        given["task_ids"] = task_ids
    if options["use_cache"] is not None and family not in ENCODERS:
        given["use_cache"] = options["use_cache"]
    if options["hidden"]:
        given["output_hidden_states"] = True
    with AROUND[options["around"]]():
        output = model(**given)
    found = [shown(batch, output.logits, family).float()]
    if options["hidden"] and family not in PAIRS:
        found += [shown(batch, each, family).float() for each in output.hidden_states]
    if options["labels"]:
        found.append(output.loss.float())
    return [each.detach().clone() for each in found]


def gradients(model: Any, family: str, options: dict[str, Any], task_ids: Any) -> list[Tensor]:
    wanted = [p for p in model.parameters() if p.requires_grad]
    batch = batch_of(family, options["side"], options["seed"])
    batch["labels"] = torch.tensor([[11, 23, 42, 7]] * 3) if family in PAIRS else batch["input_ids"]
    if task_ids is not None:
        batch["task_ids"] = task_ids
    loss = model(**batch).loss
    if not wanted or all(task is None for task in task_ids or [0]):  # whatever hooks for checkpointing make of it
        return [loss.detach().clone()]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [loss.detach().clone(), *(torch.zeros(1) if g is None else g for g in found)]


def generated(model: Any, family: str, options: dict[str, Any], task_ids: Any) -> list[Tensor]:
    if family in ENCODERS:
        return []
    batch: dict[str, Any] = dict(batch_of(family, options["side"], options["seed"]))
    if options["embeds"] and family not in PAIRS:
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    if task_ids is not None:
        batch["task_ids"] = task_ids
    if options["cache"] is not None:
        batch["cache_implementation"] = options["cache"]
    if options["guided"]:
        batch["guidance_scale"] = 1.5
    if options["lookup"]:  # of one row
        batch = {name: each if isinstance(each, (str, float)) else each[:1] for name, each in batch.items()}
        batch["prompt_lookup_num_tokens"] = 2
    torch.manual_seed(options["seed"])
    sampling = {"do_sample": True, "top_k": 5} if options["sample"] else {"do_sample": False}
    with AROUND["no_grad" if options["around"] == "autocast" else options["around"]]():
        found = model.generate(
            **batch,
            **sampling,
            max_new_tokens=5,
            num_beams=options["beams"],
            eos_token_id=None,
            disable_compile=True,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return [found.sequences, *(each.float() for each in found.logits)]


def batched(model: Any, family: str, options: dict[str, Any], task_ids: Any) -> list[Tensor]:
    from transformers import ContinuousBatchingConfig

    rows = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    made = model.generate_batch(
        rows,
        max_new_tokens=3,
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=32),
        progress_bar=False,
        **({} if task_ids is None else {"task_ids": task_ids}),
    )
    found = [torch.tensor(each.generated_tokens) for each in made.values()]
    if len(found) != 3:
        raise RuntimeError("generate_batch failed")
    return found


WAYS = {"forward": forward, "gradients": gradients, "generate": generated, "batched": batched}

options_of_a_call = st.fixed_dictionaries(
    {
        "side": st.sampled_from(["none", "no mask", "left", "right"]),
        "seed": st.integers(1, 3),
        "embeds": st.booleans(),
        "labels": st.booleans(),
        "use_cache": st.sampled_from([None, None, True, False]),
        "hidden": st.sampled_from([False, False, True]),
        "around": st.sampled_from(["plain", "no_grad", "no_grad", "inference", "autocast"]),
        "cache": st.sampled_from(CACHES),
        "beams": st.sampled_from([1, 1, 2]),
        "sample": st.booleans(),
        "lookup": st.sampled_from([False, False, False, False, True]),
        "guided": st.sampled_from([False, False, False, True]),
    }
)
tasks_of_a_call = st.lists(st.integers(-1, 2), min_size=3, max_size=3)


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
