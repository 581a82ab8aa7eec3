"""TRL: packed and padding-free batches, masks, a reference that is no second copy, answers that the model writes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

import prefixcore
from prefixcore.training import weights_digest
from prefixcore.training.chat import Conversation
from prefixcore.training.data import IGNORED
from prefixcore.training.messages import check_messages
from tests import tiny

if sys.version_info < (3, 11):
    pytest.skip("TRL needs Python 3.11", allow_module_level=True)

from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

CONFIGS = {
    "prefix": prefixcore.PrefixTuningConfig(num_virtual_tokens=4, seed=0),
    "prompt": prefixcore.PromptTuningConfig(num_virtual_tokens=4, seed=0),
}
COMMON: dict[str, Any] = {
    "max_steps": 2, "report_to": "none", "bf16": False, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
    "per_device_train_batch_size": 4, "learning_rate": 0.01, "gradient_checkpointing": False, "logging_steps": 1,
}  # fmt: skip
PAIRS = [{"prompt": f"{'ab' * n} ->", "completion": f" {'cd' * (5 - n)}"} for n in range(1, 5)]


def attach(name: str) -> Any:
    return prefixcore.attach(tiny.model(), CONFIGS[name])


def gradients(handle: Any) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in handle.parameters()]
    for parameter in handle.parameters():
        parameter.grad = None
    return found


def one_by_one(handle: Any, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """The mean loss of the labels, each row by itself, by the model's own forward."""
    total, count = torch.zeros(()), 0
    for ids, labels in rows:
        logits = handle.model(torch.tensor([ids])).logits[0, :-1]
        targets = torch.tensor(labels[1:])
        total = total + torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        count += int((targets != IGNORED).sum())
    return total / count


