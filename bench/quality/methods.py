"""The ways to learn a task, or to do without learning: what each attaches, and the learning rates tried for it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import prefixcore
from bench.demo.methods import shared_copy
from prefixcore.training import best_start, starting_text, tokenize
from prefixcore.training.starting import DRAWS, NUM_VIRTUAL_TOKENS, in_turns

from .outside import FeatureMap, FeatureMapBesidePrefix, Gate, outside
from .rates import scaled_rates
from .tasks import END, Task

SHOTS = (0, 2, 8)
PREFACE = "Below are questions and their answers. Each answer is correct and short, and nothing else is written.\n"
LEVER_TOKENS = 32
"""At how many tokens of examples levers are compared with each other: half of what a start has."""

WRITTEN_DRAWS = 3
"""How many draws of examples a written prompt is the best of, by its score on the validation side."""


@dataclass(frozen=True)
class Attached:
    """A model that has something to train.

    Attributes:
        model: takes batches, and generates.
        parameters: what is trained.
        packed: whether it is trained on packed batches.
        num_virtual_tokens: P, where it has any.
    """

    model: Any
    parameters: Sequence[torch.nn.Parameter]
    packed: bool
    num_virtual_tokens: int = 0

    @property
    def numbers(self) -> int:
        """How many numbers are trained."""
        return sum(each.numel() for each in self.parameters)


Attach = Callable[[Any, Any, Task, int], Any]


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: what records call it.
        title: what pages call it.
        kind: "bare", "written", "ours", "PEFT" or "LoRA".
        attach: a context manager of (model, tokenizer, task, seed) that gives an `Attached`; None: nothing is trained.
        rates: learning rates that the validation side chooses from.
        options: further options of the training, for all rates.
        texts: candidates of a written prompt, of (task, seed).
    """

    name: str
    title: str
    kind: str
    attach: Attach | None = None
    rates: tuple[float, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    texts: Callable[[Task, int], Sequence[str]] | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether nothing in it is random, so that one seed says all."""
        return self.name in ("bare", "written-0")


def written(shots: int) -> Method:
    """An instruction and so many training examples."""

    def texts(task: Task, seed: int) -> list[str]:
        found = []
        for draw in range(WRITTEN_DRAWS if shots else 1):
            examples = random.Random(f"{seed} {draw}").sample(list(task.training), shots)
            found.append(instruction(task) + "".join(each.prompt + each.completion for each in examples))
        return found

    title = f"written prompt, {shots} examples" if shots else "written prompt, no example"
    return Method(f"written-{shots}", title, "written", texts=texts)


def instruction(task: Task) -> str:
    """What a person would write, the labels named where there are a few."""
    if not task.labels:
        return task.instruction
    return f"{task.instruction.rstrip()} One of: {', '.join(task.labels)}.{END}"


def shown(task: Task, shots: int = 2) -> str:
    """The instruction and the first training examples: the text that a person would start virtual tokens from."""
    answers: dict[str, Any] = {}
    for example in task.training:
        answers.setdefault(example.completion, example)
    some = list(answers.values())[:shots]
    return task.instruction + "".join(each.prompt + each.completion for each in some)


def preface(task: Task) -> str:
    """A sentence that fits any task, and the first training examples."""
    return PREFACE + shown(task).removeprefix(task.instruction)


def ours(
    name: str,
    title: str,
    config: type,
    rates: tuple[float, ...],
    *,
    start: str = "examples",
    tokens: int | None = None,
    most: int = LEVER_TOKENS,
    training: Mapping[str, Any] | None = None,
    around: Callable[[Any], AbstractContextManager[Sequence[torch.nn.Parameter]]] | None = None,
    **options: Any,
) -> Method:
    """A prefix or soft prompt of ours.

    Args:
        name, title: of the method.
        config: the class of the configuration.
        rates: tried learning rates.
        start: "examples" (the default of `prefixcore train`: the best of a few draws), "one draw" (of examples),
            "instruction" (a person's text with two examples), "sentence" (any text with two examples),
            "labels", "vocab", "random" or "zero".
        tokens: P; None: what the start has, or 20.
        most: how many tokens whole examples may fill.
        training: options of the training.
        around: of the handle: a block in which something is changed, and what is trained along.
        options: of the configuration; a function is asked for its value with the model's number of layers.
    """

    @contextmanager
    def attach(model: Any, tokenizer: Any, task: Task, seed: int) -> Iterator[Attached]:
        given: dict[str, Any] = {"seed": seed, "num_virtual_tokens": tokens, **resolved(options, model)}
        if start == "examples":
            given["init_text"] = text_of_examples(model, tokenizer, task, seed, tokens, most)
        elif start == "one draw":
            given["init_text"] = starting_text(task.training, tokenizer, tokens, end=END, seed=seed, most=most)
        elif start == "instruction":
            given["init_text"] = shown(task)
        elif start == "sentence":
            given["init_text"] = preface(task)
        elif start == "labels":
            given["init_text"] = " ".join(task.labels) + END
        else:
            given["init"], given["num_virtual_tokens"] = start, tokens or 20
        with (
            prefixcore.attach(model, config(**given), tokenizer=tokenizer) as handle,
            around(handle) if around is not None else nullcontext([]) as further,
        ):
            parameters = [each for each in (*handle.parameters(), *further) if each.numel()]
            yield Attached(handle.model, parameters, handle.can_pack, handle.num_virtual_tokens)

    return Method(name, title, "ours", attach, rates, dict(training or {}))


def text_of_examples(model: Any, tokenizer: Any, task: Task, seed: int, tokens: int | None, most: int) -> str:
    """What `prefixcore train` starts from where no start is given."""
    texts = [
        starting_text(task.training, tokenizer, tokens, end=END, seed=seed + draw, most=most) for draw in range(DRAWS)
    ]
    outside = [each for each in in_turns(task.training, 0) if not any(each.prompt in text for text in texts)]
    configs = [PREFIX(init_text=text) for text in texts]
    return str(best_start(model, tokenizer, configs, tokenize(tokenizer, outside, end=END)).init_text)


def resolved(options: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Options in which functions are their values for this model."""
    layers = model.config.num_hidden_layers
    return {name: value(layers) if callable(value) else value for name, value in options.items()}


def of_peft(name: str, title: str, rates: tuple[float, ...], make: Callable[..., Any], kind: str = "PEFT") -> Method:
    """A method of PEFT's: `make(model, tokenizer, task)` wraps a model of the same weights."""

    @contextmanager
    def attach(model: Any, tokenizer: Any, task: Task, seed: int) -> Iterator[Attached]:
        torch.manual_seed(seed)
        wrapped = make(shared_copy(model), tokenizer, task)
        parameters = [each for each in wrapped.parameters() if each.requires_grad]
        config = next(iter(wrapped.peft_config.values()))
        yield Attached(wrapped, parameters, False, getattr(config, "num_virtual_tokens", None) or 0)

    return Method(name, title, kind, attach, rates)


def _peft(config: str, **options: Any) -> Callable[..., Any]:
    def make(model: Any, tokenizer: Any, task: Task) -> Any:
        import peft

        return peft.get_peft_model(model, getattr(peft, config)(task_type="CAUSAL_LM", **options))

    return make


def peft_prefix_from_text(model: Any, tokenizer: Any, task: Task) -> Any:
    """PEFT's prefix, started by its own helper from the keys and values of the instruction and two examples."""
    import peft
    from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text

    text = shown(task)
    tokens = len(tokenizer(text)["input_ids"])
    wrapped = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens))
    initialize_kv_prefix_from_text(wrapped, tokenizer, text=text, use_chat_template=False)
    return wrapped


