"""TRL's trainers learn from answers of a server that has the virtual tokens as they are at that moment."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset

import prefixcore
from prefixcore.adapters import adapter_digest
from prefixcore.serving.client import ServingError
from tests import tiny
from tests.serving.fake_openai import serving
from tests.serving.sampling_server import SamplingServer, make_model

if sys.version_info < (3, 11):
    pytest.skip("TRL needs Python 3.11", allow_module_level=True)

from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

CONFIGS = {
    "prefix": prefixcore.PrefixTuningConfig(num_virtual_tokens=4, seed=0),
    "mlp": prefixcore.PrefixTuningConfig(num_virtual_tokens=4, seed=0, reparameterization="mlp"),
    "prompt": prefixcore.PromptTuningConfig(num_virtual_tokens=4, seed=0),
    "p-tuning": prefixcore.PTuningConfig(num_virtual_tokens=4, seed=0),
}
COMMON: dict[str, Any] = {
    "max_steps": 3, "report_to": "none", "bf16": False, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
    "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 5, "learning_rate": 0.05,
    "gradient_checkpointing": False, "logging_steps": 1,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ROWS = [{"prompt": f"{'ab' * n} ->"} for n in range(1, 5)]


def many_different(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(set(str(text)))) for text in completions]


def make_trainer(tmp_path: Path, config: Any, kind: Any = GRPOTrainer, rows: Any = ROWS, **options: Any) -> Any:
    handle = prefixcore.attach(make_model(), config)
    arguments = (GRPOConfig if kind is GRPOTrainer else RLOOConfig)(str(tmp_path / "runs"), **{**COMMON, **options})
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    data = {name: Dataset.from_list(rows) for name in ("train_dataset", "eval_dataset")}
    return kind(handle.model, many_different, args=arguments, processing_class=tokenizer, **data)


@pytest.fixture
def server(tmp_path: Path) -> SamplingServer:
    (tmp_path / "adapters").mkdir()
    return SamplingServer(tmp_path / "adapters")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", CONFIGS)
def test_answers_are_those_of_the_virtual_tokens_of_each_step(
    name: str, temperature: float, server: SamplingServer, tmp_path: Path
) -> None:
    """TRL compares the server's log-probabilities with the model's own: they agree, so no correction is needed."""
    trainer = make_trainer(tmp_path, CONFIGS[name], temperature=temperature)
    with serving(server) as url, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        rollouts = prefixcore.ServedRollouts(trainer, url, server.adapters)
        trainer.add_callback(prefixcore.PromptCallback(trainer))
        trainer.model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)  # through which a soft prompt is a prefix too
        before = rollouts.handle.bake()
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "sampling/sampling_logp_difference/max" in entry]
    assert len(logs) == 3
    for entry in logs:
        assert entry["sampling/sampling_logp_difference/max"] < 1e-4
        assert abs(entry["sampling/importance_sampling_ratio/mean"] - 1) < 1e-4
    after = rollouts.handle.bake()
    pairs = [(before, after)] if isinstance(before, torch.Tensor) else zip(before[0], after[0], strict=True)
    assert all((a != b).any() for a, b in pairs)
    sampled = [body for body in server.requests if "repetition_penalty" in body]
    assert [(len(body["prompt"]), body["n"], body["temperature"]) for body in sampled] == [(1, 4, temperature)] * 3


def test_conversations(server: SamplingServer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, CONFIGS["prefix"], rows=[{"prompt": [{"role": "user", "content": "ab"}]}] * 2)
    with serving(server) as url:
        prefixcore.ServedRollouts(trainer, url, server.adapters)
        trainer.train()
    ids = trainer.processing_class.apply_chat_template(
        [{"role": "user", "content": "ab"}], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    assert [body["prompt"] for body in server.requests if "repetition_penalty" in body] == [[ids]] * 3


def test_rloo(server: SamplingServer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, CONFIGS["prefix"], RLOOTrainer, beta=0.0)
    with serving(server) as url:
        rollouts = prefixcore.ServedRollouts(trainer, url, server.adapters)
        before = rollouts.handle.bake()[0][0].clone()
        trainer.train()
    assert (rollouts.handle.bake()[0][0] != before).any()
    assert len(server.requests) >= 3


def test_evaluation_and_settings(server: SamplingServer, tmp_path: Path) -> None:
    options = {"generation_kwargs": {"seed": 7, "stop": "x"}, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "max_steps": 1}
    trainer = make_trainer(tmp_path, CONFIGS["prefix"], **options, eval_strategy="steps", eval_steps=1)
    with serving(server) as url:
        prefixcore.ServedRollouts(trainer, url, server.adapters, name="mine")
        trainer.train()
        trainer.evaluate()
    body = server.requests[-1]
    told = {name: body[name] for name in ("model", "seed", "stop", "top_k", "top_p", "min_p", "max_tokens")}
    assert told == {"model": "mine", "seed": 7, "stop": "x", "top_k": 3, "top_p": 0.5, "min_p": 0.1, "max_tokens": 5}


def test_every_prompt_gets_as_many_answers_as_it_is_there(server: SamplingServer, tmp_path: Path) -> None:
    """Also where a group is divided among processes, so that they are not equally many."""
    trainer = make_trainer(tmp_path, CONFIGS["prefix"])
    prompts = [[5, 6], [5, 6], [7], [8, 9, 10], [8, 9, 10]]
    with serving(server) as url:
        rollouts = prefixcore.ServedRollouts(trainer, url, server.adapters)
        rollouts.sync_weights()
        asked = len(server.requests)
        back, ids, logprobs, of = rollouts.generate(prompts, None, 4)
    assert back == prompts
    assert sorted((body["n"], body["prompt"]) for body in server.requests[asked:]) == [
        (1, [[7]]),
        (2, [[5, 6], [8, 9, 10]]),
    ]
    model = rollouts.handle.model.eval()
    for prompt, made, values, tokens in zip(prompts, ids, logprobs, of, strict=True):
        scores = model(torch.tensor([prompt + made])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        own = scores[range(len(made)), made]
        torch.testing.assert_close(torch.tensor(values)[:, 0], own, rtol=1e-4, atol=1e-5)
        assert [each[0] for each in tokens] == made


def test_log_probabilities_of_another_distribution_are_warned_of(server: SamplingServer, tmp_path: Path) -> None:
    server.processed = False
    trainer = make_trainer(tmp_path, CONFIGS["prefix"], temperature=0.7)
    with serving(server) as url:
        rollouts = prefixcore.ServedRollouts(trainer, url, server.adapters)
        with pytest.warns(UserWarning, match="--logprobs-mode processed_logprobs"):
            rollouts.sync_weights()


@pytest.mark.parametrize("then", ["train", "evaluate"])
def test_values_that_change_between_two_calls_are_sent_again(then: str, server: SamplingServer, tmp_path: Path) -> None:
    """The step is that of the answers before, as where the best values are loaded at the end, or a training begins."""
    trainer = make_trainer(tmp_path, CONFIGS["prefix"], max_steps=1)
    with serving(server) as url:
        rollouts = prefixcore.ServedRollouts(trainer, url, server.adapters)
        getattr(trainer, then)()
        with torch.no_grad():
            for parameter in rollouts.handle.parameters():
                parameter.add_(1.0)
        want = rollouts.handle.bake()
        getattr(trainer, then)()
    with prefixcore.load(make_model(), server.adapters / "rollouts") as sent:
        torch.testing.assert_close(sent.bake(), want)


def test_another_training_with_the_same_name_is_found_out(server: SamplingServer, tmp_path: Path) -> None:
    trainers = [make_trainer(tmp_path, CONFIGS[name]) for name in ("prefix", "prompt")]
    with serving(server) as url:
        one, other = (prefixcore.ServedRollouts(trainer, url, server.adapters) for trainer in trainers)
        one.sync_weights()
        one.generate([[5, 6]], None, 1)
        other.sync_weights()
        with pytest.raises(ServingError, match="does another training have the same name"):
            one.generate([[5, 6]], None, 1)
        other.generate([[5, 6]], None, 1)


def test_what_the_server_does_not_have_is_refused(server: SamplingServer, tmp_path: Path) -> None:
    """Whatever else makes the trainer's model another than the server's."""
    trainer = make_trainer(tmp_path, CONFIGS["prefix"])
    head = trainer.model.lm_head.weight
    with serving(server) as url:
        rollouts = prefixcore.ServedRollouts(trainer, url, server.adapters)
        head.requires_grad_(True)
        with pytest.raises(NotImplementedError, match=r"more is trained .*: lm_head\.weight"):
            rollouts.sync_weights()
        head.requires_grad_(False)
        rollouts.sync_weights()
        rollouts.handle.detach()
        with pytest.raises(ValueError, match="taken off the model"):
            rollouts.sync_weights()
        for trained in (True, False):
            trainer = make_trainer(tmp_path, CONFIGS["prefix"])
            peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), trainer.model)
            for name, weight in trainer.model.named_parameters():
                weight.requires_grad_(trained if "lora" in name else weight.requires_grad)
            with pytest.raises(NotImplementedError, match="lora_A" if trained else "adapter of PEFT's"):
                prefixcore.ServedRollouts(trainer, url, server.adapters)
    of_peft = peft.get_peft_model(make_model(), peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    prefixcore.accelerate(of_peft)
    trainer.model = of_peft
    with pytest.raises(NotImplementedError, match="runs a PeftModel's"):
        prefixcore.ServedRollouts(trainer, "http://127.0.0.1:9", server.adapters)


def test_names(server: SamplingServer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, CONFIGS["prefix"])
    kept = prefixcore.attach(make_model(), CONFIGS["prefix"]).save(server.adapters / "kept")
    before = adapter_digest(kept)
    with serving(server) as url:
        for name in ("", "..", "a/b", ".hidden"):
            with pytest.raises(ValueError, match="name: expected that of a folder"):
                prefixcore.ServedRollouts(trainer, url, server.adapters, name=name)
        with pytest.raises(ValueError, match="'base' is a model of the server's own"):
            prefixcore.ServedRollouts(trainer, url, server.adapters, name="base")
        with pytest.raises(ValueError, match="kept is an adapter that would be lost"):
            prefixcore.ServedRollouts(trainer, url, server.adapters, name="kept")
        assert not trainer.use_vllm
        prefixcore.ServedRollouts(trainer, url, server.adapters).sync_weights()
        again = make_trainer(tmp_path, CONFIGS["prompt"])
        prefixcore.ServedRollouts(again, url, server.adapters).sync_weights()  # what a training before left
    assert adapter_digest(kept) == before


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"generation_kwargs": {"do_sample": False, "stop": "x"}}, "generation_kwargs: do_sample would not be heeded"),
        ({"generation_kwargs": {"n": 2}}, "generation_kwargs: n would not be heeded"),
        ({"loss_type": "vespo"}, "wants vllm_importance_sampling_mode .* got 'sequence_mask'"),
    ],
)
def test_settings_that_would_be_wrong(options: Any, why: str, server: SamplingServer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, CONFIGS["prefix"], **options)
    with pytest.raises(ValueError, match=why):
        prefixcore.ServedRollouts(trainer, "http://127.0.0.1:9", server.adapters)


def test_a_trainer_that_asks_for_answers_otherwise(server: SamplingServer) -> None:
    """TRL's OnlineDPOTrainer has no length of completions, and a client of its own."""
    other = SimpleNamespace(use_vllm=False, temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0)
    with pytest.raises(TypeError, match="such as GRPOTrainer"):
        prefixcore.ServedRollouts(other, "http://127.0.0.1:9", server.adapters)


