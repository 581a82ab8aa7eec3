"""What is wrong with a command line is one line on standard error and exit code 2, and Ctrl-C never tells a lie."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from prefixcore import _interrupt
from prefixcore.adapters import read_adapter, read_record, replace
from prefixcore.cli import failures, output
from prefixcore.cli import train as train_command
from tests import tiny
from tests.cli.fixtures import *  # noqa: F403

ROOT = Path(__file__).parents[2]
NEW = ("--method", "prompt", "--num-virtual-tokens", 2)


@pytest.fixture
def refused(prefixcore):
    """`refused(*arguments)` -> the one line of an error: exit code 2, no results, no traceback."""

    def call(*arguments):
        code, out, err = prefixcore(*arguments)
        assert (code, out) == (2, ""), err
        assert "Traceback" not in err
        line = err.splitlines()[-1]
        assert line.startswith("prefixcore ")
        assert ": error: " in line
        assert err.isascii() or line.isprintable()
        return line

    return call


@pytest.fixture
def refused_training(refused, model_folder, data, tmp_path):
    """`refused_training(*options)` -> the same of `train`, with a model, data and `--out`, which stays unwritten."""

    def call(*options):
        base = ["train", "--model", model_folder, "--data", data, "--out", tmp_path / "out", "--steps", 2]
        line = refused(*base, *(NEW if "--resume" not in options else ()), *options)
        assert not (tmp_path / "out").exists()
        return line

    return call


@pytest.fixture
def refused_generation(refused, model_folder, adapter):
    def call(*options):
        return refused("generate", "--model", model_folder, "--adapter", adapter, "--max-new-tokens", 3, *options)

    return call


def copy(folder: Path, target: Path, name: str, contents: object) -> Path:
    """A copy of a folder in which the entry `name` is something else."""
    shutil.copytree(folder, target)
    path = target / name
    path.unlink(missing_ok=True)
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    elif isinstance(contents, str):
        path.symlink_to(contents)
    elif contents is os.mkfifo or contents is os.mkdir:
        contents(path)
    return target


# Devices, seeds and other values.


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "mps", "xla", "meta", "hpu", "toaster", ""])
def test_a_device_that_is_not_there(refused_training, refused_generation, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is there")
    assert "cannot be used" in refused_training("--device", device)
    assert "cannot be used" in refused_generation("--device", device, "--prompt", "a")


@pytest.mark.parametrize("seed", [2**63, 2**64, 10**30, "9" * 5000, -1])
def test_seeds_that_no_generator_takes(refused_training, refused_generation, seed):
    assert "--seed" in refused_training("--seed", seed)
    assert "--seed" in refused_generation("--seed", seed, "--prompt", "a", "--sample")


@pytest.mark.parametrize(
    "options",
    [
        ["--sample", "--temperature", "1e-300"],
        ["--sample", "--temperature", "1e300"],
        ["--sample", "--temperature", "nan"],
        ["--sample", "--top-p", "nan"],
        ["--num-beams", 10**9],
        ["--max-new-tokens", 10**15],
        ["--max-new-tokens", 10**30],
        ["--end", "é"],  # not in the vocabulary, so that it can never be seen
        ["--end", "\udcff"],
    ],
)
def test_values_that_cannot_be_generated_with(refused_generation, options):
    refused_generation("--prompt", "a", *options)


def test_the_coldest_temperature_takes_the_likeliest_token(prefixcore, model_folder, adapter):
    base = ["generate", "--model", model_folder, "--adapter", adapter, "--prompt", "av ->", "--max-new-tokens", 5]
    assert prefixcore(*base, "--sample", "--temperature", "1e-6") == prefixcore(*base)


@pytest.mark.parametrize(
    "options",
    [
        ["--lr", "inf"],
        ["--weight-decay", "nan"],
        ["--epochs", "1e308"],
        ["--end", "é"],
        ["--end", "\udcff"],
        ["--init", "text", "--init-text", "\udcff"],
        ["--num-virtual-tokens", 10**30],
        ["--layers", "9" * 5000],
    ],
)
def test_values_that_cannot_be_trained_with(refused, model_folder, data, tmp_path, options):
    steps = [] if "--epochs" in options else ["--steps", 2]
    base = ["train", "--model", model_folder, "--data", data, "--out", tmp_path / "out", "--method", "prompt", *steps]
    refused(*base, *options)
    assert not (tmp_path / "out").exists()


def test_a_training_that_diverges_saves_nothing(refused, model_folder, data, tmp_path):
    base = ["train", "--model", model_folder, "--data", data, "--out", tmp_path / "out", *NEW, "--lr", "1e38"]
    line = refused(*base, "--steps", 1, "--eval-fraction", 0, "--weight-decay", "1e30")
    assert "NaN or infinite" in line
    assert list(tmp_path.iterdir()) == []


# Data and text.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{"prompt": "a", "completion": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1: nested too deep"),
        (b'{"prompt": "a", "completion": "b", "n": ' + b"9" * 10_000 + b"}", "line 1: not valid JSON"),
        (b'{"prompt": "a\\ud800", "completion": "b"}', "'prompt' holds half of a character"),
        (b'{"prompt": "a", "completion": "\\udfff"}', "'completion' holds half of a character"),
        (b'{"prompt": "\xe9", "completion": "b"}', "not UTF-8"),
        (b'{"\\u001b[2J\\u009b": "a"}', "(found: \\x1b[2J\\x9b)"),
        (b"\0\0\0", "line 1: not valid JSON"),
    ],
)
def test_data_that_is_no_text(refused_training, tmp_path, text, expected):
    (tmp_path / "data.jsonl").write_bytes(text)
    assert expected in refused_training("--data", tmp_path / "data.jsonl")


@pytest.mark.parametrize("path", ["/proc/self/mem", "/dev/zero", "/", "x" * 5000, "\udcff"])
def test_data_that_cannot_be_read(refused_training, path):
    refused_training("--data", path)
    refused_training("--eval-data", path)


@pytest.fixture(scope="module")
def vocabulary_of_one(tmp_path_factory, model_folder) -> Path:
    """The tiny model with a tokenizer that knows the letter a and no more."""
    folder = copy(model_folder, tmp_path_factory.mktemp("one") / "model", "tokenizer.json", None)
    backend = Tokenizer(models.WordLevel({"a": 2}, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vocabulary_too_large(tmp_path_factory, model_folder) -> Path:
    """The tiny model with a tokenizer whose ids begin where the model's end, padding included."""
    folder = copy(model_folder, tmp_path_factory.mktemp("large") / "model", "tokenizer.json", None)
    words = {"<end>": 500, **{character: 200 + i for i, character in enumerate(tiny.CHARACTERS)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<end>").save_pretrained(folder)
    return folder


def test_text_that_the_tokenizer_cannot_encode(refused_training, refused_generation, vocabulary_of_one):
    assert "cannot be encoded" in refused_training("--model", vocabulary_of_one)
    assert "--init-text cannot be encoded" in refused_training("--model", vocabulary_of_one, "--init-text", "b")
    assert "prompt 2 cannot be encoded" in refused_generation(
        "--model", vocabulary_of_one, "--prompt", "a", "--prompt", "b"
    )
    assert "not UTF-8" in refused_generation("--prompt", "a\udce9")


def test_ids_beyond_the_table(refused_training, refused_generation, vocabulary_too_large):
    for options in ([], ["--init-text", "b"]):
        assert "the model's vocabulary has 98" in refused_training("--model", vocabulary_too_large, *options)
    assert "prompt 1 has the token id" in refused_generation("--model", vocabulary_too_large, "--prompt", "a")


def test_a_padding_id_beyond_the_table_is_not_used(train, prefixcore, model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    assert tokenizer.pad_token_id == 98
    tokenizer.save_pretrained(folder)
    code, _, err = train(*NEW, "--model", folder, "--eval-fraction", 0.5)
    assert code == 0, err
    prompts = ["--prompt", "a", "--prompt", "abc"]
    assert prefixcore("generate", "--model", folder, "--adapter", tmp_path / "adapter", *prompts)[0] == 0


def test_standard_input_that_is_no_text(refused_generation, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xe9\n"), encoding="utf-8"))
    assert "standard input is not UTF-8 text" in refused_generation()
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xe9\n"), encoding="ascii", errors="surrogateescape")
    )
    assert "not UTF-8" in refused_generation()
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed" in refused_generation()


# Lengths, and absurd work.


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> dict[str, Path]:
    """Models with a table of 32 positions: a family that is known, and one that is not."""
    torch.manual_seed(0)
    found = {
        "gpt2": GPT2LMHeadModel(
            GPT2Config(vocab_size=98, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
        ),
        "opt": OPTForCausalLM(
            OPTConfig(
                vocab_size=98, max_position_embeddings=32, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64,
                num_hidden_layers=2, num_attention_heads=4, bos_token_id=0, eos_token_id=0, pad_token_id=0,
            )
        ),
    }  # fmt: skip
    folders = {}
    for name, model in found.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        tiny.tokenizer().save_pretrained(folders[name])
    return folders


@pytest.mark.filterwarnings("ignore:'opt' is not among the families")
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_texts_up_to_the_last_position_and_not_beyond(train, prefixcore, learned, tmp_path, name):
    """Every way to share 30 positions between prompt and completion is trained on and evaluated; 31 are refused."""
    fits = [{"prompt": "a" * n, "completion": "b" * (29 - n)} for n in range(1, 29)]
    for file, examples in {"fits": fits, "over": [*fits, {"prompt": "c" * 29, "completion": "d"}]}.items():
        (tmp_path / file).write_text("".join(json.dumps(example) + "\n" for example in examples))
    base = [*NEW, "--model", learned[name], "--steps", 2, "--eval-fraction", 0.5]
    assert train(*base, "--data", tmp_path / "fits")[0] == 0
    for limit in ([], ["--max-length", 100]):  # a table has no more rows, whoever insists
        code, _, err = train(*base, "--data", tmp_path / "over", *limit, "--eval-fraction", 0)
        assert code == 2
        assert "line 29: 31 tokens, more than the 30 that 2 virtual ones leave" in err.splitlines()[-1]
    code, _, err = train(*base, "--data", tmp_path / "over", "--skip-too-long")
    assert code == 0, err
    assert "left out 1 of" in err

    base = ["generate", "--model", learned[name], "--adapter", tmp_path / "adapter", "--json", "--end", ""]
    alone = prefixcore(*base, "--prompt", "b")[1]
    code, out, err = prefixcore(*base, "--prompt", "a" * 29, "--prompt", "b")  # one token fits, and 29
    assert code == 0, err
    completions = [json.loads(line)["completion"] for line in out.splitlines()]
    assert len(completions[0]) <= 1
    assert completions[1] == json.loads(alone)["completion"]
    code, _, err = prefixcore(*base, "--prompt", "a" * 30)
    assert code == 2
    assert "leave no room" in err.splitlines()[-1]


def test_a_model_that_computes_positions_reads_longer_texts_if_someone_insists(train, tmp_path, data):
    long = tmp_path / "long.jsonl"
    long.write_text(data.read_text() + json.dumps({"prompt": "a" * 150, "completion": "b"}) + "\n")
    code, _, err = train(*NEW, "--data", long)
    assert code == 2
    assert "line 26: 152 tokens, more than the 126" in err.splitlines()[-1]
    assert "--max-length" in err.splitlines()[-1]
    assert train(*NEW, "--data", long, "--max-length", 200)[0] == 0


def test_absurd_work_is_refused_at_once(refused_training, refused_generation, tmp_path, data):
    began = time.perf_counter()
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "a" * 10_000_000, "completion": "b"}) + "\n" + data.read_text())
    assert "line 1: 10,000,001 characters" in refused_training("--data", long, "--eval-fraction", 0)
    assert "10,000,000 characters" in refused_training("--init-text", "a" * 10_000_000)
    assert "leave no room" in refused_training("--init-text", "a" * 200, "--num-virtual-tokens", 200)
    assert "1,000,000,000 virtual tokens" in refused_training("--num-virtual-tokens", 10**9)
    assert "100,000 characters" in refused_generation("--prompt", "a" * 100_000)
    assert time.perf_counter() - began < 60  # of which reading 10 MB as tokens would take more


def test_a_prompt_beyond_what_the_model_was_made_for_is_said(prefixcore, model_folder, adapter):
    base = ["generate", "--model", model_folder, "--adapter", adapter, "--max-new-tokens", 2]
    code, _, err = prefixcore(*base, "--prompt", "a" * 200)
    assert code == 0
    assert "warning: prompt 1: 200 tokens and 9 virtual ones are more than the 128 positions" in err


def test_too_little_memory_is_one_line(refused_training):
    line = refused_training("--method", "p-tuning", "--encoder-hidden-size", 10**13)
    assert "out of memory (" in line
    assert "bytes were wanted" in line


# Models.


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize(
    "contents", [None, b"", b"\xff" * 3000, b"[1]", b"[" * 100_000, os.mkdir, os.mkfifo, "/dev/zero", "loop"]
)
def test_broken_model_folders(refused_training, refused_generation, model_folder, tmp_path, name, contents):
    if contents == "loop":
        contents = name
    folder = copy(model_folder, tmp_path / "model", name, contents)
    assert str(folder) in refused_training("--model", folder)
    assert str(folder) in refused_generation("--model", folder, "--prompt", "a")


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "bert"},
        {"model_type": "t5"},
        {"model_type": "gpt2"},
        {"model_type": "nonsense"},
        {"model_type": 5},
        {"hidden_size": 64},
        {"hidden_size": "wide"},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 0},
        {"vocab_size": 50},
        {"hidden_act": "nonsense"},
        {"dtype": "float99"},
        {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}},
    ],
    ids=str,
)
def test_models_that_their_weights_do_not_fit(refused_training, model_folder, tmp_path, fields):
    config = json.loads((model_folder / "config.json").read_text())
    folder = copy(model_folder, tmp_path / "model", "config.json", json.dumps({**config, **fields}).encode())
    assert f"--model {folder}" in refused_training("--model", folder)


