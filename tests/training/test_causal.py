"""Examples are for models that go on with a text: in any other a token that is to be learnt is seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, AutoModelForSeq2SeqLM, LlamaForSequenceClassification

import prefixcore
from prefixcore.training import (
    Example,
    TrainingOptions,
    evaluate,
    fit,
    held_out_loss,
    predict,
    tokenize,
    train,
)
from prefixcore.training.tuning import grid, tune
from tests import tiny

TOKENIZER = tiny.tokenizer()
EXAMPLES = [Example("a ->", " b"), Example("c ->", " d")]
TOKENS = tokenize(TOKENIZER, EXAMPLES)
CONFIG = prefixcore.PrefixTuningConfig(num_virtual_tokens=2, modules_to_save=[])
MODELS: dict[str, Callable[[Path], Any]] = {
    "BertModel": lambda path: AutoModel.from_pretrained(tiny.encoder_folder(path)),
    "BartForConditionalGeneration": lambda path: AutoModelForSeq2SeqLM.from_pretrained(
        tiny.encoder_decoder_folder(path)
    ),
    "LlamaForSequenceClassification": lambda path: LlamaForSequenceClassification(tiny.model().config),
}


def tuned(model: Any) -> None:
    with prefixcore.PromptBank(model) as bank:
        tune(bank, TOKENIZER, grid(CONFIG, [2], [1e-3]), TOKENS, TOKENS, seconds=60, most_steps=1)


def trained(model: Any) -> None:
    with prefixcore.attach(model, CONFIG) as handle:
        train(handle, TOKENIZER, TOKENS, options=TrainingOptions(steps=1))


CALLS: dict[str, Callable[[Any], Any]] = {
    "train": trained,
    "tune": tuned,
    "fit": lambda model: fit(model, model.parameters(), TOKENS, options=TrainingOptions(steps=1)),
    "held_out_loss": lambda model: held_out_loss(model, TOKENS, 0),
    "predict": lambda model: predict(model, TOKENIZER, ["a ->"], max_new_tokens=2),
    "evaluate": lambda model: evaluate(model, TOKENIZER, EXAMPLES, TOKENS),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_does_not_go_on_with_a_text_is_refused(name: str, call: str, tmp_path: Path) -> None:
    model = MODELS[name](tmp_path)
    with pytest.raises(NotImplementedError, match=f"{name} does not go on with a text.*expected a causal"):
        CALLS[call](model)
    assert not hasattr(model, "prefixcore")


@pytest.mark.parametrize("call", CALLS)
def test_one_that_does_is_taken(call: str) -> None:
    CALLS[call](tiny.model())
