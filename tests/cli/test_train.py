"""`prefixcore train`: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
from peft import PeftModel

import prefixcore as package
from prefixcore.__main__ import parser
from prefixcore.adapters import read_adapter
from prefixcore.cli.common import open_model
from tests import tiny


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("method", "options", "numbers"),
    [
        ("prefix", ["--init-text", "ab ->"], 2 * 2 * 2 * 16 * 5),
        ("prefix", ["--num-virtual-tokens", 3, "--layers", "1", "--num-frozen-tokens", 1], 2 * 2 * 16 * 2),
        ("prefix", ["--num-virtual-tokens", 3, "--reparameterization", "random_basis", "--num-basis", 12], 12),
        ("prompt", ["--num-virtual-tokens", 4], 4 * 32),
        ("prompt", ["--init-text", "swap: "], 6 * 32),
        ("p-tuning", ["--num-virtual-tokens", 2, "--encoder-hidden-size", 8], None),
    ],
)
def test_trains_saves_and_evaluates(train, tmp_path, method, options, numbers):
    code, out, err = train("--method", method, *options)
    assert code == 0, err
    folder = tmp_path / "adapter"
    assert {"adapter_model.safetensors", "curve.png", "training.json"} <= set(files(folder))
    assert read_adapter(folder).config.method == method
    if numbers is not None:
        assert f"{numbers:,} numbers to train" in err
    record = json.loads((folder / "training.json").read_text())
    assert len(record["train_loss"]) == 8
    assert list(record["held_out"]) == ["bare model", "at the start", "after training"]
    assert record["held_out"]["bare model"]["examples"] == 2
    assert not record["interrupted"]
    rows = [line.split("  ")[0] for line in out.splitlines()]
    assert rows == ["2 held-out examples", "bare model", "at the start", "after training"]


def test_ctrl_c_in_the_last_validation_is_heeded_once_the_adapter_is_saved(train, tmp_path, monkeypatch):
    from prefixcore.training import loop

    real, measured = loop.held_out_loss, []

    def held_out_loss(*arguments, **options):
        measured.append(1)
        if len(measured) == 3:  # before the first step, at the fifth, and behind the last
            signal.raise_signal(signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(loop, "held_out_loss", held_out_loss)
    code, out, err = train("--method", "prompt", "--num-virtual-tokens", 4, "--eval-every", 5)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == f"prefixcore train: stopped; the adapter is in {tmp_path / 'adapter'}"
    record = json.loads((tmp_path / "adapter" / "training.json").read_text())
    assert [step for step, _ in record["held_out_loss"]] == [0, 5, 8]
    assert list(record["held_out"]) == ["bare model", "at the start"]


def test_learns(train, tmp_path):
    options = ["--init", "vocab", "--num-virtual-tokens", 8]
    code, _, err = train("--method", "prompt", *options, "--steps", 120, "--lr", 0.05)
    assert code == 0, err
    held_out = json.loads((tmp_path / "adapter" / "training.json").read_text())["held_out"]
    assert held_out["after training"]["loss"] < held_out["at the start"]["loss"] - 0.1


def test_the_same_seed_gives_the_same_bytes(train, tmp_path):
    for name in ("one", "two"):
        assert train("--method", "prefix", "--num-virtual-tokens", 3, out=tmp_path / name)[0] == 0
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_peft_opens_what_was_trained_and_answers_alike(train, tmp_path, model_folder, prefixcore):
    assert train("--method", "prefix", "--init-text", "ab ->")[0] == 0
    tokenizer, model = tiny.tokenizer(), tiny.model()
    wrapped = PeftModel.from_pretrained(model, tmp_path / "adapter")
    inputs = tokenizer("cy ->", return_tensors="pt")
    ids = wrapped.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    code, out, _ = prefixcore(
        "generate", "--model", model_folder, "--adapter", tmp_path / "adapter",
        "--prompt", "cy ->", "--max-new-tokens", 6, "--end", "", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["completion"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_training_goes_on_from_an_adapter(train, prefixcore, tmp_path, model_folder, data):
    options = ["--reparameterization", "low_rank", "--rank", 2, "--num-virtual-tokens", 4]
    assert train("--method", "prefix", *options, "--steps", 20)[0] == 0
    first = json.loads((tmp_path / "adapter" / "training.json").read_text())
    code, _, err = train("--resume", tmp_path / "adapter", "--lr", 0.002, "--seed", 9, out=tmp_path / "more")
    assert code == 0, err
    assert "warning" not in err  # another seed, but the same examples are held out
    more = json.loads((tmp_path / "more" / "training.json").read_text())
    assert more["held_out"]["at the start"] == first["held_out"]["after training"]
    assert read_adapter(tmp_path / "more").config.reparameterization == "low_rank"


def test_going_on_warns_when_other_examples_would_be_held_out(train, tmp_path):
    assert train("--method", "prompt", "--num-virtual-tokens", 2)[0] == 0
    resume = ["--resume", tmp_path / "adapter", "--steps", 1]
    assert "warning: what is held out now" in train(*resume, "--eval-fraction", 0.5, out=tmp_path / "more")[2]
    (tmp_path / "adapter" / "training.json").unlink()
    assert "warning: what is held out now" in train(*resume, out=tmp_path / "more")[2]


def test_an_adapter_is_replaced_and_anything_else_is_left_alone(train, tmp_path):
    assert train("--method", "prompt", "--num-virtual-tokens", 2)[0] == 0
    assert train("--method", "prompt", "--num-virtual-tokens", 3)[0] == 0
    assert read_adapter(tmp_path / "adapter").config.num_virtual_tokens == 3
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter-1.txt").write_text("irreplaceable")
    code, _, err = train("--method", "prompt", out=other)
    assert code == 2
    assert "is no adapter" in err
    assert files(other) == ["chapter-1.txt"]


def test_held_out_data_of_its_own(train, tmp_path, data):
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text('{"prompt": "fv ->", "completion": " vf"}\n' + data.read_text().splitlines()[0])
    code, out, err = train("--method", "prompt", "--num-virtual-tokens", 2, "--eval-data", held_out)
    assert code == 0, err
    assert out.startswith("2 held-out examples")
    assert "25 examples to train on, 2 held out" in err
    assert "warning: 1 examples of" in err


def test_no_held_out_data_means_no_evaluation(train, tmp_path):
    code, out, err = train("--method", "prompt", "--num-virtual-tokens", 2, "--eval-fraction", 0)
    assert (code, out) == (0, "")
    assert "25 examples to train on, 0 held out" in err
    assert json.loads((tmp_path / "adapter" / "training.json").read_text())["held_out"] == {}


def test_long_examples_stop_or_are_left_out(train, tmp_path, data):
    longer = tmp_path / "longer.jsonl"
    longer.write_text(data.read_text() + '{"prompt": "a long one ->", "completion": " gnol"}\n')
    options = ["--method", "prompt", "--num-virtual-tokens", 2, "--data", longer, "--eval-fraction", 0]
    code, _, err = train(*options, "--max-length", 12)
    assert code == 2
    assert f"{longer}, line 26: 19 tokens, more than the limit of 12" in err
    code, _, err = train(*options, "--max-length", 12, "--skip-too-long")
    assert code == 0
    assert "left out 1 of 26 examples" in err
    code, _, err = train(*options, "--max-length", 3, "--skip-too-long")
    assert code == 2
    assert "no example has at most 3 tokens" in err


def message(err):
    """The one line of an error."""
    lines = err.splitlines()
    assert "Traceback" not in err
    assert lines[-1].startswith("prefixcore train: error: ")
    return lines[-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "no such file"),
        ("", "no examples"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', "line 2: not valid JSON"),
        ('{"prompt": "a"}', "line 1: the field 'completion' is missing"),
        ('{"prompt": "a", "completion": "b"}', "too few to hold any out"),
    ],
)
def test_bad_data_is_one_clear_line(train, tmp_path, text, expected):
    path = tmp_path / "bad.jsonl"
    if text is not None:
        path.write_text(text)
    code, _, err = train("--method", "prompt", "--data", path)
    assert code == 2
    assert expected in message(err)
    assert str(path) in message(err) or "examples have" in message(err)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "--method is missing"),
        (["--method", "prompt", "--layers", "0"], "--layers is for --method prefix, not prompt"),
        (["--method", "prefix", "--encoder-reparameterization-type", "LSTM"], "is for --method p-tuning, not prefix"),
        (["--method", "prefix", "--init", "text"], "init_text"),
        (["--method", "prefix", "--layers", "5"], "layer 5"),
        (["--method", "prompt", "--epochs", "0"], "--epochs must be above 0"),
        (["--method", "prompt", "--lr", "-1"], "learning_rate must be above 0"),
        (["--method", "prompt", "--eval-fraction", "1.5"], "held-out fraction"),
        (["--method", "prompt", "--device", "toaster"], "toaster"),
        (["--method", "prefix", "--lr", "1e30", "--weight-decay", "1e30"], "try a lower learning rate"),
        (["--method", "prompt", "--resume", "x"], "--method cannot be given with --resume"),
        (["--resume", "x", "--init-text", "a"], "--init-text cannot be given with --resume"),
        (["--resume", "no-such-adapter"], "no-such-adapter"),
    ],
)
def test_bad_options_are_one_clear_line(prefixcore, model_folder, data, tmp_path, options, expected):
    steps = [] if "--epochs" in options else ["--steps", 4]
    out = tmp_path / "adapter"
    code, _, err = prefixcore("train", "--model", model_folder, "--data", data, "--out", out, *steps, *options)
    assert code == 2
    assert expected in message(err)
    assert not out.exists()


def test_a_model_that_is_not_there(train, tmp_path):
    code, _, err = train("--method", "prompt", "--model", tmp_path / "nothing")
    assert code == 2
    assert "is not a folder; expected the folder of a transformers model" in message(err)
    empty = tmp_path / "empty"
    empty.mkdir()
    code, _, err = train("--method", "prompt", "--model", empty)
    assert code == 2
    assert "has no config.json" in message(err)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_model(train, tmp_path, model_folder, name):
    damaged = tmp_path / "damaged"
    shutil.copytree(model_folder, damaged)
    (damaged / name).write_bytes((damaged / name).read_bytes()[:100])
    code, _, err = train("--method", "prompt", "--model", damaged)
    assert code == 2
    what = "is not whole: its config.json asks for" if name == "model.safetensors" else "cannot be opened"
    assert f"--model {damaged} {what}" in message(err)


def test_an_encoder_decoder(train, tmp_path):
    """transformers would open its decoder alone, or list every other model."""
    code, _, err = train("--method", "prefix", "--model", tiny.encoder_decoder_folder(tmp_path / "bart"))
    assert code == 2
    assert "is an encoder-decoder (bart), and the commands are for causal language models" in message(err)


def test_an_unwritable_place(train, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        code, _, err = train("--method", "prompt", out=out)
        assert code == 2
        assert str(tmp_path / "file") in message(err)
    assert (tmp_path / "file").read_text() == "x"


def test_dtype_is_that_of_the_weights(model_folder):
    base = ["generate", "--model", str(model_folder), "--adapter", "x"]
    model, _ = open_model(parser().parse_args([*base, "--dtype", "bfloat16", "--device", "cpu"]))
    assert model.dtype == torch.bfloat16
    assert not model.training


def test_help_is_quick_and_whole(prefixcore):
    code, out, _ = prefixcore("train", "--help")
    assert code == 0
    for word in ("--init-text", "--eval-fraction", "--resume", "--reparameterization"):
        assert word in out
    code, out, _ = prefixcore("--version")
    assert out == f"prefixcore {package.__version__}\n"


def test_without_a_start_the_training_examples_are_the_start(train, tmp_path, data):
    code, _, err = train("--method", "prefix")
    assert code == 0, err
    assert "starting from some of the examples to train on" in err
    config = read_adapter(tmp_path / "adapter").config
    assert (config.init, config.num_virtual_tokens) == ("text", 63)  # seven whole examples of nine tokens
    lines = {"{prompt}{completion}".format(**json.loads(line)) for line in data.read_text().splitlines()}
    assert set(config.init_text.splitlines()) <= lines
    assert train("--method", "prompt", "--num-virtual-tokens", 11, out=tmp_path / "more")[0] == 0
    assert read_adapter(tmp_path / "more").config.num_virtual_tokens == 11


@pytest.mark.parametrize(
    ("longest", "options", "virtual"),
    [
        (20, [], 63),  # half of the 128 positions, in whole examples
        (100, [], 27),  # what it leaves, in whole examples
        (100, ["--max-length", 128], 27),  # positions of a table are all there are
        (100, ["--skip-too-long"], 63),
        (100, ["--num-virtual-tokens", 20], 20),
    ],
)
def test_a_start_of_examples_leaves_room_for_the_longest(longest, options, virtual, prefixcore, tmp_path, data):
    """A GPT-2 of 128 learned positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 98, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "attn_pdrop": 0.0}
    GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=0, bos_token_id=0)).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    longer = {"prompt": "a" * (longest - 4) + " ->", "completion": ""}
    longer["completion"] = "b"[: longest - len(longer["prompt"])] or "b"
    examples = tmp_path / "data.jsonl"
    examples.write_text(data.read_text() + json.dumps(longer) + "\n")
    base = ["train", "--model", tmp_path / "model", "--data", examples, "--out", tmp_path / "adapter", "--end", "\\n"]
    code, _, err = prefixcore(*base, "--steps", 1, "--method", "prefix", "--eval-fraction", 0, *options)
    assert code == 0, err
    assert read_adapter(tmp_path / "adapter").config.num_virtual_tokens == virtual
    assert ("left out 1 of 26 examples" in err) == ("--skip-too-long" in options)


