"""What stands twice in the project says the same both times."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import prefixcore
from prefixcore.backends import library

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_commits_are_checked_as_make_lint_does() -> None:
    """With the same programs and options, from the same environment: one place pins their versions."""
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert lint is not None
    wanted = [line.split("$(BIN)/")[1].removesuffix(" .").removesuffix(" $(CSRC)") for line in lint[1].splitlines()]
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    hooks = [hook["entry"].removesuffix(" --force-exclude") for hook in repository["hooks"]]
    assert hooks == [f".venv/bin/{command}" for command in wanted]
    for tool in ("ruff", "mypy", "clang-format"):
        assert re.search(rf'"{tool}==[\d.]+"', PYPROJECT), f"{tool} is not pinned"


def test_the_workflow_runs_what_is_run_here() -> None:
    (job,) = read(".github/workflows/ci.yml")["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == [".ci/run"]
    oldest = re.search(r'requires-python = ">=([\d.]+)"', PYPROJECT)
    assert oldest is not None
    assert job["strategy"]["matrix"]["python"][0] == oldest[1]
    assert "env" not in job  # what is installed is for the Makefile to say


@pytest.mark.parametrize("name", ["bug", "slow", "proposal"])
def test_issue_forms_ask_under_distinct_names(name: str) -> None:
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in form["body"])


def test_the_citation_names_this_version() -> None:
    citation = read("CITATION.cff")
    assert citation["version"] == prefixcore.__version__
    assert f'license = "{citation["license"]}"' in PYPROJECT
    assert f'Homepage = "{citation["repository-code"]}"' in PYPROJECT


def test_the_stub_of_the_compiled_module_is_right() -> None:
    """pybind11 writes each function's signature into its docstring, and the rest of it is ours."""
    stub = ast.parse((ROOT / "prefixcore" / "_host.pyi").read_text(encoding="utf-8"))
    functions = [node for node in stub.body if isinstance(node, ast.FunctionDef)]
    host = library.host()
    assert {f.name for f in functions} == {name for name in vars(host) if not name.startswith("_")}
    for function in functions:
        described = f"{function.name}({ast.unparse(function.args)}) -> {ast.unparse(function.returns)}"
        signature, _, text = getattr(host, function.name).__doc__.partition("\n\n")
        assert described.replace("dict[str, str]", "dict") == signature.replace(" = ", "=")
        assert ast.get_docstring(function) == text.strip()
    info = host.build_info()
    assert all(isinstance(x, str) for pair in info.items() for x in pair)


def test_nothing_that_is_made_is_committed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    made = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    assert subprocess.run(made, cwd=ROOT, capture_output=True, text=True, check=True).stdout == ""
    tracked = subprocess.run(
        ["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    links = [line for line in tracked.splitlines() if line.startswith("120000")]
    assert links == [], "a link leads to a folder that others do not have"
