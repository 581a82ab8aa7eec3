"""The known model families: one record for each, which everything that depends on the family asks.

A family stands here when `tests/hf` compares it, prefix and soft prompt, with real PEFT or with the model reading
the same text. A model of another family is attached too, after it has passed the second comparison on the spot
(`prefixcore.hf.verify`).

A record holds what a model cannot be asked at run time, and what tests and documentation are held to. The rest is
found by running the model (`prefixcore.hf.attention.discover`) or by looking at its modules, for any family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ROTARY = "rotary"
"""Positions are computed, so there is no last one."""

LEARNED = "learned"
"""Positions are rows of a trained table, `config.max_position_embeddings` of them."""

NO_LAYERS, SOME_LAYERS, ALL_LAYERS = "no layers", "some layers", "all layers"

AS_DECODER = (
    "Its configuration has is_decoder=False, the default of models that are encoders too: load it with "
    "is_decoder=True, as from_pretrained(..., is_decoder=True)"
)
"""How a model that is an encoder or a decoder, as its configuration says, is made a decoder."""


@dataclass(frozen=True)
class Family:
    """What is known about one family of decoders, or of encoders.

    Attributes:
        model_type: transformers' `config.model_type` of the text decoder, or of the encoder.
        label: the name that people write, in README, CHANGELOG and docstrings.
        positions: `ROTARY` or `LEARNED`.
        sliding_window: which layers attend through `config.sliding_window` where it is set: `NO_LAYERS`,
            `SOME_LAYERS` (those that `config.layer_types` names) or `ALL_LAYERS`.
        attention_arguments: what its attention passes besides heads, scale and window: "softcap", "s_aux" (sinks).
        attention_dropout: the field of its configuration with the dropout rate of attention weights.
        peft_methods: what PEFT can train on it, so that tests compare with PEFT: "prefix", "prompt".
        window_buffer: of attention that nothing but its cache reaches, its buffer [1, 1, T, S] that says which keys are
            in the window of each query, so that the prefix is put there, too; None: there is none.
    """

    model_type: str
    label: str
    positions: str = ROTARY
    sliding_window: str = NO_LAYERS
    attention_arguments: frozenset[str] = frozenset()
    attention_dropout: str = "attention_dropout"
    peft_methods: frozenset[str] = frozenset({"prefix", "prompt"})
    window_buffer: str | None = None


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "Llama"),
        Family("mistral", "Mistral", sliding_window=ALL_LAYERS),
        Family("qwen2", "Qwen2", sliding_window=SOME_LAYERS),
        Family("qwen3", "Qwen3", sliding_window=SOME_LAYERS),
        Family("gemma2", "Gemma 2", sliding_window=SOME_LAYERS, attention_arguments=frozenset({"softcap"})),
        Family("gpt_oss", "gpt-oss", sliding_window=SOME_LAYERS, attention_arguments=frozenset({"s_aux"})),
        Family("gpt2", "GPT-2", positions=LEARNED, attention_dropout="attn_pdrop"),
    )
}
"""The known families by their `model_type`."""

CACHED: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("bloom", "Bloom"),
        Family("falcon", "Falcon"),
        Family("mpt", "MPT", positions=LEARNED),
        Family("gpt_neo", "GPT-Neo", positions=LEARNED, window_buffer="bias"),
        Family("gptj", "GPT-J", positions=LEARNED),
        Family("codegen", "CodeGen", positions=LEARNED),
        Family("xglm", "XGLM"),
    )
}
"""The families that transformers' attention interface does not reach: a prefix is concatenated with keys and values.

By their `model_type`. Biases by distance (ALiBi) are what the model makes of P more keys: Bloom's and Falcon's count
what the mask shows, MPT's the places of keys. So a prefix stands before the text as P tokens would, as in PEFT.
"""

RESETS_AT_FIRST_POSITION = frozenset({"recurrent_gemma"})
"""Families, by their `model_type`, with layers that take position 0 for the start of a text and forget what was before.