# Places to write to.


@pytest.mark.parametrize(
    "out", ["", ".", "./", "..", "x/..", "/", "/proc/x", "/dev/null/x", "x" * 250, "x" * 5000, "\udcff"]
)
def test_places_that_no_adapter_can_have(refused, model_folder, data, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_command, "open_model", None)  # it is known before
    refused("train", "--model", model_folder, "--data", data, f"--out={out}", *NEW)
    refused("train", "--model", model_folder, "--data", data, f"--out={tmp_path}", *NEW)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_nobody_may_write_to(refused_training, tmp_path, monkeypatch):
    def mkdir(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(train_command, "open_model", None)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert "cannot be written: Permission denied" in refused_training()


def test_a_disk_that_is_full_at_the_end(train, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(replace, "_write", full)
    code, out, err = train(*NEW)
    assert (code, out) == (2, "")
    assert "No space left on device (" in err.splitlines()[-1]
    assert "as it was before, or the new adapter, whole" in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


# Records and manifests.


@pytest.mark.parametrize("name", ["training.json", "prefixcore_manifest.json", "adapter_config.json"])
@pytest.mark.parametrize("contents", [os.mkfifo, os.mkdir, "/dev/zero", b"\xff", b"[]", b"[" * 100_000, b" " * 2**23])
def test_damaged_records(refused, refused_training, refused_generation, adapter, tmp_path, name, contents):
    folder = copy(adapter, tmp_path / "adapter", name, contents)
    assert name in refused("inspect", folder)
    assert name in refused_generation("--adapter", folder, "--prompt", "a")
    assert name in refused_training("--resume", folder)


def changed(folder: Path, target: Path, name: str, **fields: object) -> Path:
    values = {**json.loads((folder / name).read_text()), **fields}
    return copy(folder, target, name, json.dumps(values).encode())


@pytest.mark.parametrize(
    "fields",
    [
        {"end": 5},
        {"end": ["a"]},
        {"split": 7},
        {"split": {"seed": "a", "fraction": 0.1}},
        {"split": {"seed": 2**70, "fraction": 0.1}},
        {"split": {"seed": 1, "fraction": 10**400}},
        {"held_out": {"bare model": {"loss": 10**400, "exact_match": 0, "examples": 2}}},
        {"held_out": [1]},
        {"held_out": {"bare model": {"loss": "low", "exact_match": 0, "examples": 1}}},
        {"train_loss": 5},
    ],
    ids=str,
)
def test_records_of_wrong_types(refused, refused_training, refused_generation, adapter, tmp_path, fields):
    folder = changed(adapter, tmp_path / "adapter", "training.json", **fields)
    assert "training.json" in refused("inspect", folder)
    assert "training.json" in refused_generation("--adapter", folder, "--prompt", "a")
    assert "training.json" in refused_training("--resume", folder)


def test_a_split_that_no_generator_made_is_as_none(train, adapter, tmp_path):
    folder = changed(adapter, tmp_path / "earlier", "training.json", split={"seed": -1, "fraction": 0.5})
    code, _, err = train("--resume", folder, "--steps", 1)
    assert code == 0, err
    assert "warning: what is held out now" in err


def test_numbers_that_are_none_are_shown_as_they_are(prefixcore, adapter, tmp_path):
    scores = {"loss": float("nan"), "exact_match": float("inf"), "examples": 2}
    folder = changed(adapter, tmp_path / "adapter", "training.json", held_out={"bare model": scores})
    code, out, err = prefixcore("inspect", folder)
    assert (code, err) == (0, "")
    assert "loss nan, exact match inf% of 2" in out


def test_nothing_from_a_file_steers_the_terminal(prefixcore, adapter, tmp_path):
    evil = "\x1b[2J\x9b31m\u202e\x07\ud800"
    folder = changed(
        adapter, tmp_path / "adapter", "training.json",
        data=evil, held_out={evil: {"loss": 1.0, "exact_match": 0.5, "examples": 2}},
    )  # fmt: skip
    manifest = json.loads((adapter / "prefixcore_manifest.json").read_text())
    manifest["task"] = evil + "\nmethod  forged"
    manifest["libraries"][evil] = evil
    manifest["base_model"]["name_or_path"] = evil
    (folder / "prefixcore_manifest.json").write_text(json.dumps(manifest))
    code, table, err = prefixcore("inspect", folder)
    assert (code, err) == (0, "")
    assert table.replace("\n", "").isprintable()
    assert table.count("\\x1b[2J\\x9b31m\\u202e\\x07\\ud800") == 6
    assert not any(line.startswith("method  forged") for line in table.splitlines())
    code, text, _ = prefixcore("inspect", folder, "--json")
    assert code == 0
    assert text.replace("\n", "").isprintable()
    facts = json.loads(text)
    assert facts["task"] == manifest["task"]
    assert facts["training"]["data"] == evil


def test_answers_are_raw_in_a_file_and_escaped_on_a_terminal(prefixcore, model_folder, adapter, monkeypatch):
    monkeypatch.setattr("prefixcore.training.predict", lambda *args, **kwargs: ["\x1b[2Jgone\x9b"])
    base = ["generate", "--model", model_folder, "--adapter", adapter, "--prompt", "a"]
    assert prefixcore(*base)[1] == "\x1b[2Jgone\x9b\n"
    line = prefixcore(*base, "--json")[1].rstrip("\n")
    assert line.isprintable()
    assert json.loads(line)["completion"] == "\x1b[2Jgone\x9b"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert prefixcore(*base)[1] == "\\x1b[2Jgone\\x9b\n"


def test_a_record_that_is_nested_as_deep_as_can_be_read(prefixcore, adapter, tmp_path):
    text = json.dumps({**json.loads((adapter / "training.json").read_text()), "options": "HERE"})
    codes = []
    for depth in (100, 300, 500, 900, 3000):
        deep = text.replace('"HERE"', "[" * depth + "]" * depth).encode()
        folder = copy(adapter, tmp_path / str(depth), "training.json", deep)
        for options in ([], ["--json"]):
            code, _, err = prefixcore("inspect", folder, *options)
            codes.append(code)
            assert (code, err) == (0, "") or (code == 2 and len(err.splitlines()) == 1)
    assert set(codes) == {0, 2}


# Standard output.


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")], ids=str)
def test_results_that_cannot_be_printed(train, adapter, tmp_path, capsys, monkeypatch, error):
    class Closed(io.StringIO):
        encoding = "utf-8"

        def write(self, text):
            raise error

    monkeypatch.setattr(sys, "stdout", Closed())
    code, _, err = train(*NEW)
    assert code == 2
    assert f"standard output cannot be written: {error.strerror} (the adapter is in {tmp_path}" in err.splitlines()[-1]
    assert read_adapter(tmp_path / "adapter").config.num_virtual_tokens == 2


def test_a_closed_standard_output_is_known_before_training(train, tmp_path, monkeypatch):
    monkeypatch.setattr(train_command, "open_model", None)
    monkeypatch.setattr(sys, "stdout", None)
    code, _, err = train(*NEW)
    assert code == 2
    assert "standard output is closed" in err
    assert list(tmp_path.iterdir()) == []


def shell(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A line of bash in which `$1` is Python and `"${@:2}"` what is given to `prefixcore`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)
    line = ["bash", "-c", command, "bash", sys.executable, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ('"$1" -m prefixcore "${@:2}" | true; exit ${PIPESTATUS[0]}', "cannot be written: Broken pipe"),
        ('"$1" -m prefixcore "${@:2}" >/dev/full', "cannot be written: No space left on device"),
        ('"$1" -m prefixcore "${@:2}" >&-', "standard output is closed"),
    ],
)
def test_standard_output_for_real(adapter, command, expected):
    done = shell(command, "inspect", adapter)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("prefixcore inspect: error: standard output")
    assert expected in line


def test_output_in_another_encoding(monkeypatch):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding="ascii"))
    for text in ("é\x9b", "\U0001f600\ud800"):
        written = output.to_json({"a": text})
        assert written.isascii()
        assert json.loads(written) == {"a": text}


