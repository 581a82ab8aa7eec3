"""The documentation: its examples run, its commands work, and what it lists is what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch

from prefixcore.__main__ import COMMANDS, main
from prefixcore.hf import ENCODER_DECODERS, ENCODERS, FAMILIES
from prefixcore.serving.families import VERIFIED
from tests import tiny
from tests.examples import ROOT, blocks, commands, execute, public

PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")}
WITH_CODE = sorted(name for name, page in PAGES.items() if blocks(page))
WITH_COMMANDS = sorted(name for name, page in PAGES.items() if commands(page))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the pages' readers are: in a folder with a model and a file of examples."""
    tiny.folder(tmp_path / "my-model")
    tiny.encoder_folder(tmp_path / "my-encoder")
    tiny.encoder_decoder_folder(tmp_path / "my-translator")
    examples = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(12)]
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, examples)))
    (tmp_path / "context.txt").write_text("France -> Paris\nJapan -> Tokyo\n")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


def test_the_pages_are_found() -> None:
    assert {"docs/index.md", "docs/mathematics.md", "docs/guides/trainer.md"} <= set(WITH_CODE)
    expected = ["audit", "cli", "distill", "formats", "gpu", "steps", "tune"]
    assert [*(f"docs/guides/{name}.md" for name in expected), "docs/quickstart.md"] == WITH_COMMANDS


@pytest.mark.parametrize("name", WITH_CODE)
def test_examples_of_a_page_run_one_after_the_other(name: str) -> None:
    names: dict[str, object] = {}
    for number, code in enumerate(blocks(PAGES[name]), start=1):
        execute(code, f"{name}, example {number}", names)


@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_commands_of_a_page_run_one_after_the_other(name: str) -> None:
    for arguments in commands(PAGES[name]):
        assert main(arguments) == 0, arguments


def test_options_in_the_table_of_the_command_line_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    rows = re.findall(r"^\| (`--.*?) \|", PAGES["docs/guides/cli.md"], re.MULTILINE)
    named = {option for row in rows for option in re.findall(r"--[a-z-]+", row)}
    assert len(named) > 8
    assert named <= known


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_is_on_a_page(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    known = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
    named = {option for page in PAGES.values() for option in re.findall(r"--[a-z][a-z-]+", page)}
    named |= {option.replace("--no-", "--") for option in named}
    assert known - named == set()


def test_environment_variables_are_those_that_the_code_reads() -> None:
    shipped = read_by("setup.py", "prefixcore", "csrc", "bench")
    ours = {name for name in read_by("tests", ".ci") if name.startswith("PREFIXCORE_")}
    rows = re.findall(r"^\| (`.*?) \|", PAGES["docs/environment.md"], re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(listed) == len(set(listed))
    assert (shipped | ours) - set(listed) == set(), "read, but not on the page"
    assert set(listed) - shipped - read_by("tests", ".ci") == set(), "on the page, but not read"


def read_by(*rooms: str) -> set[str]:
    """The environment variables that the sources in `rooms` read."""
    reads = re.compile(r'(?:environ(?:\.get)?\s*[\[(]|getenv\()\s*"(\w+)"(?!\] =)|"(\w+)" (?:not )?in os\.environ')
    paths = [path for room in rooms for path in ((ROOT / room).rglob("*") if (ROOT / room).is_dir() else [ROOT / room])]
    sources = [path.read_text(encoding="utf-8") for path in paths if path.suffix in (".py", ".cpp", ".h", ".cu")]
    return {name for source in sources for groups in reads.findall(source) for name in groups if name}


def test_every_public_name_has_its_place_in_the_api_pages() -> None:
    pages = "\n".join(text for page, text in PAGES.items() if page.startswith("docs/api/"))
    names = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    names.remove("prefixcore.serving.offline.PrefixLLM")  # a subclass of vLLM's, which tests/serving/engine has
    entries = [resolve_name(name) for name in names]
    assert len(entries) == len(public())
    assert set(entries) == set(public().values())


def test_the_families_that_are_served_are_listed() -> None:
    _, _, section = PAGES["docs/guides/serving-internals.md"].partition("## Which models")
    _, _, listed = section.partition(":\n\n")
    assert tuple(re.findall(r"`(\w+)`", listed.partition("\n\n")[0])) == VERIFIED


def test_the_families_are_those_that_are_known() -> None:
    _, _, section = PAGES["docs/guides/transformers.md"].partition("## Model families")
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) - {"model_type"} == set(FAMILIES)


@pytest.mark.parametrize(
    ("title", "known"), [("## Encoders", ENCODERS), ("## Encoder-decoders", ENCODER_DECODERS)], ids=["encoders", "both"]
)
def test_the_encoders_are_those_that_are_known(title: str, known: dict[str, object]) -> None:
    _, _, section = PAGES["docs/guides/transformers.md"].partition(f"{title}\n")
    rows = re.findall(r"^\| (`.*?) \|", section.partition("\n## ")[0], re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([\w-]+)`", row)} == set(known)
