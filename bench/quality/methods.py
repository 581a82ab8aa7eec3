"""The ways to learn a task, or to do without learning, by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from prefixcore.training.options import PROMPT_LOSS_WEIGHT
from prefixcore.training.starting import NUM_VIRTUAL_TOKENS

from .method import Method
from .of_peft import default, of_peft, peft_prefix_from_text, peft_prompt_from_text
from .ours import (
    ANSWERS_ALONE,
    AS_IT_IS,
    BASIS,
    EMBEDDING,
    FAST_GATE,
    FROM_A_TEXT,
    KV,
    LINEAR,
    MATRIX,
    P_TUNING,
    PREFIX,
    PROMPT,
    as_large,
    beside,
    from_layer,
    gated,
    ours,
    rates_apart,
    times,
)
from .outside import FeatureMap, outside
from .texts import written

SHOTS = (0, 2, 8)
ANSWERS = "loss of the answers alone"
_ALL = (
    Method("bare", "bare model", "bare", texts=lambda task, seed: [""]),
    *map(written, SHOTS),
    ours("prefix", "prefix", PREFIX, KV, **AS_IT_IS),
    ours("prompt", "soft prompt", PROMPT, EMBEDDING, **AS_IT_IS),
    ours("prefix-text", "prefix, from a text", PREFIX, KV, **AS_IT_IS, start="instruction", kind=FROM_A_TEXT),
    ours(
        "prompt-text", "soft prompt, from a text", PROMPT, EMBEDDING, **AS_IT_IS, start="instruction", kind=FROM_A_TEXT
    ),
    ours("p-tuning", "P-tuning, answers alone", P_TUNING, (1e-3, 3e-3), **ANSWERS_ALONE),
    *(
        ours(f"prefix-{n}", f"prefix, {n:,} numbers", PREFIX, BASIS, reparameterization="random_basis", num_basis=n)
        for n in (1000, 100, 10)
    ),
    of_peft("peft-prefix", "PEFT prefix, default", (3e-2, 5e-3), default("PrefixTuningConfig", num_virtual_tokens=20)),
    of_peft(
        "peft-prefix-zero",
        "PEFT prefix, zeros",
        (3e-2, 5e-3),
        default("PrefixTuningConfig", num_virtual_tokens=20, init_weights="zero"),
    ),
    of_peft("peft-prefix-text", "PEFT prefix, from a text", KV, peft_prefix_from_text),
    of_peft("peft-prompt", "PEFT prompt, default", (1e-2, 1e-1), default("PromptTuningConfig", num_virtual_tokens=20)),
    of_peft("peft-prompt-text", "PEFT prompt, from a text", EMBEDDING, peft_prompt_from_text),
    of_peft(
        "peft-p-tuning",
        "PEFT P-tuning, default",
        (1e-3, 3e-3),
        default("PromptEncoderConfig", num_virtual_tokens=20, encoder_hidden_size=576),
    ),
    of_peft("lora", "LoRA, rank 8 (PEFT)", (5e-4, 2e-3), default("LoraConfig", r=8, lora_dropout=0.0), "LoRA"),
    # Levers: first the default without the loss of prompts; each of the others is the prefix or the soft prompt of 32
    # tokens, without that loss or the average, with one thing otherwise.
    ours("prefix@answers", ANSWERS, PREFIX, KV, **ANSWERS_ALONE),
    ours("prompt@answers", ANSWERS, PROMPT, EMBEDDING, **ANSWERS_ALONE),
    ours("prefix-text@answers", ANSWERS, PREFIX, KV, **ANSWERS_ALONE, start="instruction", kind=FROM_A_TEXT),
    ours("prompt-text@answers", ANSWERS, PROMPT, EMBEDDING, **ANSWERS_ALONE, start="instruction", kind=FROM_A_TEXT),
    ours("prefix@last", "64 tokens, the last step's values", PREFIX, KV, most=NUM_VIRTUAL_TOKENS),
    ours("prefix@32", "32 tokens", PREFIX, KV),
    ours("prefix@one-draw", "start: examples, the first draw", PREFIX, KV, start="one draw"),
    ours("prefix@vocab", "start: vocabulary", PREFIX, KV, start="vocab"),
    ours("prefix@instruction", "start: instruction, two examples", PREFIX, KV, start="instruction"),
    ours("prefix@sentence", "start: any sentence, two examples", PREFIX, KV, start="sentence"),
    ours("prefix@labels", "start: class labels", PREFIX, KV, start="labels"),
    ours("prefix@zero", "start: zeros", PREFIX, KV, start="zero"),
    ours("prefix@random", "start: random, of unit variance", PREFIX, KV, start="random"),
    ours("prefix@as-large", "start: random, as large as a text's", PREFIX, KV, around=as_large),
    ours("prefix@half", "start: examples, half as large", PREFIX, KV, around=partial(times, factor=0.5)),
    ours("prefix@16", "16 tokens, the first draw", PREFIX, KV, start="one draw", tokens=16),
    ours("prefix@64", "64 tokens, the first draw", PREFIX, KV, start="one draw", tokens=64),
    ours("prefix@frozen", "first token frozen", PREFIX, KV, num_frozen_tokens=1),
    ours("prefix@mlp", "MLP", PREFIX, (1e-3, 3e-3), reparameterization="mlp"),
    ours("prefix@low-rank", "low rank, 4", PREFIX, KV, reparameterization="low_rank", rank=4),
    ours("prefix@warm-up", "warm-up of 10 steps", PREFIX, KV, training={"warmup_steps": 10}),
    ours("prefix@linear", "linear schedule, warm-up of 10 steps", PREFIX, KV, training=LINEAR),
    from_layer("prefix@from-quarter", "a quarter", 1),
    from_layer("prefix@from-half", "half", 2),
    from_layer("prefix@from-three-quarters", "three quarters", 3),
    ours("prefix@upper", "upper half of the layers alone", PREFIX, KV, layers=lambda n: list(range(n // 2, n))),
    ours("prefix@lower", "lower half of the layers alone", PREFIX, KV, layers=lambda n: list(range(n // 2))),
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
    ours("prompt@last", "64 tokens, the last step's values", PROMPT, EMBEDDING, most=NUM_VIRTUAL_TOKENS),
    ours("prompt@32", "32 tokens", PROMPT, EMBEDDING),
    ours("prompt@one-draw", "start: examples, the first draw", PROMPT, EMBEDDING, start="one draw"),
    ours("prompt@vocab", "start: vocabulary", PROMPT, EMBEDDING, start="vocab"),
    ours("prompt@instruction", "start: instruction, two examples", PROMPT, EMBEDDING, start="instruction"),
    ours("prompt@linear", "linear schedule, warm-up of 10 steps", PROMPT, EMBEDDING, training=LINEAR),
    ours("prompt@64", "64 tokens, the first draw", PROMPT, EMBEDDING, start="one draw", tokens=64),
    of_peft("peft-prefix-text@average", "averaged over the steps", KV, peft_prefix_from_text, average=True),
    of_peft(
        "peft-prefix-text@both", "averaged, and the loss of prompts too", KV, peft_prefix_from_text, average=True,
        prompt_loss_weight=PROMPT_LOSS_WEIGHT,
    ),
    of_peft("peft-prompt-text@average", "averaged over the steps", EMBEDDING, peft_prompt_from_text, average=True),
)  # fmt: skip
METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}
"""All of them, by name; those with an @ are levers."""
