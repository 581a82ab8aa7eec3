"""The records of the known families are what transformers does, what is tested and what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import prefixcore
from prefixcore import PrefixTuningConfig
from prefixcore.hf import FAMILIES as KNOWN
from prefixcore.hf.attention.recording import record
from prefixcore.hf.families import ALL_LAYERS, LEARNED, NO_LAYERS, SOME_LAYERS, Family

from .models import FAMILIES, PEFT_PREFIX, PEFT_PROMPT, make, tokens

ROOT = Path(__file__).parents[2]

each_family = pytest.mark.parametrize("family", KNOWN.values(), ids=list(KNOWN))


def test_every_known_family_is_tested() -> None:
    assert set(KNOWN) == set(FAMILIES)


def test_every_family_that_peft_can_train_is_compared_with_it() -> None:
    from . import test_peft_prefix, test_peft_prompt

    for module, compared in ((test_peft_prefix, PEFT_PREFIX), (test_peft_prompt, PEFT_PROMPT)):
        (families,) = (m for m in module.test_logits_loss_gradients.pytestmark if m.args[0] == "family")
        assert families.args[1] == compared
    assert PEFT_PREFIX
    assert PEFT_PROMPT


@each_family
def test_its_model_type(family: Family) -> None:
    assert KNOWN[family.model_type] is family
    assert make(family.model_type).config.model_type == family.model_type


@each_family
def test_its_attention_arguments_and_windows(family: Family) -> None:
    """As the attention calls of transformers' own model have them, where a window is set."""
    calls = record(make(family.model_type, sliding_window=4), tokens(1, 2))
    windows = {call.kwargs.get("sliding_window") for call in calls}
    assert windows == {NO_LAYERS: {None}, SOME_LAYERS: {4, None}, ALL_LAYERS: {4}}[family.sliding_window]
    for call in calls:
        passed = {name for name in ("softcap", "s_aux") if call.kwargs.get(name) is not None}
        assert passed == family.attention_arguments


@each_family
def test_its_positions(family: Family) -> None:
    """Where they are learned, there is none after the last."""
    model = make(family.model_type)
    last = model.config.max_position_embeddings - 1
    model(tokens(1, 1), position_ids=torch.tensor([[last]]))
    if family.positions == LEARNED:
        with pytest.raises(IndexError):
            model(tokens(1, 1), position_ids=torch.tensor([[last + 1]]))
    else:
        model(tokens(1, 1), position_ids=torch.tensor([[last + 1]]))


@each_family
def test_its_attention_dropout(family: Family) -> None:
    model = make(family.model_type, **{family.attention_dropout: 0.5}).train()
    with pytest.warns(UserWarning, match=f"{family.attention_dropout} is 0.5"):
        handle = prefixcore.attach(model, PrefixTuningConfig(num_virtual_tokens=2, init="zero"))
    handle.detach()
    model.set_attn_implementation("eager")
    drawn = [model(tokens(1, 6)).logits for _ in range(2)]
    assert not torch.equal(*drawn)  # the rate is read, and nothing else is random


@each_family
@pytest.mark.parametrize("where", ["README.md", "CHANGELOG.md", "attach"])
def test_it_is_named_where_people_look(family: Family, where: str) -> None:
    text = str(prefixcore.attach.__doc__) if where == "attach" else (ROOT / where).read_text(encoding="utf-8")
    if where == "README.md":
        text = text.partition("\n## Model families\n")[2].partition("\n## ")[0]
    assert family.label in " ".join(text.split())