# Which failures are bugs.


def test_bugs_still_show_where_they_are(train, monkeypatch):
    for error in (ValueError("a bug"), RuntimeError("a bug"), RecursionError("a bug"), KeyError("a bug")):
        monkeypatch.setattr(train_command, "read_examples", lambda arguments, error=error: _raise(error))
        with pytest.raises(type(error), match="a bug"):
            train(*NEW)


def _raise(error):
    raise error


def test_what_is_not_installed_is_named():
    assert "pip install" in failures.message(ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib"))
    assert failures.message(ModuleNotFoundError("No module named 'x'", name="prefixcore.x")) is None


# Ctrl-C.


def interrupted(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("prefixcore.cli.train.open_model", "nothing was written"),
        ("prefixcore.training.train", "nothing was written"),
        ("prefixcore.training.draw_curve", "nothing was written"),
        ("prefixcore.adapters.replace.recover", "as it was before, or the new adapter, whole"),
        ("prefixcore.adapters.replace._write", "as it was before, or the new adapter, whole"),
        ("prefixcore.adapters.replace._put_in_place", "as it was before, or the new adapter, whole"),
        ("prefixcore.adapters.replace.remove_leftovers", "as it was before, or the new adapter, whole"),
        ("prefixcore.cli.train.results", "the adapter is in"),
    ],
)
@pytest.mark.parametrize("earlier", [True, False], ids=["over an earlier one", "new"])
def test_what_ctrl_c_says_is_true(train, adapter, tmp_path, monkeypatch, where, said, earlier):
    out = tmp_path / "adapter"
    if earlier:
        shutil.copytree(adapter, out)
    monkeypatch.setattr(where, interrupted)
    code, printed, err = train(*NEW)
    assert (code, printed) == (130, "")
    line = err.splitlines()[-1]
    assert line.startswith("prefixcore train: stopped; ")
    assert said in line
    assert [path.name for path in tmp_path.iterdir()] == (["adapter"] if out.exists() else [])
    if not out.exists():
        assert not earlier
        assert "adapter is in" not in line
        return
    tokens, record = read_adapter(out).config.num_virtual_tokens, read_record(out)
    assert tokens in ((9, 2) if earlier else (2,))
    assert len(record["train_loss"]) == {9: 3, 2: 8}[tokens]
    if "nothing" in said:
        assert tokens == 9
    if "adapter is in" in line:
        assert tokens == 2


