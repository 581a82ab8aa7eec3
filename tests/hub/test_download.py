"""Adapters loaded from the Hub: what is downloaded, from where without a network, and what is refused."""

from __future__ import annotations

import json
import sys

import peft
import pytest
import torch
from huggingface_hub import constants, hf_hub_download

import prefixcore
from prefixcore.adapters import AdapterError, Registry, download, upload
from prefixcore.adapters.hub import local_folder
from prefixcore.adapters.signing import check_signature
from tests import tiny
from tests.adapters.test_signing import key_pair, sign
from tests.hub.files import MODEL, PEFT, files_of, served_files
from tests.hub.server import TOKEN


def test_what_peft_has_pushed(hub, model, tmp_path):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft_model = peft.get_peft_model(tiny.model(), config)
    with torch.no_grad():
        peft_model.prompt_encoder["default"].embedding.weight.normal_()
    peft_model.save_pretrained(tmp_path / "peft")
    hub.put(
        "somebody/theirs",
        {**files_of(tmp_path / "peft"), "training_args.bin": b"never asked for", "tokenizer.json": b"{}"},
    )
    with prefixcore.load(model, "somebody/theirs") as handle:
        assert handle.num_virtual_tokens == 3
    assert served_files(hub) == {MODEL, PEFT}


@pytest.mark.parametrize("what", ["a LoRA", "a model", "a pickle"])
def test_what_is_no_adapter_is_not_downloaded(hub, model, what):
    lora = {"peft_type": "LORA", "r": 8}
    pickled = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "token_dim": 32, "task_type": "CAUSAL_LM"}
    files, why = {
        "a LoRA": ({PEFT: json.dumps(lora).encode(), MODEL: b"large"}, "peft_type: expected one of .* got 'LORA'"),
        "a model": ({"config.json": b"{}", "model.safetensors": b"large"}, "no adapter is there"),
        "a pickle": (
            {PEFT: json.dumps(pickled).encode(), "adapter_model.bin": b"a pickle"},
            f"has no {MODEL}; adapter_model.bin is a pickle and never read",
        ),
    }[what]
    hub.put("somebody/other", files)
    with pytest.raises(AdapterError, match=why):
        prefixcore.load(model, "somebody/other")
    assert served_files(hub) <= {PEFT}


def test_a_signed_adapter_is_signed_there_and_here(hub, saved, tmp_path):
    """With every file that was signed and none that was not; huggingface_hub's cache is made of links."""
    (saved / "data").mkdir()
    (saved / "data" / "[1].txt").write_text("signed as well")
    key = key_pair(tmp_path, "key")
    sign(saved, key)
    signed = files_of(saved)
    (saved / "notes.txt").write_text("written later")
    upload(saved, "somebody/signed")
    assert hub.repositories["somebody/signed"].files() == signed  # so without a page
    hub.repositories["somebody/signed"].commit({".gitattributes": b"", "README.md": b"", "large/model.bin": b""})
    folder = download("somebody/signed")
    assert files_of(folder) == signed
    assert check_signature(folder, key).startswith(f"{len(signed) - 1} files signed")
    (folder / MODEL).unlink()
    (folder / MODEL).write_bytes(b"another one")
    with pytest.raises(AdapterError, match=f"{MODEL} is not the file that was signed"):
        check_signature(folder, key)


def test_without_a_network_the_cache_answers(hub, saved, model, monkeypatch):
    upload(saved, "somebody/capitals")
    commit = hub.repositories["somebody/capitals"].branches["main"]
    download("somebody/capitals")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    for name in ("somebody/capitals", f"somebody/capitals@{commit}"):
        with prefixcore.load(model, name) as handle:
            assert handle.num_virtual_tokens == 4
    with pytest.raises(AdapterError, match="somebody/sums: is no folder here and not in the cache, and the Hub cannot"):
        prefixcore.load(model, "somebody/sums")
    assert len(hub.asked) == asked


def test_a_part_in_the_cache(hub, saved, monkeypatch):
    """Which another library has left there."""
    upload(saved, "somebody/capitals")
    hf_hub_download("somebody/capitals", PEFT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterError, match="somebody/capitals: the Hub cannot be reached"):
        download("somebody/capitals")


@pytest.mark.parametrize("what", [lambda folder: download("somebody/x"), lambda folder: upload(folder, "somebody/x")])
def test_a_hub_that_hangs_up(hub, saved, what, monkeypatch):
    monkeypatch.setattr("tests.hub.server._Handler.parse_request", lambda self: False)
    with pytest.raises(AdapterError, match="somebody/x: the Hub cannot be reached"):
        what(saved)


def test_without_huggingface_hub(saved, tmp_path, monkeypatch):
    """Which reading and writing adapters does not need."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert local_folder(saved) == saved
    for what in (lambda: Registry(tmp_path / "registry").add("nobody/x"), lambda: upload(saved, "somebody/x")):
        with pytest.raises(AdapterError, match=r"huggingface_hub, which is missing .*pip install 'prefixcore\[hf\]'"):
            what()


def test_a_commit_that_is_in_the_cache_is_not_asked_for(hub, saved):
    commit = upload(saved, "somebody/capitals").oid
    download("somebody/capitals", revision=commit)
    asked = len(hub.asked)
    download("somebody/capitals", revision=commit)
    assert len(hub.asked) == asked


def test_who_may_see_it(hub, saved, model, monkeypatch):
    upload(saved, "somebody/mine", private=True)
    assert hub.repositories["somebody/mine"].private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AdapterError, match="somebody/mine: no such repository on the Hub, or a private one: log in"):
        prefixcore.load(model, "somebody/mine")
    with prefixcore.load(model, "somebody/mine", token=TOKEN) as handle:
        assert handle.num_virtual_tokens == 4
    with pytest.raises(AdapterError, match="the Hub refuses"):
        upload(saved, "somebody/mine")
    hub.put("somebody/gated", files_of(saved), gated=True)
    with pytest.raises(AdapterError, match="is gated: ask for access"):
        download("somebody/gated", token=TOKEN)


def test_what_is_not_there(hub, saved, model):
    hub.put("somebody/empty", {})
    for name, why in (
        ("somebody/nothing", "no such repository on the Hub"),
        ("somebody/empty", "no adapter is there"),
        ("somebody/empty@v9", "has no revision 'v9'"),
        ("nothing", "nothing: no such folder"),
    ):
        with pytest.raises(AdapterError, match=why):
            prefixcore.load(model, name)
    for name in ("somebody/two@main", "some body/x", "..", "somebody/..", ""):
        with pytest.raises(AdapterError, match="expected the name of a repository on the Hub"):
            upload(saved, name)
    with pytest.raises(AdapterError, match="revision='v1' is one of an adapter on the Hub, and this is a path"):
        prefixcore.load(model, saved, revision="v1")