def peft_prompt_from_text(model: Any, tokenizer: Any, task: Task) -> Any:
    """PEFT's prompt tuning, started from the embeddings of the instruction and two examples."""
    import peft
    from peft import PromptTuningInit
    from peft.tuners.prompt_tuning import PromptEmbedding

    text = shown(task)
    ids = tokenizer(text)["input_ids"]
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=len(ids), prompt_tuning_init=PromptTuningInit.RANDOM
    )
    wrapped = peft.get_peft_model(model, config)
    encoder = wrapped.prompt_encoder["default"]
    assert isinstance(encoder, PromptEmbedding)
    with torch.no_grad():  # what its TEXT start does with a tokenizer that it can load by a name
        encoder.embedding.weight.copy_(model.get_input_embeddings()(torch.tensor(ids)))
    return wrapped


PREFIX, PROMPT, P_TUNING = prefixcore.PrefixTuningConfig, prefixcore.PromptTuningConfig, prefixcore.PTuningConfig
KV, EMBEDDING, BASIS = (2e-3, 5e-3), (5e-3, 2e-2), (5e-3, 2e-2)
"""Learning rates that are tried for keys and values, for embeddings, and for coefficients of a random basis."""

MATRIX = (5e-5, 2e-4, 1e-3)
"""Learning rates that are tried for matrices on queries: 64 products add up in each number that they give."""