@pytest.mark.parametrize(
    "how", [{"packing": True, "max_length": 48}, {"padding_free": True, "max_length": None}, {}], ids=str
)
@pytest.mark.parametrize("name", CONFIGS)
def test_sft_has_the_loss_and_the_gradients_of_rows_by_themselves(name: str, how: Any, tmp_path: Path) -> None:
    handle = attach(name)
    digest = weights_digest(handle.model)
    tokenizer = tiny.tokenizer()
    trainer = SFTTrainer(
        handle.model,
        SFTConfig(str(tmp_path), **COMMON, **how),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["input_ids"].shape[0] == 1) == bool(how), "packed into one row"
    handle.model.eval()
    loss = trainer.compute_loss(handle.model, dict(batch))
    loss.backward()
    got = gradients(handle)
    rows = []
    for pair in PAIRS:
        prompt = tokenizer(pair["prompt"])["input_ids"]
        answer = [*tokenizer(pair["completion"])["input_ids"], tokenizer.eos_token_id]
        rows.append((prompt + answer, [IGNORED] * len(prompt) + answer))
    expected = one_by_one(handle, rows)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(got, gradients(handle), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    trainer.add_callback(prefixcore.PromptCallback(trainer))
    trainer.train()
    assert weights_digest(handle.model) == digest
    norm = "prefix_attention/layer_0" if name == "prefix" else "prompt_norm"
    assert [log["step"] for log in trainer.state.log_history if norm in log] == [1, 2]


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("packing", [False, True])
def test_sft_on_the_assistants_turns_alone(packing: bool, tmp_path: Path) -> None:
    """The loss is that of the conversations as `prefixcore train --chat` reads them."""
    roles = ("user", "assistant", "user", "assistant")
    texts = [("hi", "ho", "a?", "b!"), ("what", "that", "why", "so")]
    messages = [[{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)] for turns in texts]
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    handle = attach("prefix")
    trainer = SFTTrainer(
        handle.model,
        SFTConfig(str(tmp_path), **COMMON, assistant_only_loss=True, packing=packing, max_length=128),
        train_dataset=Dataset.from_list([{"messages": each} for each in messages]),
        processing_class=tokenizer,
    )
    loss = trainer.compute_loss(handle.model.eval(), dict(next(iter(trainer.get_train_dataloader()))))
    rows = []
    for each in messages:
        ids = Conversation.of(check_messages(each, "messages"), "here").to_ids(tokenizer, None)
        rows.append((ids.prompt_ids + ids.completion_ids, ids.labels))
    torch.testing.assert_close(loss, one_by_one(handle, rows), rtol=1e-5, atol=1e-6)


PREFERENCES = [
    {"prompt": "open?", "chosen": " yes, please", "rejected": " no"},
    {"prompt": "more?", "chosen": " one more", "rejected": " never again"},
    {"prompt": "again?", "chosen": " sure", "rejected": " stop it"},
]


WHICH = ("chosen", "rejected")


def log_probability(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    prompt_ids = tokenizer(prompt)["input_ids"]
    answer_ids = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + answer_ids])).logits[0]
    scores = logits.log_softmax(-1)[len(prompt_ids) - 1 : -1]
    return float(scores.gather(1, torch.tensor(answer_ids)[:, None]).sum())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_reference_of_dpo_is_the_bare_model(name: str, tmp_path: Path) -> None:
    handle, tokenizer = attach(name), tiny.tokenizer()
    digest = weights_digest(handle.model)
    arguments = DPOConfig(str(tmp_path), **COMMON, precompute_ref_log_probs=True)
    with handle.disabled():
        trainer = DPOTrainer(
            handle.model, args=arguments, train_dataset=Dataset.from_list(PREFERENCES), processing_class=tokenizer
        )
    assert trainer.ref_model is None, "no second copy"
    bare = tiny.model()
    for row, told in zip(trainer.train_dataset, PREFERENCES, strict=True):
        for which in WHICH:
            expected = log_probability(bare, tokenizer, told["prompt"], told[which])
            assert row[f"ref_{which}_logps"] == pytest.approx(expected, rel=1e-5)
            attached_one = log_probability(handle.model, tokenizer, told["prompt"], told[which])
            assert abs(attached_one - expected) > 1e-3, "the virtual tokens make a difference"
    trainer.train()
    first = trainer.state.log_history[0]
    # Before the first step the margin is that of the virtual tokens' start over the bare model.
    start = attach(name).model

    def margin(model: Any, row: dict[str, str]) -> float:
        chosen, rejected = (log_probability(model, tokenizer, row["prompt"], row[w]) for w in WHICH)
        return chosen - rejected

    margins = [arguments.beta * (margin(start, row) - margin(bare, row)) for row in PREFERENCES]
    assert first["rewards/margins"] == pytest.approx(sum(margins) / len(margins), rel=1e-3, abs=1e-5)
    assert weights_digest(handle.model) == digest


