"""A stand-in for the hub on 127.0.0.1, with the few endpoints that huggingface_hub uses to download a model.

A repository is a folder for each of its refs. Fields control the behaviour that tests need: gated models, pull requests
of other users, a connection that breaks in the middle of a file.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants


@dataclass
class Repository:
    """A model on the hub."""

    main: Path
    """Folder with the files of the branch main."""
    requests: dict[int, tuple[str, Path, str]] = field(default_factory=dict)
    """Pull requests: author, files and status, by number."""
    gated: bool = False
    """Whether files are only for users who accepted a licence."""
    cut: str = ""
    """Name of a file whose transfer breaks in the middle."""

    def at(self, revision: str) -> Path | None:
        """Return the folder of a branch, a pull request or a commit; None if there is none."""
        for ref, folder in {"main": self.main, **{f"refs/pr/{n}": r[1] for n, r in self.requests.items()}}.items():
            if revision in (ref, commit(folder)):
                return folder
        return None


@dataclass
class StandIn:
    """A running stand-in; models may be added at any time."""

    models: dict[str, Repository] = field(default_factory=dict)
    """Models by name."""
    asked: list[str] = field(default_factory=list)
    """Requests: method and path."""
    address: str = ""
    """URL of the stand-in."""


def commit(folder: Path) -> str:
    """Return the commit of a folder: a hash of its names and bytes."""
    found = hashlib.sha1()
    for path in sorted(folder.iterdir()):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def _entry(path: Path) -> dict[str, Any]:
    """Return the entry of a file in a listing; weights are in large file storage."""
    content = path.read_bytes()
    entry: dict[str, Any] = {
        "type": "file",
        "path": path.name,
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }
    if path.suffix in (".bin", ".safetensors"):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


class _Handler(BaseHTTPRequestHandler):
    stand_in: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Answer requests for listings and files."""
        self._answer()

    def do_HEAD(self) -> None:
        """Answer requests for the headers of a file."""
        self._answer()

    def do_POST(self) -> None:
        """Answer requests for information on several files."""
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.stand_in.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        place = path.removeprefix("/api/models/") if path.startswith("/api/models/") else path[1:]
        owner, name, *rest = place.split("/")
        repository = self.stand_in.models.get(f"{owner}/{name}")
        if repository is None:
            self._send(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/"):
            self._listing(f"{owner}/{name}", repository, rest, body)
        else:
            self._file(repository, "/".join(rest[1:-1]), rest[-1])

    def _listing(self, name: str, repository: Repository, rest: list[str], body: str) -> None:
        if rest[:1] == ["discussions"]:
            found = [
                {"num": n, "title": "Adding `safetensors` variant of this model", "author": {"name": author},
                 "isPullRequest": True, "status": status, "createdAt": "2023-10-09T00:00:00.000Z",
                 "repo": {"name": name, "type": "model"}}
                for n, (author, _, status) in repository.requests.items()
            ]  # fmt: skip
            self._send(200, {"discussions": found, "count": len(found), "start": 0})
            return
        folder = repository.at("/".join(rest[1:]) or "main")
        if folder is None:
            self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        elif rest[:1] == ["tree"]:
            self._send(200, [_entry(path) for path in sorted(folder.iterdir())])
        elif rest[:1] == ["paths-info"]:
            asked = parse_qs(body)["paths"]
            self._send(200, [_entry(folder / path) for path in asked if (folder / path).is_file()])
        else:
            files = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
            self._send(200, {"id": name, "sha": commit(folder), "private": False, "siblings": files})

    def _file(self, repository: Repository, revision: str, file: str) -> None:
        folder = repository.at(revision)
        if repository.gated:
            self._send(403, {"error": "Access to this model is restricted"}, {"X-Error-Code": "GatedRepo"})
        elif folder is None or not (folder / file).is_file():
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        else:
            content = (folder / file).read_bytes()
            etag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit(folder)}
            self._send(200, content, etag, cut=file == repository.cut)

    def _send(self, status: int, answer: Any, headers: dict[str, str] | None = None, *, cut: bool = False) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        wanted = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0]
        begin = int(wanted) if isinstance(answer, bytes) else 0
        content = content[begin:]
        self.send_response(206 if begin else status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut


@contextmanager
def stand_in(cache: Path) -> Iterator[StandIn]:
    """Start a hub that this process uses instead of the real one, with an empty cache."""
    serving = StandIn()
    handler = type("Handler", (_Handler,), {"stand_in": serving})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    serving.address = f"http://127.0.0.1:{server.server_address[1]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", serving.address)
        files = serving.address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setenv("QLLAVA_CACHE", str(cache / "qllava"))
        try:
            yield serving
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