def test_what_is_held_out_is_never_in_the_start(train, tmp_path, data):
    held_out = tmp_path / "held-out.jsonl"
    lines = data.read_text().splitlines()
    held_out.write_text("\n".join(lines[:20]))
    kept = tmp_path / "kept.jsonl"
    kept.write_text("\n".join(lines[20:]))
    code, _, err = train("--method", "prompt", "--data", kept, "--eval-data", held_out)
    assert code == 0, err
    text = read_adapter(tmp_path / "adapter").config.init_text
    asked = [json.loads(line)["prompt"] for line in lines[:20]]
    assert text
    assert not [prompt for prompt in asked if prompt in text]


def test_a_start_that_is_given_is_taken(train, tmp_path):
    code, _, err = train("--method", "prefix", "--init", "vocab")
    assert code == 0, err
    assert "starting from" not in err
    config = read_adapter(tmp_path / "adapter").config
    assert (config.init, config.init_text, config.num_virtual_tokens) == ("vocab", None, 20)


def test_an_adapter_is_not_written_into_another(train, adapter):
    """Which then is none that can be replaced."""
    code, _, err = train("--method", "prefix", "--init-text", "ab", out=adapter / "new")
    assert code == 2
    assert f"would be in {adapter}, which is an adapter and has no subfolders" in err
    assert not (adapter / "new").exists()
