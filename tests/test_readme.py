"""The README's examples, and the one of bench/README.md, run as they stand there; links lead somewhere."""

from __future__ import annotations

import re

import peft
import pytest
import torch
import transformers

import prefixcore
from prefixcore.__main__ import parser
from prefixcore.hf.families import FAMILIES
from tests import examples, tiny
from tests.examples import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCH = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
EXAMPLES = examples.blocks(README + BENCH)
PAGES = [ROOT / "README.md", *sorted((ROOT / "bench").glob("**/*.md"))]


def execute(index, **names):
    return examples.execute(EXAMPLES[index], f"README.md, example {index}", names)


def test_there_is_one_for_each_kind_of_user():
    assert len(EXAMPLES) == 5
    assert all(len(example.strip().splitlines()) <= 14 for example in EXAMPLES)


def test_someone_with_a_transformers_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    features = [{"input_ids": ids, "labels": ids} for ids in torch.randint(2, 90, (6, 9))]
    args = transformers.TrainingArguments(str(tmp_path / "out"), max_steps=2, use_cpu=True, report_to=[])
    names = execute(0, name=str(tiny.folder(tmp_path / "model")), examples=features, args=args)
    assert (tmp_path / "capitals" / "adapter_model.safetensors").exists()
    assert "Portugal ->" in capsys.readouterr().out
    assert names["handle"].num_trainable > 0

    names["handle"].detach()
    tokenizer = names["tokenizer"]
    tokenizer.padding_side = "left"
    names = execute(2, prefixcore=prefixcore, model=names["model"], tokenizer=tokenizer)
    assert names["bank"].names == ["capitals", "sums"]
    assert names["sums"].num_trainable > 0


def test_someone_with_a_peft_model():
    names = execute(1, prefixcore=prefixcore, peft=peft, model=tiny.model())
    ids = torch.tensor([[5, 6, 7]])
    names["peft_model"](input_ids=ids, labels=ids).loss.backward()
    assert names["peft_model"].prompt_encoder["default"].embedding.weight.grad.abs().max() > 0


def test_someone_who_measures(capsys):
    execute(4)
    assert capsys.readouterr().out.count("Measurement") == 2


def test_someone_who_writes_a_framework():
    names = execute(3)
    assert names["out"].shape == (4, 8, 128, 64)
    for virtual in ("prefix_key", "prefix_value"):
        gradient = names[virtual].grad
        assert gradient.shape == (3, 2, 20, 64)
        assert gradient[1, :, :7].any()  # row 3 of the batch sees entry 1, of which...
        assert not gradient[1, :, 7:].any()  # ...only seven tokens count


def test_the_commands_are_understood():
    commands = examples.commands(README)
    assert len(commands) == 11
    for arguments in commands:
        parser().parse_args(arguments)


def test_every_family_is_named():
    (named,) = re.findall(r"## Model families\n\n(.*) are tested", README)
    assert sorted(re.split(r", | and ", named)) == sorted(family.label for family in FAMILIES.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_something(page):
    text = page.read_text(encoding="utf-8")
    links = [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'src(?:set)?="([^"]+)"', text)]
    local = [link for link in links if not link.startswith(("http:", "https:"))]
    for link in local:
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{link}: there is no such file"
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link
