"""Adapters on the Hugging Face Hub: the folder of one that is named. `hub_upload` puts one there.

A name is `user/repository`, with `@revision` behind it or not, and behind that, where the repository holds several
adapters, the folder of one: `team/adapters@v2/capitals`. Needs huggingface_hub, which transformers brings along; its
settings hold (`hf auth login`, `HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`).
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..version import __version__
from .errors import AdapterError, shown
from .files import (
    BESIDE_PEFT,
    CHECKPOINT,
    MANIFEST_FILE,
    MODEL_FILE,
    PEFT_FILE,
    SIGNATURE_FILE,
    STATE_FILE,
    find_adapter,
)
from .folder import check_claims
from .record import CURVE, RECORD
from .signing import signed_names

_NAME = re.compile(
    r"(?P<repository>\w[\w.-]*/[\w.-]*\w)(?:@(?P<revision>refs/pr/\d+|[\w.-]+))?(?P<folder>(?:/\w[\w.-]*)*)", re.ASCII
)
DESCRIPTIONS = (MANIFEST_FILE, PEFT_FILE)
"""The files that say what an adapter is."""

CONTENTS = (MODEL_FILE, STATE_FILE, SIGNATURE_FILE, RECORD, CURVE)
"""The others."""

_IN_A_FOLDER = tuple(f"/{file}" for file in DESCRIPTIONS)


class HubName(NamedTuple):
    """What the name of an adapter on the Hub says.

    Attributes:
        repository: `user/name`.
        revision: a branch, a tag or a commit; None: the main branch.
        folder: in the repository; "": the adapter is not in a folder of its own.
    """

    repository: str
    revision: str | None
    folder: str

    @property
    def last(self) -> str:
        """What the adapter is called, without where it is."""
        return (self.folder or self.repository).rpartition("/")[2]

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """What a text names; None: it is no name of an adapter on the Hub."""
        found = _NAME.fullmatch(text)
        return found and cls(found["repository"], found["revision"], found["folder"].lstrip("/"))


def last_name(name: str) -> str:
    """What an adapter on the Hub is called, without where it is."""
    found = HubName.parse(name)
    return found.last if found else name


def local_folder(source: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder that `source` names: itself, or that of an adapter on the Hub, which is downloaded.

    What is there on this machine comes first. What begins with a folder that is there is a path as well, if nothing
    says otherwise (a revision): a mistyped one is not asked for elsewhere.

    Args:
        source: a path, or a name on the Hub.
        revision, token: as of `download`.

    Raises:
        AdapterError: as of `download`; no such folder in one that is there; or a revision of what is no name on the
            Hub.
    """
    path = Path(source)
    text = source if isinstance(source, str) else path.as_posix()
    name = HubName.parse(text)
    said = revision is not None or (name is not None and name.revision is not None)
    if name is None or not _is_missing(path):
        if revision is not None:
            raise AdapterError(f"{source}: revision={revision!r} is one of an adapter on the Hub, and this is a path")
        return path
    if not said and os.path.isdir(path.parts[0]):
        on_hub = "/".join(part for part in (f"{name.repository}@main", name.folder) if part)
        raise AdapterError(
            f"{source}: no such folder; as {path.parts[0]} is one here, this is a path: on the Hub it is {on_hub}"
        )
    return download(text, revision=revision, token=token)


