"""A hub without a network: what huggingface_hub asks for over HTTP is answered here, and what it sends is kept."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub.utils._http import default_client_factory

COMMITS = ("1" * 40, "2" * 40)


@dataclass
class FakeHub:
    """Files of the repository user/name by commit, and where branches stand.

    `asked` is one line for each request: method, revision and file; `tokens` is who asked.
    """

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    then: Callable[[], None] = lambda: None  # what happens after a file was sent

    def commit(self, folder: Path, commit: str = COMMITS[0], *branches: str) -> None:
        """What is in a folder, as a commit at which main stands, and branches or tags."""
        self.files[commit] = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.branches |= {name: commit for name in ("main", commit, *branches)}

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        user, name, resolve, revision, file = request.url.path.strip("/").split("/")
        assert (user, name, resolve) == ("user", "name", "resolve")
        self.asked.append(f"{request.method} {revision} {file}")
        self.tokens.add(request.headers.get("authorization"))
        commit = self.branches.get(revision)
        if commit is None or file not in self.files[commit]:
            code = "RevisionNotFound" if commit is None else "EntryNotFound"
            return httpx2.Response(404, headers={"X-Error-Code": code}, request=request)
        data = self.files[commit][file]
        headers = {"X-Repo-Commit": commit, "ETag": hashlib.sha256(data).hexdigest(), "Content-Length": str(len(data))}
        if request.method == "HEAD":
            return httpx2.Response(200, headers=headers, request=request)
        self.then()
        return httpx2.Response(200, headers=headers, content=data, request=request)


def cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a test has no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@contextmanager
def serving() -> Iterator[FakeHub]:
    """An empty hub, which huggingface_hub takes for the real one."""
    fake = FakeHub()
    huggingface_hub.set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(fake.answer)))
    try:
        yield fake
    finally:
        huggingface_hub.set_client_factory(default_client_factory)


@dataclass
class Pushed:
    """What `HfApi` was told, and the folder as it was when it was to be uploaded."""

    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    tokens: list[object] = field(default_factory=list)
    there: set[str] = field(default_factory=set)  # files the repository has
    folder: dict[str, bytes] = field(default_factory=dict)
    then: Callable[[Path], None] = lambda folder: None  # what happens while files are sent

    def of(self, method: str) -> dict[str, Any]:
        """The arguments of the only call of a method."""
        (found,) = [settings for name, settings in self.calls if name == method]
        return found


def intercepted(monkeypatch: pytest.MonkeyPatch) -> Pushed:
    """What `HfApi` is told from here on, and nothing is sent."""
    found = Pushed()

    def create_repo(api: huggingface_hub.HfApi, **settings: Any) -> SimpleNamespace:  # noqa: ANN401
        found.tokens.append(api.token)
        found.calls.append(("create_repo", settings))
        name = settings["repo_id"]
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def file_exists(_: object, repo_id: str, filename: str, *, revision: str | None = None) -> bool:
        found.calls.append(("file_exists", {"repo_id": repo_id, "filename": filename, "revision": revision}))
        return filename in found.there

    def upload_folder(_: object, **settings: Any) -> str:  # noqa: ANN401
        folder = Path(settings.pop("folder_path"))
        found.calls.append(("upload_folder", settings))
        found.folder = {file.name: file.read_bytes() for file in folder.iterdir()}
        found.then(folder)
        return f"https://hub.example/{settings['repo_id']}/commit/1"

    for method in (create_repo, file_exists, upload_folder):
        monkeypatch.setattr(huggingface_hub.HfApi, method.__name__, method)
    return found
