"""Hybrids: models with layers that remember what they have read (linear attention, state spaces, convolutions).

A soft prompt passes all layers, so each row of a batch is what the bare model computes of the row alone, with the
embeddings before its text. A prefix is in the attention layers alone, and is held to concatenated keys and values
(`hybrids.py`, `test_every_model.py`).
"""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import prefixcore
from prefixcore import PrefixTuningConfig, PromptTuningConfig

from .tiny_models import make as make_class

P, NEW = 5, 4
MODELS = {
    "BambaForCausalLM": "bamba",
    "FalconH1ForCausalLM": "falcon_h1",
    "GraniteMoeHybridForCausalLM": "granitemoehybrid",
    "KimiLinearForCausalLM": "kimi_linear",
    "Lfm2ForCausalLM": "lfm2",
    "Lfm2MoeForCausalLM": "lfm2_moe",
    "NemotronHForCausalLM": "nemotron_h",
    "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3_5ForCausalLM": "qwen3_5",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Qwen3_5MoeForCausalLM": "qwen3_5_moe",
}
SOME = ["FalconH1ForCausalLM", "Lfm2ForCausalLM", "NemotronHForCausalLM", "Qwen3_5ForCausalLM"]
"""Both in one layer, convolutions, state spaces, linear attention."""

PROMPT = PromptTuningConfig(num_virtual_tokens=P, init="random", seed=0)
PREFIX = PrefixTuningConfig(num_virtual_tokens=P, init="random", seed=0)
LENGTHS = 9, 6, 1, 4

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet")]


@pytest.fixture
def quiet() -> None:
    transformers.logging.set_verbosity_error()


def make(name: str, dtype: torch.dtype = torch.float64) -> Any:
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    model = make_class(name, MODELS[name])
    for module in model.modules():  # without a bias a convolution would leave zeros at padding
        if isinstance(module, torch.nn.Conv1d) and module.bias is not None:
            torch.nn.init.normal_(module.bias, std=0.3)
    model.set_experts_implementation("eager")  # grouped products are not in float64
    return model.to(dtype)


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 40, (length,), generator=generator) for length in LENGTHS]


def padded(side: str) -> dict[str, Tensor]:
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(rows()):
        here = slice(0, len(text)) if side == "right" else slice(max(LENGTHS) - len(text), None)
        ids[row, here], mask[row, here] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def close(got: Tensor, expected: Tensor) -> None:
    """Their recurrences are in float32, whatever the model's dtype."""
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=2e-4, atol=2e-4)


def options(**changes: Any) -> dict[str, Any]:
    return {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **changes}


def row_alone(bare: Any, prompt: Tensor, text: Tensor) -> Tensor:
    """The bare model's logits [P + T, V] of one row without padding: the embeddings, then the text."""
    embeds = torch.cat((prompt.to(torch.float64), bare.get_input_embeddings()(text)))[None]
    logits: Tensor = bare(inputs_embeds=embeds, use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_each_row_behind_a_soft_prompt_is_what_it_is_alone(name: str, side: str) -> None:
    """Logits, loss and gradient: no padding passes through the states of a row, whichever side it is on."""
    bare, model, batch = make(name), make(name), padded(side)
    handle = prefixcore.attach(model, PROMPT)
    parameter = handle.module.embedding
    prompt = parameter.detach().clone().requires_grad_()
    alone = [row_alone(bare, prompt, text) for text in rows()]
    losses = [
        torch.nn.functional.cross_entropy(logits[P - 1 : -1], text, reduction="sum")
        for logits, text in zip(alone, rows(), strict=True)
    ]
    expected = torch.stack(losses).sum() / sum(LENGTHS)
    expected.backward()
    out = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
    out.loss.backward()
    for row, logits in enumerate(alone):
        close(out.logits[row][batch["attention_mask"][row].bool()], logits[P:])
    close(out.loss, expected)
    close(parameter.grad, prompt.grad)


@pytest.mark.parametrize("config", [PROMPT, PREFIX], ids=["soft prompt", "prefix"])
@pytest.mark.parametrize("name", SOME)
def test_a_conversation_goes_on_from_its_cache(name: str, config: Any) -> None:
    """The second question without reading the first again, of rows padded on the left, too."""
    model, batch = make(name), padded("left")
    prefixcore.attach(model, config)
    first = model.generate(**batch, return_dict_in_generate=True, **options())
    question = torch.cat((first.sequences, rows()[0][:2].expand(len(LENGTHS), -1)), 1)
    more = question.shape[1] - batch["attention_mask"].shape[1]
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, more), value=1)
    got = model.generate(question, attention_mask=mask, past_key_values=first.past_key_values, **options())
    for row in range(len(LENGTHS)):
        alone = question[row][mask[row].bool()][None]
        expected = model.generate(alone, attention_mask=torch.ones_like(alone), use_cache=False, **options())
        assert torch.equal(got[row, -NEW:], expected[0, -NEW:])


