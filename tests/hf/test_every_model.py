"""`docs/models.md` says what `attach` says, and nothing that it accepts fails at the first real call."""

from __future__ import annotations

import pytest
import transformers

from prefixcore.hf.tested_classes import TESTED

from . import every_encoder, every_encoder_decoder
from .columns import COLUMNS
from .conftest import T5_IS_REACHED
from .every_model import cells
from .models_page import BAKED, LATER, WRITTEN_WITH, page_rows, row, said_by, tested
from .tiny_models import every_class

CLASSES = every_class()
ENCODERS = every_encoder.every_encoder()
ENCODER_DECODERS = every_encoder_decoder.every_encoder_decoder()

SAMPLE = [
    "BambaForCausalLM",
    "BertLMHeadModel",
    "BloomForCausalLM",
    "CohereForCausalLM",
    "DeepseekV3ForCausalLM",
    "FalconForCausalLM",
    "Gemma3ForConditionalGeneration",
    "Gemma4ForCausalLM",
    "GPTNeoXForCausalLM",
    "IdeficsForVisionText2Text",
    "JambaForCausalLM",
    "LlavaForConditionalGeneration",
    "MambaForCausalLM",
    "MptForCausalLM",
    "OPTForCausalLM",
    "PaliGemmaForConditionalGeneration",
    "Phi3ForCausalLM",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "T5Gemma2ForConditionalGeneration",
    "XLNetLMHeadModel",
]
"""One or two of each kind; `make test-slow` tries all."""

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet")]


@pytest.fixture
def quiet() -> None:
    transformers.logging.set_verbosity_error()


SAMPLE_OF_OTHERS = [
    "AlbertForMaskedLM",
    "BertForMaskedLM",
    "CLIPForImageClassification",
    "DebertaV2ForMaskedLM",
    "Dinov2ForImageClassification",
    "EsmForMaskedLM",
    "LayoutLMForMaskedLM",
    "ModernBertForMaskedLM",
    "ResNetForImageClassification",
    "XLMRobertaForMaskedLM",
    "BartForConditionalGeneration",
    "Florence2ForConditionalGeneration",
    "LEDForConditionalGeneration",
    "T5ForConditionalGeneration",
    "WhisperForConditionalGeneration",
]


PEFT_CANNOT = "| PEFT cannot |"
"""A row's last cell where PEFT fails."""


def check(name: str) -> None:
    if not T5_IS_REACHED and "T5ForConditionalGeneration" in name:
        pytest.xfail("T5's attention is reached from transformers 5.15 on")
    if name in ENCODERS:
        said, module = row(name, ENCODERS[name], every_encoder.cells(name, ENCODERS[name])), "every_encoder"
    elif name in ENCODER_DECODERS:
        said = row(name, ENCODER_DECODERS[name], every_encoder_decoder.cells(name, ENCODER_DECODERS[name]))
        module = "every_encoder_decoder"
    else:
        said, module = row(name, CLASSES[name], cells(name, CLASSES[name])), "every_model"
    expected = page_rows()[name]
    if not transformers.__version__.startswith(WRITTEN_WITH) and said.endswith(PEFT_CANNOT):
        # What PEFT can do with a class is up to its transformers; all else has to be the same.
        said, expected = said.removesuffix(PEFT_CANNOT), expected[: expected.rindex(" | ") + 1]
    assert expected == said, f"run python -m tests.hf.{module}"


@pytest.mark.parametrize("name", [*SAMPLE, *SAMPLE_OF_OTHERS])
def test_a_sample(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*CLASSES, *ENCODERS, *ENCODER_DECODERS} - {*SAMPLE, *SAMPLE_OF_OTHERS}))
def test_every_other_class(name: str) -> None:
    """Also of another transformers than the page was written with, as far as both have the class."""
    if name not in page_rows():
        pytest.skip("a class that came later than the page")
    check(name)


def test_what_is_attached_without_a_warning_is_what_the_page_says() -> None:
    assert {method: set(names) for method, names in TESTED.items()} == tested()


def test_the_page_has_every_class() -> None:
    here = {*CLASSES, *ENCODERS, *ENCODER_DECODERS}
    if transformers.__version__.startswith(WRITTEN_WITH):
        assert set(page_rows()) - LATER == here
    elif here & LATER:
        assert here <= set(page_rows())


def causal_rows() -> list[list[str]]:
    """The cells of the classes with a causal head, or that read images and text, as far as counted."""
    cells = [line.split(" | ") for name, line in page_rows().items() if name not in LATER]
    return [each for each in cells if len(each) == len(COLUMNS) + 4]


def test_pages_count_the_classes_as_the_table_does() -> None:
    assert said_by("README.md", r"All (\d+) classes of transformers with a causal head") == [len(causal_rows())]
    prompts = [each for each in causal_rows() if each[3].startswith("works")]
    classes, take, bake, refused = said_by(*BAKED)
    assert (classes, take) == (len(causal_rows()), len(prompts))
    assert take == bake + refused


def test_the_guide_counts_the_classes_whose_keys_turn_as_the_page_does() -> None:
    prefixes = [each for each in causal_rows() if each[2].startswith("works")]
    turn = [each for each in prefixes if each[4 + COLUMNS.index("keys turn")] == "yes"]
    pattern = r"Of the (\d+) classes with a causal head that take a prefix \(\S+ \S+ (\d+) turn"
    assert said_by("docs/guides/transformers.md", pattern) == [len(prefixes), len(turn)]
