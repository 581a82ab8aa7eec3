"""An adapter is signed by OpenSSF's `model_signing` with a key pair, offline, and verified by its public key."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

import prefixcore
from prefixcore.adapters import AdapterError, Registry, adapter_digest, read_adapter, verify_adapter
from prefixcore.adapters.files import MANIFEST_FILE, MODEL_FILE, SIGNATURE_FILE
from prefixcore.adapters.signing import check_signature
from tests.redigest import redigest

from .models import make_model, save


def key_pair(folder: Path, name: str) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    encoding, pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / f"{name}.pem").write_bytes(key.private_bytes(encoding, pem, serialization.NoEncryption()))
    public = key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)
    return folder / f"{name}.pub"


def sign(folder: Path, public_key: Path, *more: str) -> None:
    """By the command of the manual."""
    command = [sys.executable, "-m", "model_signing", "sign", "key", str(folder), *more]
    command += ["--signature", str(folder / SIGNATURE_FILE), "--private_key", str(public_key.with_suffix(".pem"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> tuple[Path, Path]:
    """A signed adapter and the public key."""
    root = tmp_path_factory.mktemp("signed")
    save(
        root / "capitals", "prefix-mlp", make_model("llama"), [prefixcore.nn.LayerShape(2, 16, 16)] * 2, task="capitals"
    )
    key = key_pair(root, "key")
    sign(root / "capitals", key)
    return root / "capitals", key


@pytest.fixture
def signed(original, tmp_path) -> tuple[Path, Path]:
    return shutil.copytree(original[0], tmp_path / "capitals"), original[1]


def outcome(folder: Path, key: Path | None = None, **options) -> str:
    (check,) = [each for each in verify_adapter(folder, public_key=key, **options) if each.name == "signature"]
    return f"{check.outcome}: {check.detail}"


def test_a_signature_is_checked_where_there_is_a_key(signed):
    folder, key = signed
    assert outcome(folder, key) == f"ok: 4 files signed with the key of {key}"
    assert outcome(folder).startswith("not checked: there is one")


def test_it_stands_in_the_way_of_nothing(signed, tmp_path):
    folder, key = signed
    digest = adapter_digest(folder)
    assert read_adapter(folder).digest == digest
    entry = Registry(tmp_path / "registry").add(folder, name="renamed")
    assert entry.digest == digest
    assert outcome(entry.path, key).startswith("ok")
    (folder / SIGNATURE_FILE).unlink()
    assert adapter_digest(folder) == digest


def test_it_may_lie_elsewhere(signed, tmp_path):
    folder, key = signed
    shutil.move(folder / SIGNATURE_FILE, tmp_path / "elsewhere.sig")
    assert outcome(folder, key, signature=tmp_path / "elsewhere.sig").startswith("ok")
    assert "no such signature" in outcome(folder, key)


def test_what_no_digest_shows_is_seen(signed):
    """Whoever changes a field and its digest cannot sign."""
    folder, key = signed
    fields = json.loads((folder / MANIFEST_FILE).read_text())
    (folder / MANIFEST_FILE).write_text(json.dumps({**fields, "license": "MIT"}, indent=2, sort_keys=True))
    redigest(folder)
    read_adapter(folder)
    assert outcome(folder, key).endswith(f"{MANIFEST_FILE} is not the file that was signed")


def test_every_file_is_covered(signed):
    folder, key = signed
    for path in sorted(folder.iterdir()):
        if path.name == SIGNATURE_FILE:
            continue
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert outcome(folder, key).endswith(f"{path.name} is not the file that was signed")
        path.unlink()
        assert outcome(folder, key).endswith(f"{path.name} was signed and is missing")
        path.write_bytes(whole)
    (folder / "README.md").write_text("mine")
    assert outcome(folder, key).endswith("README.md was not signed")


def test_files_further_down_are_named_by_their_paths(signed):
    folder, key = signed
    notes = folder / "eval" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("67 % right")
    assert outcome(folder, key).endswith(": eval/notes.txt was not signed")
    sign(folder, key)
    notes.write_text("76 % right")
    assert outcome(folder, key).endswith(": eval/notes.txt is not the file that was signed")


def test_another_key(signed, tmp_path):
    folder, _ = signed
    assert outcome(folder, key_pair(tmp_path, "other")).endswith("was made with another key")
    assert "no such public key" in outcome(folder, tmp_path / "nothing.pub")
    edwards = ed25519.Ed25519PrivateKey.generate().public_key()
    pem = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "edwards.pub").write_bytes(edwards.public_bytes(*pem))
    assert outcome(folder, tmp_path / "edwards.pub").startswith("FAILED")


@pytest.mark.parametrize("what", [b"", b"{", b"[]", b"null", b"\xff", b'{"dsseEnvelope": 3}', "cut", "payload", "long"])
def test_a_damaged_signature(what, signed):
    folder, key = signed
    path = folder / SIGNATURE_FILE
    if what == "cut":
        what = path.read_bytes()[:-10]
    elif what == "payload":
        bundle = json.loads(path.read_text())
        payload = bundle["dsseEnvelope"]["payload"]
        bundle["dsseEnvelope"]["payload"] = payload[:40] + ("A" if payload[40] != "A" else "B") + payload[41:]
        what = json.dumps(bundle).encode()
    path.write_bytes(b" " * 5 * 2**20 if what == "long" else what)
    assert outcome(folder, key).startswith("FAILED")


def test_a_signature_that_leaves_the_manifest_out(signed):
    folder, key = signed
    sign(folder, key, "--ignore-paths", str(folder / MANIFEST_FILE))
    assert outcome(folder, key).endswith(f"does not cover {MANIFEST_FILE}, by which the other files are known")


def test_another_adapter_in_its_place_is_not_signed(signed):
    folder, key = signed
    (folder / "README.md").write_text("mine")
    with prefixcore.attach(make_model("llama"), prefixcore.PromptTuningConfig(2, init="random")) as handle:
        handle.save(folder)
    assert (folder / "README.md").exists()
    assert not (folder / SIGNATURE_FILE).exists()
    assert "no such signature" in outcome(folder, key)


def test_without_the_library_it_is_said_what_to_install(signed, monkeypatch):
    folder, key = signed
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(AdapterError, match=r"model-signing, which is missing .*; pip install 'prefixcore\[sign\]'"):
        check_signature(folder, key)
    assert (folder / MODEL_FILE).exists()


@pytest.mark.parametrize("kind", ["private", "text"])
def test_what_is_no_public_key_is_named_and_not_the_signature(kind, original, tmp_path):
    folder, key = original
    given = key.with_suffix(".pem")
    if kind == "text":
        given = tmp_path / "text.pub"
        given.write_text("not a key")
    with pytest.raises(AdapterError) as caught:
        check_signature(folder, given)
    assert str(caught.value).startswith(f"{given}: expected the public key of an elliptic curve in PEM")
