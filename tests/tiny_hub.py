"""A hub on loopback that knows what fetching and pushing ask of the real one, and keeps repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest


@dataclass
class Repository:
    """The commits of one repository, each whole, and which of them its branches and tags are."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, files: dict[str, bytes], *refs: str) -> str:
        """Add a commit that holds `files` alone, move `main` and `refs` to it, and return its name."""
        return self.commit_to(("main", *refs), files)

    def commit_to(self, refs: tuple[str, ...], files: dict[str, bytes]) -> str:
        """Add a commit that holds `files` alone, move `refs` to it, and return its name."""
        text = json.dumps({name: hashlib.sha256(content).hexdigest() for name, content in files.items()})
        sha = hashlib.sha1(f"{len(self.commits)} {text}".encode()).hexdigest()
        self.commits[sha] = files
        self.refs.update(dict.fromkeys(refs, sha))
        return sha

    def find(self, revision: str) -> str | None:
        """Return the commit that a branch, a tag or a commit's name means."""
        return self.refs.get(revision, revision if revision in self.commits else None)


class Hub:
    """The repositories by `org/name`; `asked` is every request so far."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.refuses: int | None = None  # the status that whoever pushes is given

    def add(self, name: str, folder: Path, *refs: str, inner: str = "") -> str:
        """Commit what lies in `folder`, set into the folder `inner` of the repository; return the commit."""
        files = {
            f"{inner}{path.relative_to(folder).as_posix()}": path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        return self.repositories.setdefault(name, Repository()).commit(files, *refs)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self._file()

    def do_GET(self) -> None:
        if self.path.startswith("/api/"):
            self._about()
        else:
            self._file()

    def do_POST(self) -> None:
        self.hub.asked.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.hub.refuses:
            self._answer(b'{"error": "no"}', {"Content-Type": "application/json"}, self.hub.refuses)
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        else:
            match = re.match(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/([^/?]+)", self.path)
            assert match, self.path
            self._push(self.hub.repositories[match[1]], *match.groups(), body=body)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        url = {"Content-Type": "application/json"}
        answer = json.dumps({"url": f"http://{self.headers['Host']}/{name}"}).encode()
        if name in self.hub.repositories:
            self._answer(answer, url, 409)
            return
        self.hub.repositories[name] = made = Repository(
            private=bool(asked.get("private")) or asked.get("visibility") == "private"
        )
        made.commit({})
        self._answer(answer, url)

    def _push(self, to: Repository, name: str, what: str, branch: str, *, body: bytes) -> None:
        if what == "branch":
            self._answer(b"", {}, 409 if branch in to.refs else 200)
            to.refs.setdefault(branch, to.refs["main"])
        elif what == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            self._json({"files": [{**one, "shouldIgnore": False} for one in files]})
        else:
            sent = [json.loads(line) for line in body.splitlines()]
            files = {
                one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in sent if one["key"] == "file"
            }
            sha = to.commit_to((branch,), {**to.commits[to.refs[branch]], **files})
            self._json(
                {"success": True, "commitOid": sha, "commitUrl": f"http://{self.headers['Host']}/{name}/commit/{sha}"}
            )

    def _about(self) -> None:
        match = re.match(r"/api/models/([^/]+/[^/]+)(?:/(tree|revision)/([^/?]+))?", self.path)
        sha = self._commit(match[1], match[3] or "main") if match else None
        if match is None or sha is None:
            return
        files = self.hub.repositories[match[1]].commits[sha]
        if match[2] == "tree":
            self._json([{"type": "file", "path": n, "size": len(c), "oid": _oid(c)} for n, c in files.items()])
        else:
            names = [{"rfilename": name} for name in files]
            self._json(
                {"id": match[1], "sha": sha, "siblings": names, "private": self.hub.repositories[match[1]].private}
            )

    def _file(self) -> None:
        match = re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        sha = self._commit(match[1], match[2]) if match else None
        if match is None or sha is None:
            return
        content = self.hub.repositories[match[1]].commits[sha].get(match[3])
        if content is None:
            self._fault("EntryNotFound")
        else:
            self._answer(content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": sha})

    def _commit(self, name: str, revision: str) -> str | None:
        self.hub.asked.append(f"{self.command} {self.path}")
        repository = self.hub.repositories.get(name)
        sha = repository.find(revision) if repository else None
        if sha is None:
            self._fault("RevisionNotFound" if repository else "RepoNotFound")
        return sha

    def _fault(self, code: str) -> None:
        self._answer(b"{}", {"X-Error-Code": code, "X-Error-Message": code}, 404)

    def _json(self, content: Any) -> None:
        self._answer(json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def running(cache: Path, patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run a hub that the hub's library asks in place of the real one, with an empty cache in `cache`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connect(f"http://127.0.0.1:{server.server_port}", cache, patch)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def connect(endpoint: str, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Let the hub's library, which read its settings when it was imported, ask `endpoint` and keep files in `cache`."""
    huggingface_hub.utils.disable_progress_bars()  # as commands do before they import it
    constants = huggingface_hub.constants
    patch.setattr(constants, "ENDPOINT", endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