@pytest.mark.parametrize("when", ["saving", "scoring"])
def test_ctrl_c_after_the_adapter_is_written(train, tmp_path, monkeypatch, when):
    """The second save, with the scores after training, or what comes before it."""
    calls = []
    place = "prefixcore.adapters.replace._write" if when == "saving" else "prefixcore.training.evaluate"
    module, _, name = place.rpartition(".")
    original = getattr(sys.modules[module], name)

    def later(*args, **kwargs):
        if (tmp_path / "adapter").exists():
            raise KeyboardInterrupt
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(place, later)
    code, _, err = train(*NEW)
    assert calls
    assert code == 130
    assert err.splitlines()[-1] == f"prefixcore train: stopped; the adapter is in {tmp_path / 'adapter'}"
    assert read_adapter(tmp_path / "adapter").config.num_virtual_tokens == 2
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.fixture
def handler(monkeypatch):
    """The handler of the command line's own process, which says so in place of ending the process."""

    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    def write(number, data):
        return sys.stderr.write(data.decode()) if number == 2 else original(number, data)

    original = os.write
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(os, "write", write)
    _interrupt.take_over()
    yield Ended
    signal.signal(signal.SIGINT, before)


def ctrl_c(*args: object, **kwargs: object) -> None:
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_ends_the_process_at_once(train, handler, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_command, "open_model", ctrl_c)
    with pytest.raises(handler, match="130"):
        train(*NEW)
    assert capsys.readouterr().err == "\nprefixcore train: stopped; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_a_save_waits_and_a_second_one_takes_it_back(train, handler, adapter, tmp_path, monkeypatch):
    original = replace._put_in_place

    def once(new, target):
        ctrl_c()
        original(new, target)

    def twice(new, target):
        ctrl_c()
        ctrl_c()
        original(new, target)

    out = tmp_path / "adapter"
    shutil.copytree(adapter, out)
    for place, tokens, said in ((twice, 9, f"{out} is as it was before, or the new"), (once, 2, "the adapter is in")):
        monkeypatch.setattr(replace, "_put_in_place", place)
        code, _, err = train(*NEW)
        assert code == 130
        assert said in err.splitlines()[-1]
        assert read_adapter(out).config.num_virtual_tokens == tokens
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_program_of_its_own_keeps_its_handler(prefixcore, adapter):
    before = signal.getsignal(signal.SIGINT)
    prefixcore("inspect", adapter)
    assert signal.getsignal(signal.SIGINT) is before
    assert not _interrupt.is_command_line()


