"""`prefixcore bake`."""

from __future__ import annotations

import json

import pytest

from tests import tiny


@pytest.fixture(scope="module")
def prompt(tmp_path_factory):
    from prefixcore import PTuningConfig, attach

    folder = tmp_path_factory.mktemp("adapters") / "prompt"
    with attach(tiny.model(), PTuningConfig(num_virtual_tokens=6)) as handle:
        return handle.save(folder, task="letters")


@pytest.fixture
def bake(prefixcore, model_folder, tmp_path):
    def call(*options):
        return prefixcore("bake", *options, "--model", model_folder, "--out", tmp_path / "out")

    return call


def test_a_soft_prompt_goes_on_as_a_prefix(bake, prefixcore, prompt, model_folder, tmp_path):
    code, out, err = bake(prompt)
    assert (code, err) == (0, "")
    assert "6 virtual tokens baked from a p-tuning; 3 inputs: largest difference of two logits" in out
    assert "24 of 24 greedy tokens equal" in out
    _, facts, _ = prefixcore("inspect", tmp_path / "out")
    assert "prefix, for letters" in facts
    answers = [
        prefixcore("generate", "--model", model_folder, "--adapter", adapter, "--prompt", "ab ->", "--json")[1]
        for adapter in (prompt, tmp_path / "out")
    ]
    assert answers[0] == answers[1]


def test_what_train_wrote(bake, adapter):
    code, out, err = bake(adapter, "--prompt", "av ->", "--prompt", "bw", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert (facts["method"], facts["num_inputs"], facts["largest_difference"]) == ("prefix", 2, 0.0)


def test_a_text(bake, tmp_path):
    code, out, _ = bake("--text", "ab -> ba\\n")
    assert code == 0
    assert "9 virtual tokens baked from a text" in out
    (tmp_path / "text").write_text("ab -> ba\n", encoding="utf-8")
    assert bake("--text-file", tmp_path / "text")[1] == out
    (tmp_path / "text").write_text("ab -> ba\n", encoding="utf-8-sig")  # as editors on Windows write it
    assert bake("--text-file", tmp_path / "text")[1] == out


def test_a_text_is_verified_as_what_nothing_was_trained_for(bake, prefixcore, tmp_path):
    said = ["--task", "swap", "--license", "MIT", "--intended-use", "A test."]
    assert bake("--text", "ab -> ba\\n", *said)[0] == 0
    code, out, err = prefixcore("verify", tmp_path / "out")
    assert (code, err) == (0, "")
    lines = [line for line in out.splitlines() if line.startswith("not applicable")]
    assert [line.split()[2] for line in lines] == ["data", "metrics", "seed"]
    assert "nothing was trained: it is baked from a text alone, of SHA-256 " in lines[0]


def test_a_trained_one_that_is_baked_has_to_say_what_it_was_trained_on(bake, prefixcore, prompt, tmp_path):
    assert bake(prompt)[0] == 0
    code, _, err = prefixcore("verify", tmp_path / "out")
    assert code == 1
    assert "failed: license, intended_use, data, metrics, seed" in err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "expected an ADAPTER, or a text"),
        (["PROMPT", "--text", "a"], "expected an ADAPTER, or a text"),
        (["PROMPT", "--bos"], "--bos is about a text"),
        (["PROMPT", "--task-id", "2"], "task_id is 2, but it has one task"),
        (["nowhere"], "nowhere is not a folder"),
        (["--text", "a", "--text-file", "b"], "two texts; give one"),
        (["--text-file", "nowhere"], "nowhere: No such file"),
        (["--text", "a" * 200], "leave no room: the model was made for 128"),
        (["--text", "a", "--task", " "], "expected a text, got an empty one"),
        (["--text", "a", "--bos"], "no token that begins a text"),
    ],
)
def test_errors_are_one_clear_line(bake, prompt, tmp_path, options, expected):
    code, out, err = bake(*[prompt if option == "PROMPT" else option for option in options])
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("prefixcore bake: error: ")
    assert expected in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_another_model_is_refused(prefixcore, prompt, tmp_path):
    tiny.model(seed=1).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    command = ["bake", prompt, "--model", tmp_path / "other", "--out", tmp_path / "out"]
    code, _, err = prefixcore(*command)
    assert code == 2
    assert "weights" in err
    code, _, err = prefixcore(*command, "--force")
    assert code == 0
    assert "warning: " in err


def test_the_original_is_never_replaced_by_its_bake(prefixcore, prompt, model_folder):
    before = {path.name: path.read_bytes() for path in prompt.iterdir()}
    code, _, err = prefixcore("bake", prompt, "--model", model_folder, "--out", prompt)
    assert code == 2
    assert "would take its place; give another folder" in err
    assert {path.name: path.read_bytes() for path in prompt.iterdir()} == before
