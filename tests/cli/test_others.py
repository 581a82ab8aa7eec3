"""`prefixcore generate`, `inspect` and `doctor`."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model

from prefixcore.adapters import read_adapter
from prefixcore.backends import library
from prefixcore.cli import doctor
from prefixcore.cli.inspect import ranges
from prefixcore.ops import explain
from tests import tiny


@pytest.fixture
def generate(prefixcore, model_folder, adapter):
    def call(*options):
        return prefixcore("generate", "--model", model_folder, "--adapter", adapter, *options)

    return call


def test_one_line_for_each_prompt(generate, monkeypatch):
    code, out, _ = generate("--prompt", "av ->", "--prompt", "bw ->", "--max-new-tokens", 4)
    assert code == 0
    assert len(out.splitlines()) == 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("av ->\n\nbw ->\n"))
    assert generate("--max-new-tokens", 4) == (0, out, "2 of 2 answers were cut at 4 tokens (--max-new-tokens)\n")


def test_a_line_break_that_is_none_is_said(generate):
    """Other options read it as one; a prompt may be a program's text."""
    said = r"warning: a --prompt holds \n, a backslash and an n"
    assert said in generate("--prompt", r"av\nbw ->", "--max-new-tokens", 1)[2]
    assert said not in generate("--prompt", "av\nbw ->", "--max-new-tokens", 1)[2]


def test_the_model_that_the_adapter_names(prefixcore, adapter, model_folder, tmp_path):
    given = ("generate", "--prompt", "av ->", "--max-new-tokens", 4)
    code, expected, _ = prefixcore(*given, "--adapter", adapter, "--model", model_folder)
    code, out, err = prefixcore(*given, "--adapter", adapter)
    assert (code, out) == (0, expected)
    assert err.splitlines()[0] == f"base model  {model_folder}, as the adapter says"
    unnamed = tmp_path / "unnamed"
    get_peft_model(tiny.model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        unnamed
    )
    code, out, err = prefixcore(*given, "--adapter", unnamed)
    assert (code, out) == (2, "")
    assert "--model is missing, and the adapter names no base model" in err


def test_json_keeps_prompt_and_completion(generate):
    code, out, _ = generate("--prompt", "av ->", "--json", "--max-new-tokens", 4)
    assert code == 0
    record = json.loads(out)
    assert record["prompt"] == "av ->"
    assert 0 < len(record["completion"]) <= 4


def test_sampling_follows_the_seed(generate):
    options = ["--prompt", "av ->", "--sample", "--temperature", 2.0, "--json", "--max-new-tokens", 12]
    first, again, other = (generate(*options, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other


def test_beam_search(generate):
    assert generate("--prompt", "av ->", "--num-beams", 3, "--max-new-tokens", 4)[0] == 0


def test_the_adapter_makes_a_difference_and_nothing_stays_behind(adapter):
    from prefixcore.hf import load

    tokenizer, model = tiny.tokenizer(), tiny.model()
    ids = tokenizer("av ->", return_tensors="pt")["input_ids"]
    bare = model(ids).logits
    with load(model, adapter):
        assert not torch.allclose(model(ids).logits, bare)
    assert torch.equal(model(ids).logits, bare)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--prompt", ""], "prompt 1 is empty"),
        (["--prompt", "a", "--prompt", ""], "prompt 2 is empty"),
        (["--prompt", "a", "--temperature", 0.5], "with --sample only"),
        (["--prompt", "a", "--sample", "--temperature", 0], "--temperature must be above 0"),
        (["--prompt", "a", "--sample", "--top-p", 1.5], "--top-p must be"),
        (["--prompt", "a", "--adapter", "nowhere"], "nowhere is not a folder"),
        (["--prompt", "a", "--model", "./nowhere"], "--model ./nowhere is not a folder"),
    ],
)
def test_errors_are_one_clear_line(generate, options, expected):
    code, out, err = generate(*options)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("prefixcore generate: error: ")
    assert expected in line


def test_another_model_is_refused(generate, tmp_path):
    other = tmp_path / "other"
    tiny.model(seed=1).save_pretrained(other)
    tiny.tokenizer().save_pretrained(other)
    code, out, err = generate("--prompt", "a", "--model", other)
    assert (code, out) == (2, "")
    assert "weights" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_inspect_says_what_an_adapter_is(prefixcore, adapter):
    code, out, err = prefixcore("inspect", adapter)
    assert (code, err) == (0, "")
    for text in ("prefix", "9, 1,152 numbers", "2 layers (0-1), 2 key/value heads of 16", "'ab -> ba\\n'"):
        assert text in out
    assert "31,008 parameters" in out
    assert "3 steps on" in out
    assert "held out, after training" in out


def test_inspect_as_json_holds_everything(prefixcore, adapter):
    code, out, _ = prefixcore("inspect", adapter, "--json")
    facts = json.loads(out)
    values = [tensor for pair in read_adapter(adapter).tensors for tensor in pair]
    assert code == 0
    assert facts["numbers"] == sum(tensor.numel() for tensor in values) == 1152
    assert facts["norm"] == pytest.approx(torch.cat([v.flatten() for v in values]).norm().item(), rel=1e-5)
    assert facts["layer_shapes"] == [[2, 16, 16]] * 2
    assert facts["can_be_resumed_exactly"]
    assert facts["files"]["adapter_model.safetensors"] > 4 * 1152
    assert facts["training"]["end"] == "\n"


