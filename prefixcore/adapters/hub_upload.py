"""Putting an adapter on the Hugging Face Hub, with a page about it, or the files of a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..version import __version__
from .card import is_written_here, model_card
from .errors import AdapterError, shown
from .files import CHECKPOINT, SIGNATURE_FILE, find_adapter
from .hub import CONTENTS, DESCRIPTIONS, HubName, failures
from .reading import read_adapter
from .signing import signed_names

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

CARD = "README.md"

SAID = ("private", "revision", "create_pr", "commit_message", "token")
"""What `upload` and `upload_files` are told beside what and where; transformers' `push_to_hub` calls it so, too."""


def upload(
    folder: str | Path,
    name: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Puts an adapter on the Hub: in a repository of its own, or in a folder of one that holds several.

    All of it is read before. The repository is made where there is none; of an adapter that is there, nothing stays.
    A page about the adapter (`README.md`) is written of what its manifest says, unless the folder or the repository has
    one of somebody else's, or the adapter is signed, as a signature is one of all files.

    Args:
        folder: the adapter's.
        name: `user/repository`, or `user/repository/folder`; without `user/` it is the user's own.
        private: whether others see a repository that is made now; None: what the user or organisation has set.
        revision: the branch; made where there is none. None: the main one.
        create_pr: open a pull request in place of a commit.
        commit_message: None: one that names the adapter.
        token: as of `download`.

    Returns:
        huggingface_hub's record of the commit; as a text it is the URL.

    Raises:
        AdapterError: no adapter, no such name, or the Hub refuses.

    Examples:
        >>> from prefixcore.adapters import AdapterError, upload
        >>> try:
        ...     upload("nowhere", "user/capitals")
        ... except AdapterError as error:
        ...     print(error)
        nowhere: no such folder
    """
    found = _to_write(name)
    folder = find_adapter(Path(folder))
    adapter = read_adapter(folder)
    files = {file: folder / file for file in (*DESCRIPTIONS, *CONTENTS, CARD)}
    if signed := signed_names(folder):
        in_it = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
        files |= {file: path for file, path in in_it.items() if file in signed}
    content: dict[str, Path | bytes] = {file: path for file, path in files.items() if path.is_file()}
    _check_links(folder, content)
    with _repository(found.repository, private=private, revision=revision, token=token) as (api, repository):
        found = found._replace(repository=repository)
        begin = f"{found.folder}/" if found.folder else ""
        there = api.list_repo_files(repository, revision=revision)
        if not content.keys() & {CARD, SIGNATURE_FILE} and (
            begin + CARD not in there
            or is_written_here(api.hf_hub_download(repository, begin + CARD, revision=revision))
        ):
            content[CARD] = model_card(adapter, "/".join(filter(None, (repository, found.folder))), found.last).encode()
        return _commit(
            api,
            repository,
            {begin + file: each for file, each in content.items()},
            former=_former(begin, there),
            message=commit_message or f"Upload {found.last} with prefixcore",
            revision=revision,
            create_pr=create_pr,
        )


def upload_files(
    folder: Path,
    files: Iterable[Path],
    name: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Puts files of a folder, such as a checkpoint's, into a repository of the Hub, as they lie in it.

    Args:
        folder: what their names in the repository begin behind.
        files: in it.
        name, private, revision, create_pr, commit_message, token: as of `upload`, without a folder in the repository.

    Raises:
        AdapterError: no such name, or the Hub refuses.
    """
    found = _to_write(name)
    with _repository(found.repository, private=private, revision=revision, token=token) as (api, repository):
        return _commit(
            api,
            repository,
            {path.relative_to(folder).as_posix(): path for path in files},
            former=_former("", api.list_repo_files(repository, revision=revision)),
            message=commit_message or f"Upload {found.last} with prefixcore",
            revision=revision,
            create_pr=create_pr,
        )


def _former(begin: str, there: Iterable[str]) -> set[str]:
    """The files of the adapter that was there before: one that stayed would be taken for a part of the new one."""
    own = {begin + file for file in (*DESCRIPTIONS, *CONTENTS)}
    return {file for file in there if file in own or file.startswith(f"{begin}{CHECKPOINT}/")}


def _check_links(folder: Path, names: Iterable[str]) -> None:
    """Raises AdapterError for a link that leads elsewhere than into huggingface_hub's cache, which is made of links.

    A folder that somebody else has made could publish any file of this machine.
    """
    for name in names:
        path = folder / name
        real = path.resolve()
        if real == folder.resolve() / name:
            continue
        from huggingface_hub import constants

        if not real.is_relative_to(Path(constants.HF_HUB_CACHE).resolve()):
            raise AdapterError(f"{path}: is a link, and {real} would be published; put the file itself there")


def _to_write(name: str) -> HubName:
    """What is named, to be written; AdapterError: no repository, or a revision."""
    found = HubName.parse(name if "/" in name else f"user/{name}")
    if found is None or found.revision is not None:
        hint = "; say the branch by revision=" if found else ""
        raise AdapterError(f"{shown(name)}: expected the name of a repository on the Hub, user/repository{hint}")
    return found if "/" in name else found._replace(repository=name)


@contextmanager
def _repository(
    name: str, *, private: bool | None, revision: str | None, token: str | bool | None
) -> Iterator[tuple[HfApi, str]]:
    """A block in which there is the repository, with the branch: the Hub, and the whole name."""
    with failures(name, revision):
        from huggingface_hub import HfApi

        api = HfApi(token=token, library_name="prefixcore", library_version=__version__)
        name = api.create_repo(name, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        yield api, name


def _commit(
    api: HfApi,
    repository: str,
    files: Mapping[str, Path | bytes],
    *,
    former: Collection[str],
    message: str,
    revision: str | None,
    create_pr: bool,
) -> CommitInfo:
    """A commit of these files, in place of the former ones."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(name, files[name]) for name in sorted(files)),
        *(CommitOperationDelete(name) for name in sorted(set(former) - files.keys())),
    ]
    return api.create_commit(repository, operations, commit_message=message, revision=revision, create_pr=create_pr)