def _is_missing(path: Path) -> bool:
    """Whether nothing is there, which of what the file system refuses to look at nobody knows."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        pass
    return False


def download(name: str, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder of an adapter on the Hub, ours or one that PEFT wrote, in huggingface_hub's cache.

    What it claims to be comes first: the files of a LoRA, or of a whole model, are not downloaded. A signed adapter
    comes with all the files that were signed. Without a network the cache answers.

    Args:
        name: `user/repository`, with `@revision` and the folder of an adapter in it where there are several.
        revision: a branch, a tag or a commit, which is always the same adapter.
        token: of the user, for a private repository; None: the one that `hf auth login` or `HF_TOKEN` has set; False:
            none.

    Raises:
        AdapterError: no such name, repository or revision; no access to it; no adapter in it; or the Hub cannot be
            reached and the adapter is not in the cache.

    Examples:
        >>> from prefixcore.adapters import AdapterError, download
        >>> try:
        ...     download("capitals")
        ... except AdapterError as error:
        ...     print(error)
        'capitals': expected the name of an adapter on the Hub, user/repository
    """
    found = HubName.parse(name)
    if found is None:
        raise AdapterError(f"{shown(name)}: expected the name of an adapter on the Hub, user/repository")
    if revision is not None and found.revision not in (None, revision):
        raise AdapterError(f"{name}: names one revision, and revision={revision!r} another; leave one of them out")
    revision = revision or found.revision
    begin = f"{found.folder}/" if found.folder else ""
    places = [begin, f"{begin}{CHECKPOINT}/{BESIDE_PEFT}/", f"{begin}{CHECKPOINT}/"]

    def fetch(revision: str | None, patterns: list[str]) -> Path:
        with failures(found.repository, revision):
            from huggingface_hub import snapshot_download

            return Path(
                snapshot_download(
                    found.repository,
                    revision=revision,
                    token=token,
                    allow_patterns=patterns,
                    library_name="prefixcore",
                    library_version=__version__,
                )
            )

    def listed() -> list[str]:
        with failures(found.repository, revision):
            from huggingface_hub import HfApi

            return HfApi(token=token).list_repo_files(found.repository, revision=snapshot.name)

    snapshot = fetch(revision, [place + file for place in places for file in DESCRIPTIONS])
    folder = find_adapter(snapshot / found.folder)
    if not any((folder / file).exists() for file in DESCRIPTIONS):
        others = sorted({file.rpartition("/")[0] for file in listed() if file.endswith(_IN_A_FOLDER)})
        raise AdapterError(
            f"{name}: no adapter is there: expected {MANIFEST_FILE} or {PEFT_FILE}"
            + (f" in {found.folder}" if found.folder else "")
            + (f"; the repository has them in {shown(others)}: {found.repository}/{others[0]} is one" if others else "")
        )
    check_claims(folder)
    begin = f"{folder.relative_to(snapshot).as_posix()}/" if folder != snapshot else ""
    fetch(snapshot.name, [begin + file for file in (*DESCRIPTIONS, *CONTENTS)])
    if not (folder / MODEL_FILE).exists():
        pickled = begin + "adapter_model.bin" in listed()
        raise AdapterError(
            f"{name}: has no {MODEL_FILE}"
            + ("; adapter_model.bin is a pickle and never read: save it again as safetensors" if pickled else "")
        )
    if signed := signed_names(folder):
        fetch(snapshot.name, [begin + glob.escape(file) for file in signed])
    return folder


@contextmanager
def failures(repository: str, revision: str | None) -> Iterator[None]:
    """A block in which what huggingface_hub raises is an AdapterError in words of what was wanted."""
    try:
        from huggingface_hub import errors
    except ImportError as error:
        how = f"the Hub is asked by huggingface_hub, which is missing ({error}); pip install 'prefixcore[hf]'"
        raise AdapterError(f"{repository}: is no folder here, and {how}") from error
    try:
        yield
    except AdapterError:
        raise
    except errors.GatedRepoError as error:
        why = "is gated: ask for access on its page, then log in (hf auth login, HF_TOKEN or token=)"
        raise AdapterError(f"{repository}: {why}") from error
    except errors.RepositoryNotFoundError as error:
        why = "no such repository on the Hub, or a private one: log in to see it (hf auth login, HF_TOKEN or token=)"
        raise AdapterError(f"{repository}: {why}") from error
    except errors.RevisionNotFoundError as error:
        raise AdapterError(f"{repository}: has no revision {shown(revision)}") from error
    except errors.LocalEntryNotFoundError as error:
        at = f" at {revision}" if revision else ""
        raise AdapterError(
            f"{repository}{at}: is no folder here and not in the cache, and the Hub cannot be reached "
            f"({_one_line(error.__cause__ or error)})"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise AdapterError(f"{repository}: the Hub cannot be reached: {_one_line(error)}") from error
    except (errors.HfHubHTTPError, ValueError, OSError) as error:
        raise AdapterError(f"{repository}: the Hub refuses: {_one_line(error)}") from error
    except errors.HTTPError as error:  # of httpx, or of httpx2, whichever huggingface_hub has
        raise AdapterError(f"{repository}: the Hub cannot be reached: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
