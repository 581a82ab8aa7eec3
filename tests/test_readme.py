"""The README's examples run as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import torch

from prefixcore.__main__ import COMMANDS, parser
from tests import tiny

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def execute(index, **names):
    exec(compile(EXAMPLES[index], f"README.md, example {index}", "exec"), names)
    return names


def test_there_is_one_for_each_kind_of_user():
    assert len(EXAMPLES) == 3
    assert all(len(example.strip().splitlines()) <= 14 for example in EXAMPLES)


def test_someone_with_a_transformers_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(2, 90, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    names = execute(0, name=str(tiny.folder(tmp_path / "model")), batches=[batch] * 3)
    assert (tmp_path / "capitals" / "adapter_model.safetensors").exists()
    assert "Portugal ->" in capsys.readouterr().out
    assert names["handle"].num_trainable > 0


def test_someone_who_measures(capsys):
    execute(1)
    assert capsys.readouterr().out.count("Measurement") == 2


def test_someone_who_writes_a_framework():
    names = execute(2)
    assert names["out"].shape == (4, 8, 128, 64)
    for virtual in ("prefix_key", "prefix_value"):
        gradient = names[virtual].grad
        assert gradient.shape == (3, 2, 20, 64)
        assert gradient[1, :, :7].any()  # row 3 of the batch sees entry 1, of which...
        assert not gradient[1, :, 7:].any()  # ...only seven tokens count


def test_the_commands_are_understood():
    lines = re.findall(rf"^prefixcore (?:{'|'.join(COMMANDS)})\b.*$", README, re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        parser().parse_args(shlex.split(line, comments=True)[1:])