@pytest.mark.parametrize("name", SOME)
def test_rows_with_soft_prompts_of_different_lengths(name: str) -> None:
    """Fewer virtual tokens are padding on the left, and none pass through a row's states."""
    model, batch, tasks = make(name), padded("left"), ["long", None, "short", "long"]
    bank = prefixcore.PromptBank(model)
    configs = {
        "long": PROMPT,
        "short": PromptTuningConfig(num_virtual_tokens=2, init="random", seed=1),
    }
    for task, config in configs.items():
        bank.attach(task, config)
    logits, made = model(**batch, task_ids=tasks).logits, model.generate(**batch, task_ids=tasks, **options())
    for row, (task, text) in enumerate(zip(tasks, rows(), strict=True)):
        alone = make(name)
        if task is not None:
            prefixcore.attach(alone, configs[task])
        close(logits[row][batch["attention_mask"][row].bool()], alone(text[None]).logits[0])
        assert torch.equal(made[row, -NEW:], alone.generate(text[None], **options())[0, -NEW:])


@pytest.mark.parametrize("name", SOME)
def test_sequences_are_not_packed(name: str) -> None:
    """The other layers would remember the sequences before, however the batch says that there are several."""
    model = make(name)
    batch = prefixcore.PackedCollator()([{"input_ids": text} for text in rows()])
    handle = prefixcore.attach(model, PREFIX)
    assert not handle.can_pack
    with pytest.raises(NotImplementedError, match="so sequences cannot be packed: pad them"):
        model(**batch)
    with pytest.raises(NotImplementedError, match="so sequences cannot be packed: pad them"):
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    handle.detach()
    assert not prefixcore.attach(model, PROMPT).can_pack
    with pytest.raises(NotImplementedError, match="pad the sequences into rows of their own"):
        model(**batch)


def test_a_token_that_may_not_come_yet_is_no_reason_to_refuse_a_model() -> None:
    """The likeliest token may end the text, and the check's generate goes on with another."""
    model = make("Qwen3_5ForCausalLM", torch.float32)
    model.generation_config.eos_token_id = list(range(3, 90))
    prefixcore.attach(model, PREFIX).detach()


@pytest.mark.parametrize("config", [PROMPT, PREFIX], ids=["soft prompt", "prefix"])
def test_continuous_batching_is_refused_in_words(config: Any) -> None:
    model = make("Lfm2ForCausalLM", torch.float32)
    prefixcore.attach(model, config)
    with pytest.raises(NotImplementedError, match="other layers than attention, whose states no page holds"):
        model.generate_batch([text.tolist() for text in rows()], max_new_tokens=2)


def test_a_prefix_of_pefts_is_refused_as_one_that_fails_in_peft() -> None:
    """Whatever number of layers it is for: PEFT's cache has no place for the states of the other layers."""
    model = make("Lfm2ForCausalLM", torch.float32)
    for num_layers in (None, 1):
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, num_layers=num_layers)
        peft_model = peft.get_peft_model(copy.deepcopy(model), config)
        with pytest.raises(NotImplementedError, match=r"PEFT's own PREFIX_TUNING fails on .*prefixcore.attach"):
            prefixcore.accelerate(peft_model)