Their positions stay as they are: moved behind a prefix, a text would have no start.
"""

_BERT_DROPOUT = "attention_probs_dropout_prob"
_OUT_OF_PEFT = frozenset({"prompt"})
"""PEFT puts a prefix into the cache of a model, which these have none of."""

ENCODERS: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("bert", "BERT", positions=LEARNED, attention_dropout=_BERT_DROPOUT),
        Family("roberta", "RoBERTa", positions=LEARNED, attention_dropout=_BERT_DROPOUT),
        Family("xlm-roberta", "XLM-RoBERTa", positions=LEARNED, attention_dropout=_BERT_DROPOUT),
        Family("electra", "ELECTRA", positions=LEARNED, attention_dropout=_BERT_DROPOUT),
        Family("albert", "ALBERT", positions=LEARNED, attention_dropout=_BERT_DROPOUT, peft_methods=_OUT_OF_PEFT),
        Family("distilbert", "DistilBERT", positions=LEARNED, peft_methods=_OUT_OF_PEFT),
        Family("modernbert", "ModernBERT", sliding_window=SOME_LAYERS, peft_methods=_OUT_OF_PEFT),
        Family("vit", "ViT", positions=LEARNED, attention_dropout=_BERT_DROPOUT, peft_methods=frozenset()),
    )
}
"""The known families whose tokens see those after them, too, by their `model_type`."""


ENCODER_DECODERS: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("bart", "BART", positions=LEARNED),
        Family("mbart", "mBART", positions=LEARNED),
        Family("pegasus", "Pegasus"),
        Family("marian", "Marian"),
        Family("m2m_100", "M2M100"),
        Family("t5", "T5", attention_dropout="dropout_rate", peft_methods=_OUT_OF_PEFT),
        Family("mt5", "mT5", attention_dropout="dropout_rate", peft_methods=_OUT_OF_PEFT),
        Family("whisper", "Whisper", positions=LEARNED, peft_methods=frozenset()),
    )
}
"""The known families that read one sequence and write another, by their `model_type`."""


def text_config(model: Any) -> Any:
    """The configuration of the text decoder inside `model`."""
    return model.config.get_text_config(decoder=True)


def family_of(model: Any) -> Family | None:
    """The record of the text decoder inside `model`; None: its family is not known."""
    return FAMILIES.get(text_config(model).model_type)


def is_known(model: Any) -> bool:
    """Whether the text decoder of `model` is of a known family."""
    return family_of(model) is not None


def is_known_encoder(model: Any) -> bool:
    """Whether `model`, which is found to be an encoder, is of a known family of them."""
    return text_config(model) is model.config and model.config.model_type in ENCODERS


def is_known_encoder_decoder(model: Any) -> bool:
    """Whether `model` is an encoder-decoder of a known family."""
    return bool(model.config.is_encoder_decoder) and model.config.model_type in ENCODER_DECODERS


def known_families() -> str:
    """The known families by `model_type`, for messages."""
    return ", ".join(sorted(FAMILIES))


def known_encoders() -> str:
    """The known families of encoders by `model_type`, for messages."""
    return ", ".join(sorted(ENCODERS))


def position_limit(model: Any) -> int | None:
    """How many positions a model of a known family has learned; None: it computes them, or its family is not known.

    `prefixcore.hf.positions.position_table` finds out those of any model.
    """
    family = family_of(model)
    return text_config(model).max_position_embeddings if family and family.positions == LEARNED else None


def has_windows(model: Any) -> bool:
    """Whether some attention layer of the text decoder inside `model` has a sliding window."""
    family = family_of(model)
    able = family is None or family.sliding_window != NO_LAYERS
    return able and getattr(text_config(model), "sliding_window", None) is not None


def has_only_full_attention(model: Any) -> bool:
    """Whether every layer of the text decoder inside `model` lets each token see all that come before it."""
    layer_types = getattr(text_config(model), "layer_types", None) or []
    return not has_windows(model) and set(layer_types) <= {"full_attention"}


def attention_dropout(model: Any) -> dict[str, float]:
    """The dropout rates of attention weights that are not zero, by their name in the configuration.

    A family that is not known may use any of the names that the known ones do.
    """
    family = family_of(model)
    known = [*FAMILIES.values(), *ENCODERS.values()]
    names = [family.attention_dropout] if family else {each.attention_dropout for each in known}
    config = text_config(model)
    return {name: rate for name in sorted(names) if (rate := getattr(config, name, 0.0))}
