"""Checking who made an adapter: a signature of the whole folder by OpenSSF's `model-signing`, with a key pair, offline.

`model_signing sign key ADAPTER --signature ADAPTER/model.sig --private_key KEY.pem` writes the signature; reading an
adapter passes over it, and writing another adapter in its place takes it away.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .errors import AdapterError
from .files import MANIFEST_FILE, SIGNATURE_FILE
from .storage import LONGEST_JSON, load_bytes

INSTALL = "pip install 'prefixcore[sign]'"


def check_signature(folder: Path, public_key: Path, signature: Path | None = None) -> str:
    """Checks that the holder of a key has signed every file of an adapter's folder as it is.

    Args:
        folder: the adapter's.
        public_key: of an elliptic curve, PEM.
        signature: the file; None: `model.sig` in the folder.

    Returns:
        In words, what was found.

    Raises:
        AdapterError: no signature or key, one that is damaged, another key's, or files that are not those that were
            signed; or `model-signing` is not installed.
    """
    signature = signature or folder / SIGNATURE_FILE
    for path, what in ((signature, "signature"), (public_key, "public key")):
        try:
            data = load_bytes(path, LONGEST_JSON)
        except OSError as error:
            raise AdapterError(f"{path}: cannot be read: {error.strerror or error}") from error
        if data is None:
            raise AdapterError(f"{path}: no such {what}")
        if what == "signature":
            bundle = data
    try:
        from model_signing import verifying
    except ImportError as error:
        raise AdapterError(f"a signature is checked by model-signing, which is missing ({error}); {INSTALL}") from error
    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:  # of any kind: of cryptography, its backend, model-signing
        raise AdapterError(
            f"{public_key}: expected the public key of an elliptic curve in PEM, such as `openssl ec -pubout` writes "
            f"({type(error).__name__}); it is not the private key, which stays with whoever signs"
        ) from error
    try:
        with _without_links(folder) as files:
            verifier.verify(files, signature)
    except Exception as error:  # of any kind: of JSON, protobuf, cryptography
        raise AdapterError(f"{signature}: {_in_words(error, folder, signature, bundle)}") from error
    signed = _signed_files(bundle)
    if MANIFEST_FILE not in signed:
        raise AdapterError(f"{signature}: does not cover {MANIFEST_FILE}, by which the other files are known")
    return f"{len(signed)} files signed with the key of {public_key}"


def signed_names(folder: Path) -> set[str]:
    """The files that the signature in a folder is one of, by their names in it; none: it has no signature."""
    bundle = load_bytes(folder / SIGNATURE_FILE, LONGEST_JSON)
    return set() if bundle is None else set(_signed_files(bundle))


@contextmanager
def _without_links(folder: Path) -> Iterator[Path]:
    """A folder of the same files: model-signing reads no links, and what huggingface_hub has downloaded is links."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    if not any(path.is_symlink() for path in files):
        yield folder
        return
    with TemporaryDirectory() as parent:
        for path in files:
            copy = Path(parent, path.relative_to(folder))
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        yield Path(parent)


def _signed_files(bundle: bytes) -> dict[str, str]:
    """The digests of the signed files by their names; of a file that was signed in pieces, that of its last one."""
    try:
        payload: Any = json.loads(base64.b64decode(json.loads(bundle)["dsseEnvelope"]["payload"]))
        resources = payload["predicate"]["resources"]
        return {str(resource["name"]).partition(":")[0]: str(resource["digest"]) for resource in resources}
    except (ValueError, KeyError, TypeError):
        return {}


def _in_words(error: Exception, folder: Path, signature: Path, bundle: bytes) -> str:
    """What `model-signing` found, in fewer words."""
    text = " ".join(str(error).split())
    if text.startswith("Key mismatch"):
        return "was made with another key"
    if text.startswith("Signature mismatch"):  # so the signature itself is right, and says what was signed
        signed, parts = _signed_files(bundle), []
        files = [path for path in folder.rglob("*") if path.is_file() and path.absolute() != signature.absolute()]
        names = {path.relative_to(folder).as_posix() for path in files}
        there = {name for name in names if not name.startswith(".git")}  # which model-signing passes over
        for name in sorted(signed.keys() | there):
            if name not in there:
                parts.append(f"{name} was signed and is missing")
            elif name not in signed:
                parts.append(f"{name} was not signed")
            elif hashlib.sha256((folder / name).read_bytes()).hexdigest() != signed[name]:
                parts.append(f"{name} is not the file that was signed")
        return "; ".join(parts) or "is of other files"
    return f"is damaged, or no signature ({type(error).__name__}: {text[:200]})"