@pytest.mark.parametrize("name", CONFIGS)
def test_the_reference_of_kto_is_the_bare_model(name: str, tmp_path: Path) -> None:
    handle, tokenizer = attach(name), tiny.tokenizer()
    rows = [{"prompt": r["prompt"], "completion": r[w], "label": w == "chosen"} for r in PREFERENCES for w in WHICH]
    with handle.disabled():
        trainer = KTOTrainer(
            handle.model,
            args=KTOConfig(str(tmp_path), **COMMON, precompute_ref_log_probs=True),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    assert trainer.ref_model is None, "no second copy"
    for row, told in zip(trainer.train_dataset, rows, strict=True):
        expected = log_probability(tiny.model(), tokenizer, told["prompt"], told["completion"])
        assert row["ref_logps"] == pytest.approx(expected, rel=1e-5)
    check_training(trainer, handle)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_reward_model_trains_its_head_and_the_virtual_tokens(name: str, tmp_path: Path) -> None:
    base = tiny.folder(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    handle = prefixcore.attach(model, replace(CONFIGS[name], modules_to_save=("score",)))
    rows = [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in PREFERENCES]
    trainer = RewardTrainer(
        model, RewardConfig(str(tmp_path), **COMMON), train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    assert any("score" in key for key, parameter in model.named_parameters() if parameter.requires_grad)
    check_training(trainer, handle)


def check_training(trainer: Any, handle: Any) -> None:
    """All that is trained moves, and nothing else does."""
    before = {key: value.detach().clone() for key, value in handle.model.named_parameters()}
    trainer.add_callback(prefixcore.PromptCallback(trainer))
    trainer.train()
    for key, value in handle.model.named_parameters():
        assert torch.equal(value, before[key]) != value.requires_grad, key


PROMPTS = {
    "texts": ["2 + 3 =", "a b"],
    "conversations": [[{"role": "user", "content": text}] for text in ("2 + 3 =", "a b")],
}


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize(("name", "which"), [("prefix", "grpo"), ("prompt", "grpo"), ("prefix", "rloo")])
def test_answers_that_the_model_writes_and_a_function_judges(
    name: str, which: str, prompts: str, tmp_path: Path
) -> None:
    handle, tokenizer = attach(name), tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    seen = []

    def many_letters(completions: list[Any], **_: Any) -> list[float]:
        texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
        seen.extend(texts)
        return [float(len(set(text))) for text in texts]

    config, kind = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[which]
    arguments = config(str(tmp_path), **COMMON, num_generations=4, max_completion_length=6, beta=0.0)
    rows = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS[prompts]])
    trainer = kind(handle.model, many_letters, args=arguments, train_dataset=rows, processing_class=tokenizer)
    check_training(trainer, handle)
    assert len(seen) == 8
    trainer.use_vllm = True
    with pytest.raises(ValueError, match="answers of another model"):
        prefixcore.PromptCallback(trainer)
    norm = "prefix_attention/layer_0" if name == "prefix" else "prompt_norm"
    measured = [log for log in trainer.state.log_history if norm in log]
    assert [log["step"] for log in measured] == [1, 2]
    if name == "prefix":
        fresh = attach(name)
        inputs = [_ids(tokenizer, prompt) for prompt in PROMPTS[prompts]]
        expected = prefixcore.measure(fresh, [{"input_ids": ids} for ids in inputs])
        assert measured[0][norm] == pytest.approx(expected[norm], abs=0.02), "of the prompts, one step from the start"


@pytest.mark.parametrize("how", [{}, {"cast_lm_head_to_fp32": True}, {"bf16": True}], ids=str)
@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_answers_written_by_continuous_batching(name: str, how: dict[str, Any], tmp_path: Path) -> None:
    handle, tokenizer = attach(name), tiny.tokenizer()
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    seen = {}

    def no_judge(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.update(zip(prompts, completion_ids, strict=True))
        return [float(i) for i in range(len(prompts))]

    expected, bare = {}, {}
    if how.get("bf16"):  # to which TRL casts all that it is given
        handle.model.to(torch.bfloat16)
    for prompt in PROMPTS["texts"]:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
        expected[prompt] = handle.model.generate(ids, **given)[0, ids.shape[1] :].tolist()
        with handle.disabled():
            bare[prompt] = handle.model.generate(ids, **given)[0, ids.shape[1] :].tolist()
    arguments = GRPOConfig(
        str(tmp_path), **{**COMMON, "max_steps": 1, **how}, num_generations=4, max_completion_length=6, beta=0.0,
        top_k=1, use_transformers_continuous_batching=True,
        transformers_continuous_batching_config={"num_blocks": 64, "max_batch_tokens": 64},
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS["texts"]])
    trainer = GRPOTrainer(handle.model, no_judge, args=arguments, train_dataset=rows, processing_class=tokenizer)
    if how.get("bf16"):  # in which the gradients of equal answers cancel out
        trainer.train()
    else:
        check_training(trainer, handle)
    assert len(seen) >= 1
    for prompt, ids in seen.items():
        assert ids == expected[prompt][: len(ids)] != bare[prompt][: len(ids)]


def _ids(tokenizer: Any, prompt: Any) -> torch.Tensor:
    if isinstance(prompt, list):
        prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return torch.tensor([tokenizer(prompt)["input_ids"]])
