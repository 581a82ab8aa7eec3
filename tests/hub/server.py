"""A Hugging Face Hub on this machine: the part of its interface that huggingface_hub needs for small files."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants, hf_api

Files = dict[str, bytes]

USER, TOKEN = "somebody", "hf_a_token_of_this_test"


@dataclass
class Repository:
    """Files at commits, and commits by the names of branches. Of a gated one everybody sees the names of its files."""

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    private: bool = False
    gated: bool = False

    def commit(self, files: Files, branch: str = "main", message: str = "", removed: Collection[str] = ()) -> str:
        """A commit of these files beside those that are there and are not removed."""
        files = {name: data for name, data in {**self.files(branch), **files}.items() if name not in removed}
        sha = hashlib.sha1(repr((sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def files(self, revision: str = "main") -> Files:
        """Those at a branch or a commit."""
        return self.commits.get(self.branches.get(revision, revision), {})


class Hub:
    """The server: its repositories by name, what it was asked, and whether it can be reached."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.url = ""

    def put(self, name: str, files: Files, **options: Any) -> Repository:
        """A repository with these files."""
        repository = self.repositories[name] = Repository(**options)
        repository.commit(files)
        return repository


@contextmanager
def serve() -> Iterator[Hub]:
    """A block in which there is a Hub."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def only(hub: Hub) -> Iterator[None]:
    """A block in which huggingface_hub knows no other."""
    file = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    settings = patch.multiple(constants, ENDPOINT=hub.url, HUGGINGFACE_CO_URL_TEMPLATE=file, HF_HUB_OFFLINE=False)
    with settings, patch.object(hf_api.api, "endpoint", hub.url):
        yield


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.asked.append(f"{self.command} {path}")
        if path == "/api/whoami-v2":
            return self._json({"type": "user", "name": USER, "orgs": [], "auth": {}})
        is_api = path.startswith("/api/models/")
        parts = [unquote(part) for part in path.removeprefix("/api/models").strip("/").split("/")]
        name, rest = "/".join(parts[:2]), parts[2:]
        repository = self._open(name)
        if repository is None:
            return None
        revision = rest[1] if len(rest) > 1 else "main"
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            return self._error(404, "RevisionNotFound")
        files = repository.commits[sha]
        if is_api and rest[:1] == ["tree"]:
            return self._json([_entry(file, data) for file, data in files.items()])
        if is_api:
            return self._json({"id": name, "sha": sha, "siblings": [{"rfilename": file} for file in files]})
        file = "/".join(rest[2:])
        if repository.gated:
            return self._error(403, "GatedRepo")
        if file not in files:
            return self._error(404, "EntryNotFound")
        digest = hashlib.sha1(files[file]).hexdigest()
        return self._send(200, files[file], {"ETag": f'"{digest}"', "X-Repo-Commit": sha})

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._error(401, "")
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or USER}/{given['name']}"
            there = name in self.hub.repositories
            private = bool(given.get("private") or given.get("visibility") == "private")
            repository = self.hub.repositories.setdefault(name, Repository(private=private))
            if not there:
                repository.commit({})
            return self._json({"url": f"{self.hub.url}/{name}", "id": name}, 409 if there else 200)
        if path == "/api/validate-yaml":
            bad = "license: nonsense" in json.loads(body)["content"]
            errors = [{"message": '"license" must be one of those that the Hub knows'}] if bad else []
            return self._json({"errors": errors, "warnings": []}, 400 if bad else 200)
        parts = [unquote(part) for part in path.removeprefix("/api/models/").split("/")]
        repository = self._open("/".join(parts[:2]))
        if repository is None:
            return None
        what, branch = parts[2], parts[3]
        if what == "branch":
            there = branch in repository.branches
            repository.branches.setdefault(branch, repository.branches["main"])
            return self._json({}, 409 if there else 200)
        if branch not in repository.branches:
            return self._error(404, "RevisionNotFound")
        if what == "preupload":
            files = json.loads(body)["files"]
            return self._json(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        removed = {line["value"]["path"] for line in lines if line["key"] == "deletedFile"}
        message = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        is_pull_request = "create_pr=1" in self.path
        branch = "refs/pr/1" if is_pull_request else branch
        if is_pull_request:
            repository.branches[branch] = repository.branches["main"]
        sha = repository.commit(files, branch, message, removed)
        url = f"{self.hub.url}/{'/'.join(parts[:2])}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "hookOutput": ""}
        return self._json({**answer, "pullRequestUrl": f"{url}/discussions/1"} if is_pull_request else answer)

    def _open(self, name: str) -> Repository | None:
        """The repository, if there is one that whoever asks may see; None: the answer has been given."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self._error(404, "RepoNotFound")
        else:
            return repository
        return None

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(file: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
