"""Putting an adapter on the Hugging Face Hub, with a page about it, or the files of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..version import __version__
from .card import is_written_here, model_card
from .errors import AdapterError, shown
from .files import CHECKPOINT, SIGNATURE_FILE, find_adapter
from .hub import CONTENTS, DESCRIPTIONS, HubName, failures
from .reading import read_adapter
from .signing import signed_names

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

CARD = "README.md"


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

    def page(name: str, title: str) -> bytes:
        return model_card(adapter, name, title).encode()

    push = _Push(private, revision, create_pr, commit_message, token)
    return _put(content, found, push, None if content.keys() & {CARD, SIGNATURE_FILE} else page)


def upload_files(folder: Path, files: Iterable[Path], name: str, **said: Any) -> CommitInfo:
    """Puts files of a folder, such as a checkpoint's, into a repository of the Hub, as they lie in it.

    Args:
        folder: what their names in the repository begin behind.
        files: in it.
        name: as of `upload`.
        said: of transformers' `push_to_hub`, of which what `upload` takes is heeded.

    Raises:
        AdapterError: no such name, or the Hub refuses.
    """
    push = _Push(**{name: value for name, value in said.items() if name in _Push._fields})
    return _put({path.relative_to(folder).as_posix(): path for path in files}, _to_write(name), push)


class _Push(NamedTuple):
    """What is said of a push; `upload` says what each means."""

    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    token: str | bool | None = None


def _put(
    content: Mapping[str, Path | bytes],
    found: HubName,
    push: _Push,
    page: Callable[[str, str], bytes] | None = None,
) -> CommitInfo:
    """A commit of files, in place of the adapter that was there.

    Args:
        content: files by their names, in the folder of the repository that is named.
        found: the name.
        push: what is said of it.
        page: makes a page of a name and a title, where there is none but such a one; None: there is to be none.
    """
    with failures(found.repository, push.revision):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        api = HfApi(token=push.token, library_name="prefixcore", library_version=__version__)
        repository = api.create_repo(found.repository, private=push.private, exist_ok=True).repo_id
        if push.revision is not None:
            api.create_branch(repository, branch=push.revision, exist_ok=True)
        there = api.list_repo_files(repository, revision=push.revision)
        begin = f"{found.folder}/" if found.folder else ""
        files = {begin + file: each for file, each in content.items()}
        card = begin + CARD
        if page is not None and (
            card not in there or is_written_here(api.hf_hub_download(repository, card, revision=push.revision))
        ):
            files[card] = page("/".join(filter(None, (repository, found.folder))), found.last)
        return api.create_commit(
            repository,
            [
                *(CommitOperationAdd(file, files[file]) for file in sorted(files)),
                *(CommitOperationDelete(file) for file in sorted(_former(begin, there) - files.keys())),
            ],
            commit_message=push.commit_message or f"Upload {found.last} with prefixcore",
            revision=push.revision,
            create_pr=push.create_pr,
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