def test_distillation(server: SamplingServer, tmp_path: Path) -> None:
    handle = prefixcore.attach(make_model(), CONFIGS["prefix"])
    options = {name: value for name, value in COMMON.items() if name != "num_generations"}
    trainer = DistillationTrainer(
        handle.model, make_model(), args=DistillationConfig(str(tmp_path / "runs"), **options),
        processing_class=tiny.tokenizer(), train_dataset=Dataset.from_list(ROWS),
    )  # fmt: skip
    before = handle.bake()[0][0]
    with serving(server) as url:
        prefixcore.ServedRollouts(trainer, url, server.adapters)
        trainer.train()
    assert [len(body["prompt"]) * body["n"] for body in server.requests if "repetition_penalty" in body] == [4] * 3
    assert (handle.bake()[0][0] != before).any()


def test_refusals(server: SamplingServer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, CONFIGS["prefix"])
    with pytest.raises(ServingError, match="nothing listens there"):
        prefixcore.ServedRollouts(trainer, "http://127.0.0.1:9", server.adapters)
    assert not trainer.use_vllm
    with pytest.raises(TypeError, match="such as GRPOTrainer, got object"):
        prefixcore.ServedRollouts(object(), "http://127.0.0.1:9", server.adapters)
    with serving(server) as url:
        rollouts = prefixcore.ServedRollouts(trainer, url, server.adapters)
        with pytest.raises(ValueError, match="leave use_vllm off"):
            prefixcore.ServedRollouts(trainer, url, server.adapters)
        with pytest.raises(NotImplementedError, match="images"):
            rollouts.generate([[5]], [["picture"]], 1)
        trainer = make_trainer(tmp_path, prefixcore.PrefixTuningConfig(num_virtual_tokens=4, layers=[0]))
        rollouts = prefixcore.ServedRollouts(trainer, url, server.adapters)
        with pytest.raises(ServingError, match="cannot be served"):
            rollouts.sync_weights()
        trainer = make_trainer(tmp_path, CONFIGS["prefix"])
        rollouts = prefixcore.ServedRollouts(trainer, url, tmp_path / "elsewhere", name="other")
        with pytest.raises(ServingError, match="is .*elsewhere the folder that it serves"):
            rollouts._wait_for("0" * 64, patience=0.1)
        in_text = prefixcore.PromptTuningConfig(num_virtual_tokens=2, virtual_token_ids=[5, 6])
        with pytest.raises(NotImplementedError, match="no prefix is equal"):
            prefixcore.ServedRollouts(make_trainer(tmp_path, in_text), url, server.adapters)
    handle = prefixcore.attach(tiny.model(), CONFIGS["prefix"])
    handle.detach()
    trainer = GRPOTrainer(
        handle.model, many_different, args=GRPOConfig(str(tmp_path / "runs"), **COMMON),
        train_dataset=Dataset.from_list(ROWS), processing_class=tiny.tokenizer(),
    )  # fmt: skip
    with pytest.raises(ValueError, match="nothing is attached"):
        prefixcore.ServedRollouts(trainer, "http://127.0.0.1:9", server.adapters)