def test_inspect_reads_what_peft_wrote(prefixcore, tmp_path):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    get_peft_model(tiny.model(), config).save_pretrained(tmp_path / "theirs")
    code, out, err = prefixcore("inspect", tmp_path / "theirs")
    assert code == 0, err
    assert "PEFT" in out
    assert "6, 768 numbers in all" in out


def test_inspect_refuses_what_is_not_whole(prefixcore, adapter, tmp_path):
    code, _, err = prefixcore("inspect", tmp_path / "nothing")
    assert code == 2
    assert "is not a folder" in err
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in adapter.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    (broken / "adapter_model.safetensors").write_bytes(whole[:-40])
    code, out, err = prefixcore("inspect", broken)
    assert (code, out) == (2, "")
    assert "adapter_model.safetensors" in err
    assert "Traceback" not in err


def test_the_mark_before_a_text_is_no_part_of_a_prompt(generate, monkeypatch):
    """Which editors put there; the first prompt would be another one."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfav ->\r\n"), encoding="utf-8"))
    _, out, _ = generate("--max-new-tokens", 2, "--json")
    assert json.loads(out)["prompt"] == "av ->"


def test_an_answer_beyond_what_the_model_was_made_for_is_said(generate):
    """Of 128 positions nine are the prefix's and five the prompt's."""
    _, _, err = generate("--prompt", "av ->", "--max-new-tokens", 114)
    assert "positions" not in err
    _, _, err = generate("--prompt", "av ->", "--max-new-tokens", 115)
    assert "5 tokens and 9 virtual ones with an answer of 115 are more than the 128 positions" in err


def test_ranges():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_doctor_says_what_was_compiled_and_what_would_run(prefixcore):
    code, out, err = prefixcore("doctor")
    assert (code, err) == (0, "")
    assert f"torch                   {importlib.metadata.version('torch')}\n" in out
    assert "in use; compiled in:" in out
    lines = [line.split() for line in out.splitlines()]
    for op, device, dtype, backend, _ in explain():
        assert [op, device, dtype, backend] in [line[:4] for line in lines]


def doctor_of(root=None, **environment):
    """What it says in a process of its own."""
    path = {} if root is None else {"PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "prefixcore", "doctor"]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env={**os.environ, **path, **environment})


def test_doctor_says_what_is_wrong_with_an_instruction_set():
    """Every op refuses it, so no backend is said to run."""
    result = doctor_of(PREFIXCORE_ISA="sse9")
    assert result.returncode == 0, result.stderr
    assert "none in use: unknown instruction set 'sse9' (PREFIXCORE_ISA): use one of" in result.stdout
    [row] = [line.split() for line in result.stdout.splitlines() if re.match("soft_embedding +cpu +float32", line)]
    assert row[3:6] == ["none", "unknown", "instruction"]


@pytest.mark.parametrize(
    ("written", "said"),
    [(b"", "cannot be loaded .*file too short"), (b"no library", "cannot be loaded"), (None, "are missing")],
)
def test_doctor_says_why_the_compiled_library_cannot_be_used(tmp_path, written, said):
    """Of another machine, cut short or not there: without a traceback out of the import."""
    source = Path(library.__file__).parents[1]
    shutil.copytree(source, tmp_path / "prefixcore", ignore=shutil.ignore_patterns("_kernels.so", "__pycache__"))
    if written is not None:
        (tmp_path / "prefixcore" / "_kernels.so").write_bytes(written)
    result = doctor_of(tmp_path)
    assert (result.returncode, result.stderr) == (1, "")
    assert re.search(
        f"compiled library +missing: prefixcore's compiled kernels {said}.*: build them with", result.stdout
    )
    assert re.search("soft_embedding +cpu +float32 +none", result.stdout)
    assert re.search("soft_embedding +cpu +float64 +reference", result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="ELF files")
@pytest.mark.parametrize("name", ["_kernels.so", "_host.*.so"])
def test_doctor_says_that_a_compiled_file_is_cut_short(tmp_path, name):
    """The loader maps half a file, and the process ends where it reads the other half (SIGBUS)."""
    source = Path(library.__file__).parents[1]
    shutil.copytree(source, tmp_path / "prefixcore", ignore=shutil.ignore_patterns("__pycache__"))
    [file] = (tmp_path / "prefixcore").glob(name)
    library._check_whole(file)
    size = file.stat().st_size
    os.truncate(file, size // 2)
    result = doctor_of(tmp_path)
    assert (result.returncode, result.stderr) == (1, "")
    assert re.search(
        rf"cannot be loaded \({file.name} is cut short: {size // 2:,} of [\d,]+ bytes are there; install", result.stdout
    )
    with pytest.raises(OSError, match="cut short"):
        library._check_whole(file)


def test_doctor_says_that_a_package_is_half_removed(tmp_path, monkeypatch):
    (tmp_path / "vllm-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert "its metadata says no version; install it again" in dict(doctor.library_facts())["vllm"]


def test_doctor_says_whether_the_embedding_streams(monkeypatch):
    """The kernels that no GPU has run are off, and what is neither on nor off is said."""
    for word, said in (
        ("", "off; PREFIXCORE_STREAMED_EMBEDDING=1 turns it on"),
        ("1", "on; PREFIXCORE_STREAMED_EMBEDDING=0 turns it off"),
        ("yes", "PREFIXCORE_STREAMED_EMBEDDING: expected 0 or 1, got 'yes'"),
    ):
        monkeypatch.setenv("PREFIXCORE_STREAMED_EMBEDDING", word)
        assert dict(doctor.streamed_embedding()) == {"streamed embedding": said}


def test_the_module_and_its_help_do_not_open_transformers():
    code = "import sys; from prefixcore.__main__ import parser; parser(); print('transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
