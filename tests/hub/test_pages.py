"""The page of an adapter that is pushed: what it says, what stays text, and whose it is."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import prefixcore
from prefixcore.adapters import AdapterError, adapter_digest, upload
from tests.hf.tiny_models import make


def test_the_page_says_what_the_manifest_says(hub, saved, model):
    upload(saved, "somebody/capitals")
    page = hub.repositories["somebody/capitals"].files()["README.md"].decode()
    front = page.split("---")[1]
    for text in ("library_name: peft", "license: cc-by-4.0", "- prefix-tuning"):
        assert text in front
    for text in ("# capitals", "country -> capital", "4 virtual tokens", "exact_match 0.5", adapter_digest(saved)):
        assert text in page
    with prefixcore.attach(model, prefixcore.PrefixTuningConfig(num_virtual_tokens=5)) as handle:
        handle.push_to_hub("somebody/capitals", task="another one")
    page = hub.repositories["somebody/capitals"].files()["README.md"].decode()
    assert "another one" in page
    assert adapter_digest(saved) not in page
    hub.repositories["somebody/capitals"].commit({"README.md": b"mine"})
    upload(saved, "somebody/capitals")
    assert hub.repositories["somebody/capitals"].files()["README.md"] == b"mine"


def test_a_base_model_that_reads_images_is_opened_by_the_class_that_it_has(hub):
    with prefixcore.attach(make("LlavaForConditionalGeneration", "llava"), prefixcore.PrefixTuningConfig(2)) as handle:
        handle.push_to_hub("somebody/captions")
    page = hub.repositories["somebody/captions"].files()["README.md"].decode()
    assert "from transformers import AutoModelForImageTextToText\n" in page
    assert "model = AutoModelForImageTextToText.from_pretrained(" in page


def test_a_license_that_the_hub_does_not_know_and_a_base_model_that_it_may(hub, model):
    before = model.name_or_path
    try:
        model.config._name_or_path = model.name_or_path = "team/base"
        with prefixcore.attach(model, prefixcore.PromptTuningConfig(num_virtual_tokens=2)) as handle:
            handle.push_to_hub("somebody/prompt", license="Ours, and\nnobody else's")
    finally:
        model.config._name_or_path = model.name_or_path = before
    front = hub.repositories["somebody/prompt"].files()["README.md"].decode().split("---")[1]
    said = ("license: other", "license_name: Ours, and nobody else's", "base_model: team/base", "relation: adapter")
    for text in said:
        assert text in front


def test_what_is_said_of_an_adapter_stays_a_text(hub, model):
    """On the page, in the YAML in front of it, and in the lines that a reader copies."""
    base = 'x"); import os; os.system("id") #'
    told = {
        "task": "# <script>\n![x](http://x) `code` a|b",
        "intended_use": "a\\|b\u202e",
        "license": "---\nbase_model: else",
    }
    before = model.name_or_path
    try:
        model.config._name_or_path = model.name_or_path = base
        with prefixcore.attach(model, prefixcore.PromptTuningConfig(num_virtual_tokens=2)) as handle:
            handle.push_to_hub("somebody/prompt", **told)
        for name in ("../base", "./base", "models/base"):
            (Path("models") / "base").mkdir(parents=True, exist_ok=True)
            model.config._name_or_path = model.name_or_path = name
            with prefixcore.attach(model, prefixcore.PromptTuningConfig(num_virtual_tokens=2)) as handle:
                handle.push_to_hub(f"somebody/{name.strip('./').replace('/', '-')}")
    finally:
        model.config._name_or_path = model.name_or_path = before
    page = hub.repositories["somebody/prompt"].files()["README.md"].decode()
    assert ModelCard(page).data.to_dict() == {
        "library_name": "peft", "license": "other", "license_name": "--- base_model: else",
        "tags": ["prefixcore", "prompt-tuning"],
    }  # fmt: skip
    assert "\n\\# \\<script> !\\[x\\](http://x) \\`code\\` a\\|b\n" in page
    assert "| intended use | a\\\\\\|b\\\\u202e |" in page
    python, shell = (part.split("```")[0] for part in page.split("```")[1::2])
    (called,) = [node for node in ast.walk(ast.parse(python.removeprefix("python"))) if isinstance(node, ast.Call)][:1]
    assert [argument.value for argument in called.args] == [base]
    assert base in shlex.split(shell)
    for name in ("base", "models-base"):  # folders, and no models of the Hub
        assert "base_model:" not in hub.repositories[f"somebody/{name}"].files()["README.md"].decode()


def test_a_page_that_the_hub_refuses(hub, saved):
    (saved / "README.md").write_text("---\nlicense: nonsense\n---\n")
    with pytest.raises(AdapterError, match='the Hub refuses: Invalid metadata in README.md. - "license" must be one'):
        upload(saved, "somebody/capitals")
