"""`prefixcore train`: kept values, early stopping, conversations, other files, trackers."""

from __future__ import annotations

import csv
import json
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prefixcore.adapters import read_adapter, read_record
from tests import tiny
from tests.training.test_chat import CHATML

METHOD = ("--method", "prefix", "--num-virtual-tokens", 3)


@pytest.fixture
def turning(train, tmp_path):
    """`turning(*options)`: a training of 35 steps whose held-out loss is the least at the fifteenth."""
    (tmp_path / "train.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"{letter} ->", "completion": " zzz"}) for letter in "abcdefgh")
    )
    (tmp_path / "test.jsonl").write_text('{"prompt": "x ->", "completion": " azq"}')
    data = ("--data", tmp_path / "train.jsonl", "--eval-data", tmp_path / "test.jsonl")
    how = ("--steps", 35, "--lr", 1.0, "--eval-every", 5)
    return lambda *options, **where: train(*METHOD, *data, *how, *options, **where)


def kept(folder):
    """The step that was kept, and the held-out losses by step."""
    record = read_record(folder)
    return record["kept_step"], dict(record["held_out_loss"])


def test_the_best_values_are_saved_unless_the_last_are_asked_for(turning, tmp_path):
    code, _, err = turning()
    assert code == 0, err
    step, losses = kept(tmp_path / "adapter")
    assert losses[step] == min(losses.values())
    assert 0 < step < 35
    assert f"kept the values of step {step}, whose held-out loss is the least" in err
    manifest = read_adapter(tmp_path / "adapter").manifest
    assert manifest.training["kept_step"] == step
    assert manifest.training["keep"] == "best"
    assert manifest.metrics["loss"] == pytest.approx(losses[step], rel=1e-4)
    code, _, err = turning("--keep", "last", out=tmp_path / "last")
    assert kept(tmp_path / "last") == (35, losses)
    assert "kept" not in err
    assert read_adapter(tmp_path / "last").manifest.metrics["loss"] == pytest.approx(losses[35], rel=1e-4)


def test_early_stopping(turning, tmp_path):
    code, _, err = turning("--early-stopping-patience", 2)
    assert code == 0, err
    step, losses = kept(tmp_path / "adapter")
    assert max(losses) == step + 10
    assert f"stopped early after {step + 10} of 35 steps: the last 2 held-out losses" in err


@pytest.mark.parametrize("option", [("--keep", "best"), ("--early-stopping-patience", 2)])
def test_what_goes_by_held_out_examples_needs_some(train, tmp_path, option):
    code, _, err = train(*METHOD, "--eval-fraction", 0, *option)
    assert code == 2
    assert f"{option[0]} {option[1]} goes by held-out examples, and there are none" in err
    assert train(*METHOD, "--eval-fraction", 0)[0] == 0
    assert read_adapter(tmp_path / "adapter").manifest.training["keep"] == "last"


@pytest.fixture
def chat(tmp_path):
    """A model with a chat template, and conversations."""
    folder = tiny.folder(tmp_path / "chat-model")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}"}]} for n in range(9)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder, tmp_path / "chat.jsonl"


def test_conversations_are_trained_on_and_verified(prefixcore, chat, tmp_path):
    model, data = chat
    base = ["--model", model, "--data", data, "--chat", *METHOD, "--steps", 4, "--eval-fraction", 0.3]
    base += ["--license", "MIT", "--intended-use", "A test."]
    code, out, err = prefixcore("train", *base, "--out", tmp_path / "adapter")
    assert code == 0, err
    assert out.startswith("3 held-out examples")
    manifest = read_adapter(tmp_path / "adapter").manifest
    assert manifest.training["chat"] is True
    verify = ["verify", tmp_path / "adapter", "--model", model, "--data", data]
    code, out, err = prefixcore(*verify)
    assert code == 0, out + err
    assert "on 3 held-out examples; the training data is the manifest's" in out


def test_generate_asks_as_the_adapter_was_trained(prefixcore, chat, tmp_path):
    """The prompt is written by the template, unless that is said otherwise."""
    model, data = chat
    base = ["--model", model, "--data", data, "--chat", *METHOD, "--steps", 4, "--eval-fraction", 0]
    assert prefixcore("train", *base, "--out", tmp_path / "adapter")[0] == 0
    ask = ["generate", "--model", model, "--adapter", tmp_path / "adapter", "--max-new-tokens", 5, "--json"]
    answers = {}
    for name, options in {
        "default": ["--prompt", "7?"],
        "chat": ["--prompt", "7?", "--chat"],
        "plain": ["--prompt", "7?", "--no-chat"],
        "by hand": ["--prompt", "[user]7?\n[assistant]", "--no-chat"],
    }.items():
        code, out, err = prefixcore(*ask, *options)
        assert code == 0, err
        answers[name] = json.loads(out)["completion"]
    assert answers["default"] == answers["chat"] == answers["by hand"]
    assert answers["plain"] != answers["chat"]


