"""`prefixcore push`, and the commands that take a name on the Hub for a folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

from prefixcore.__main__ import main
from prefixcore.adapters import Registry, adapter_digest, read_adapter, upload
from tests import tiny


def test_the_command_line(hub, saved, tmp_path, capsys):
    tiny.folder(tmp_path / "model")
    assert main(["push", str(saved), "somebody/capitals", "--private", "--message", "By hand"]) == 0
    assert capsys.readouterr().out.startswith(f"{hub.url}/somebody/capitals/commit/")
    repository = hub.repositories["somebody/capitals"]
    assert (repository.private, repository.messages[-1]) == (True, "By hand")
    assert main(["inspect", "somebody/capitals", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == adapter_digest(saved)
    assert main(["add", "somebody/capitals", "registry"]) == 0
    assert Registry("registry").find("capitals").digest == adapter_digest(saved)
    given = ["--model", str(tmp_path / "model"), "--prompt", "abc", "--max-new-tokens", "3"]
    assert main(["generate", "--adapter", "somebody/capitals", *given]) == 0
    here = capsys.readouterr().out
    assert main(["generate", "--adapter", str(saved), *given]) == 0
    assert here.endswith(capsys.readouterr().out)
    assert main(["verify", "somebody/capitals", "--skip", "data", "--skip", "intended_use"]) == 0
    assert main(["convert", "somebody/capitals", "--to", "peft", "--out", "theirs"]) == 0
    assert read_adapter("theirs").config.num_virtual_tokens == 4
    asked = len(hub.asked)
    for command in (["inspect"], ["add"], ["bake"], ["audit"], ["verify"], ["convert"], ["generate", "--adapter"]):
        more = {
            "add": ["registry"], "bake": ["--model", "model", "--out", "x"], "audit": ["--probe", "x"],
            "convert": ["--to", "peft", "--out", "x"], "generate": ["--prompt", "abc"],
        }.get(command[0], [])  # fmt: skip
        assert main([*command, "./somebody/capitals", *more]) == 2
        assert re.search("no such folder|is not a folder", capsys.readouterr().err)
    assert len(hub.asked) == asked
    assert main(["push", "nowhere", "somebody/capitals"]) == 2
    assert main(["inspect", "somebody/nothing"]) == 2
    assert "no such repository on the Hub" in capsys.readouterr().err


def test_the_settings_of_huggingface_hub_hold(hub, saved, tmp_path):
    """In a process of its own, which reads the environment."""
    upload(saved, "somebody/capitals")
    others = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment = {**others, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "prefixcore", "inspect", "somebody/capitals"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "home") in done.stdout
