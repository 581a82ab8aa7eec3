"""A handle that is asked for what a PeftModel has says what stands in its place."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest

import prefixcore
from prefixcore.hf.model.peft_names import INSTEAD
from tests import tiny


@pytest.fixture(scope="module")
def handle():
    with prefixcore.attach(tiny.model(), prefixcore.PromptTuningConfig(3, seed=0)) as handle:
        yield handle


@pytest.mark.parametrize("name", INSTEAD)
def test_a_name_of_pefts_says_what_to_write(handle, name):
    assert not hasattr(type(handle), name)
    with pytest.raises(AttributeError) as caught:
        getattr(handle, name)
    assert str(caught.value) == f"'Handle' object has no attribute {name!r}; {INSTEAD[name]}"


def test_they_are_names_that_a_peft_model_has(handle):
    model = peft.get_peft_model(tiny.model(), peft.LoraConfig(task_type="CAUSAL_LM"))
    added = "disable_adapters"  # of transformers' own adapters
    assert [name for name in INSTEAD if name != added and not hasattr(model, name)] == []


def test_another_name_is_as_of_any_object(handle):
    with pytest.raises(AttributeError, match="^'Handle' object has no attribute 'nonsense'$"):
        _ = handle.nonsense
    assert getattr(handle, "nonsense", None) is None


def test_a_handle_is_copied_and_pickled_as_ever(handle):
    for other in (copy.deepcopy(handle), pickle.loads(pickle.dumps(handle))):
        assert other.num_virtual_tokens == 3