@pytest.mark.parametrize("attempts", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_ctrl_c_at_random_early_moments(model_folder, data, adapter, tmp_path, attempts):
    """Imports, opening the model, a training of three steps, the end: never a traceback, an abort or a lie."""
    generator = random.Random(attempts)
    out = tmp_path / "new"
    commands = [
        ["doctor"],
        ["generate", "--model", model_folder, "--adapter", adapter, "--prompt", "a", "--max-new-tokens", 2],
        ["train", "--model", model_folder, "--data", data, "--out", out, *NEW, "--steps", 3],
    ]
    codes = []
    for attempt in range(attempts):
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "prefixcore", *map(str, commands[attempt % 3])]
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            time.sleep(generator.uniform(0.3, 6.0))  # Python itself starts in less
            process.send_signal(signal.SIGINT)
            try:
                _, err = process.communicate(timeout=120)
            finally:
                process.kill()
        codes.append(process.returncode)
        # Killed by the signal: before Python was there to handle it, or when all was done.
        assert process.returncode in (0, 130, -signal.SIGINT), err
        assert "Traceback" not in err
        assert "terminate called" not in err
        assert [path for path in tmp_path.iterdir() if path != out] == []
        if process.returncode == 130:
            said = err.splitlines()[-1]
            assert "stopped" in said
            if "nothing was" in said:
                assert not out.exists()
            if "adapter is in" in said or "saved what there is" in said:
                assert read_adapter(out).config.num_virtual_tokens == 2
        if out.exists():
            assert read_record(out)["train_loss"]
    assert 130 in codes