LINEAR = {"warmup_steps": 10, "schedule": "linear"}
FAST_GATE = 25
"""How many times the learning rate of keys and values that of a gate is, which has one number a head to move."""


def gated(name: str, title: str, rate: float, **options: Any) -> Method:
    """A prefix behind a gate that begins at zero; the text stands where it would without."""
    around = partial(outside, make=partial(Gate, rate=rate))
    return ours(name, title, PREFIX, KV, around=around, position_offset=False, **options)


def beside(name: str, title: str, rate: float) -> Method:
    """The prefix, and a map of the queries' features beside the softmax."""
    return ours(name, title, PREFIX, KV, around=partial(outside, make=partial(FeatureMapBesidePrefix, rate=rate)))


def rates_apart(name: str, title: str, **factors: float) -> Method:
    """The prefix with so many times the learning rate for its keys or its values."""
    return ours(name, title, PREFIX, KV, around=partial(scaled_rates, **factors))


_ALL = (
    Method("bare", "bare model", "bare", texts=lambda task, seed: [""]),
    *map(written, SHOTS),
    ours("prefix", "prefix", PREFIX, KV, most=NUM_VIRTUAL_TOKENS),
    ours("prompt", "soft prompt", PROMPT, EMBEDDING, most=NUM_VIRTUAL_TOKENS),
    ours("p-tuning", "P-tuning", P_TUNING, (1e-3, 3e-3), most=NUM_VIRTUAL_TOKENS),
    *(
        ours(f"prefix-{n}", f"prefix, {n:,} numbers", PREFIX, BASIS, reparameterization="random_basis", num_basis=n)
        for n in (1000, 100, 10)
    ),
    of_peft("peft-prefix", "PEFT prefix, default", (3e-2, 5e-3), _peft("PrefixTuningConfig", num_virtual_tokens=20)),
    of_peft(
        "peft-prefix-zero",
        "PEFT prefix, zeros",
        (3e-2, 5e-3),
        _peft("PrefixTuningConfig", num_virtual_tokens=20, init_weights="zero"),
    ),
    of_peft("peft-prefix-text", "PEFT prefix, from a text", KV, peft_prefix_from_text),
    of_peft("peft-prompt", "PEFT prompt, default", (1e-2, 1e-1), _peft("PromptTuningConfig", num_virtual_tokens=20)),
    of_peft("peft-prompt-text", "PEFT prompt, from a text", EMBEDDING, peft_prompt_from_text),
    of_peft(
        "peft-p-tuning",
        "PEFT P-tuning, default",
        (1e-3, 3e-3),
        _peft("PromptEncoderConfig", num_virtual_tokens=20, encoder_hidden_size=576),
    ),
    of_peft("lora", "LoRA, rank 8 (PEFT)", (5e-4, 2e-3), _peft("LoraConfig", r=8, lora_dropout=0.0), "LoRA"),
    # Levers: each is the prefix or the soft prompt of 32 tokens with one thing otherwise.
    ours("prefix@32", "32 tokens", PREFIX, KV),
    ours("prefix@one-draw", "start: examples, the first draw", PREFIX, KV, start="one draw"),
    ours("prefix@vocab", "start: vocabulary", PREFIX, KV, start="vocab"),
    ours("prefix@instruction", "start: instruction, two examples", PREFIX, KV, start="instruction"),
    ours("prefix@sentence", "start: any sentence, two examples", PREFIX, KV, start="sentence"),
    ours("prefix@labels", "start: class labels", PREFIX, KV, start="labels"),
    ours("prefix@zero", "start: zeros", PREFIX, KV, start="zero"),
    ours("prefix@16", "16 tokens, the first draw", PREFIX, KV, start="one draw", tokens=16),
    ours("prefix@64", "64 tokens, the first draw", PREFIX, KV, start="one draw", tokens=64),
    ours("prefix@frozen", "first token frozen", PREFIX, KV, num_frozen_tokens=1),
    ours("prefix@mlp", "MLP", PREFIX, (1e-3, 3e-3), reparameterization="mlp"),
    ours("prefix@low-rank", "low rank, 4", PREFIX, KV, reparameterization="low_rank", rank=4),
    ours("prefix@warm-up", "warm-up of 10 steps", PREFIX, KV, training={"warmup_steps": 10}),
    ours("prefix@linear", "linear schedule, warm-up of 10 steps", PREFIX, KV, training=LINEAR),
    ours("prefix@upper", "upper half of the layers", PREFIX, KV, layers=lambda n: list(range(n // 2, n))),
    ours("prefix@lower", "lower half of the layers", PREFIX, KV, layers=lambda n: list(range(n // 2))),
    gated("prefix@gate", "gate from zero", 1),
    gated("prefix@gate-fast", f"gate from zero, {FAST_GATE} times the rate for it", FAST_GATE),
    gated(
        "prefix@gate-random", f"gate from zero, {FAST_GATE} times the rate for it, start: random", FAST_GATE,
        start="random",
    ),
    ours(
        "prefix@outside", "map outside the softmax in the prefix's place", PREFIX, MATRIX, start="zero", tokens=1,
        num_frozen_tokens=1, position_offset=False, around=partial(outside, make=FeatureMap),
    ),
    beside("prefix@outside-beside", "map outside the softmax beside the prefix, a tenth of its rate", 0.1),
    beside("prefix@outside-slow", "map outside the softmax beside the prefix, a hundredth of its rate", 0.01),
    rates_apart("prefix@keys-slow", "a fifth of the learning rate for keys", key=0.2),
    rates_apart("prefix@values-slow", "a fifth of the learning rate for values", value=0.2),
    rates_apart("prefix@keys-fast", "five times the learning rate for keys", key=5.0),
    ours("prompt@32", "32 tokens", PROMPT, EMBEDDING),
    ours("prompt@one-draw", "start: examples, the first draw", PROMPT, EMBEDDING, start="one draw"),
    ours("prompt@vocab", "start: vocabulary", PROMPT, EMBEDDING, start="vocab"),
    ours("prompt@instruction", "start: instruction, two examples", PROMPT, EMBEDDING, start="instruction"),
    ours("prompt@linear", "linear schedule, warm-up of 10 steps", PROMPT, EMBEDDING, training=LINEAR),
    ours("prompt@64", "64 tokens, the first draw", PROMPT, EMBEDDING, start="one draw", tokens=64),
)  # fmt: skip
METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}
"""All of them, by name; those with an @ are levers."""