def test_going_on_with_another_kind_of_data_is_said(prefixcore, chat, data, tmp_path):
    model, conversations = chat
    how = ["--model", model, "--steps", 2, "--eval-fraction", 0]
    kinds = {"chat": ["--data", conversations, "--chat"], "plain": ["--data", data]}
    for name, kind in kinds.items():
        assert prefixcore("train", *how, *kind, *METHOD, "--out", tmp_path / name)[0] == 0
    for name in kinds:
        for now, kind in kinds.items():
            code, _, err = prefixcore("train", *how, *kind, "--resume", tmp_path / name, "--out", tmp_path / "more")
            assert code == 0, err
            assert ("was trained on" in err) is (name != now)


def test_a_model_without_a_template_is_refused(train, chat, tmp_path):
    code, _, err = train(*METHOD, "--chat", "--data", chat[1], "--end", "\n")
    assert code == 2
    assert "--end cannot be given with --chat" in err


def test_no_template_is_one_clear_line(prefixcore, chat, tmp_path, model_folder):
    code, _, err = prefixcore(
        "train", "--model", model_folder, "--data", chat[1], "--chat", *METHOD, "--out", tmp_path / "adapter"
    )
    assert code == 2
    assert f"--model {model_folder}: the model's tokenizer has no chat template" in err
    assert not (tmp_path / "adapter").exists()


def test_csv_trains_the_same_adapter(train, data, tmp_path):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    with (tmp_path / "swap.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["completion", "prompt"])
        writer.writeheader()
        writer.writerows(rows)
    assert train(*METHOD)[0] == 0
    assert train(*METHOD, "--data", tmp_path / "swap.csv", out=tmp_path / "csv")[0] == 0
    one, two = (read_adapter(tmp_path / name) for name in ("adapter", "csv"))
    assert one.manifest.data["sha256"] == two.manifest.data["sha256"]
    values = [tmp_path / name / "adapter_model.safetensors" for name in ("adapter", "csv")]
    assert values[0].read_bytes() == values[1].read_bytes()


def test_a_tracker_gets_the_run(train, tmp_path):
    code, out, err = train(*METHOD, "--report-to", "tensorboard", "--logging-dir", tmp_path / "runs")
    assert code == 0, err
    assert out.startswith("2 held-out examples")
    [run] = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"adapter-\d{8}-\d{6}", run.name)
    events = EventAccumulator(str(run)).Reload()
    logged = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    record = read_record(tmp_path / "adapter")
    assert logged["train/loss"] == [(step, pytest.approx(loss)) for step, loss in record["train_loss"]]
    assert logged["eval/loss"] == [(step, pytest.approx(loss)) for step, loss in record["held_out_loss"]]
    assert logged["eval/kept_loss"] == [(8, pytest.approx(record["held_out"]["after training"]["loss"]))]
    for layer in (0, 1):
        shares = logged[f"eval/prefix_attention/layer_{layer}"]
        assert [step for step, _ in shares] == [step for step, _ in record["held_out_loss"]]
        assert all(0 < share < 1 for _, share in shares)
        assert len(logged[f"train/prefix_norm/layer_{layer}"]) == 8
        assert all(value > 0 for _, value in logged[f"train/prefix_grad_norm/layer_{layer}"])


def test_a_tracker_that_is_not_known(train, tmp_path):
    code, _, err = train(*METHOD, "--report-to", "excel")
    assert code == 2
    assert "--report-to: no tracker is called 'excel': one of tensorboard, mlflow, wandb, trackio" in err
    assert not (tmp_path / "adapter").exists()


def test_held_out_losses_that_are_no_numbers(train, tmp_path, monkeypatch):
    """None is the least of them: the last step's values are kept, and this is said."""
    monkeypatch.setattr("prefixcore.training.loop.held_out_loss", lambda *args, **options: float("nan"))
    code, _, err = train(*METHOD, "--eval-every", 4)
    assert code == 0, err
    assert "warning: no held-out loss was a number, so none is the best, and the last step's values are kept" in err
    assert read_record(tmp_path / "adapter")["kept_step"] == 8
    assert train(*METHOD, "--keep", "last", out=tmp_path / "last")[0] == 0
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("adapter", "last")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("method", ["start", "store_init_configuration", "log", "finish"])
def test_a_tracker_that_fails(train, tmp_path, monkeypatch, method):
    """At its start before anything is trained; later the training goes on without it."""

    def fail(self, *args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(f"accelerate.tracking.TensorBoardTracker.{method}", fail)
    code, _, err = train(*METHOD, "--report-to", "tensorboard", "--logging-dir", tmp_path / "runs")
    if method in ("start", "store_init_configuration"):
        assert code == 2
        assert "--report-to: tensorboard does not start: no route" in err
        assert not (tmp_path / "adapter").exists()
    else:
        assert code == 0, err
        assert err.count("warning: tensorboard failed (no route); the training goes on without it") == 1
        assert read_record(tmp_path / "adapter")["kept_step"] > 0


def test_held_out_examples_that_are_known_are_said(train, data, tmp_path):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    others = [rows[0], {**rows[1], "completion": " no"}, {"prompt": "new ->", "completion": " wen"}]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, others)))
    code, _, err = train("--method", "prompt", "--init", "vocab", "--steps", 1, "--eval-data", tmp_path / "test.jsonl")
    assert code == 0, err
    assert f"warning: 1 examples of {tmp_path / 'test.jsonl'} are in {data} too" in err
    assert f"warning: 1 examples of {tmp_path / 'test.jsonl'} have a prompt of {data} and another completion" in err
