"""A small server on the loopback address that answers as the Hugging Face hub does, for the tests."""

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
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 1024
"""Files of at least so many bytes are answered by a redirect to another address, as files in Git LFS are."""


@dataclass
class Repository:
    """One repository: its commits, the revisions that point to them, and who may read it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], revision: str = "main") -> str:
        """Add a commit with these files, move a revision to it and return its hash."""
        digest = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[digest] = dict(files)
        self.revisions[revision] = digest
        return digest

    def find(self, revision: str) -> str | None:
        """Return the hash of a revision."""
        return revision if revision in self.commits else self.revisions.get(revision)


@dataclass
class StandInHub:
    """The repositories of the server, what goes wrong, and what was asked."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    fault: str = ""
    """"rate": 429; "cut": the connection closes halfway through the first answer; "short": fewer bytes than announced
    each time; "down": 503; "denied": 403 for every change."""
    requests: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    endpoint: str = ""
    terms: list[str] = field(default_factory=list)
    """Texts of commit messages."""

    def add(self, name: str, files: dict[str, bytes], **settings: Any) -> Repository:
        """Add a repository with one commit."""
        repository = self.repositories[name] = Repository(**settings)
        repository.commit(files)
        return repository

    def count(self, pattern: str) -> int:
        """Return how many requests match a regular expression."""
        return sum(re.search(pattern, request) is not None for request in self.requests)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    hub: StandInHub

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, value: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, status: int, code: str = "") -> None:
        headers = {"X_Error_Code": code} if code else {}
        self.answer(status, b'{"error": "refused"}', **headers)

    def repository(self, name: str, revision: str) -> tuple[Repository, str] | None:
        """Return a repository and a commit; answer with an error and return None if there is none."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and "authorization" not in self.headers):
            self.refuse(401 if "authorization" not in self.headers else 404, "RepoNotFound")
            return None
        commit = repository.find(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound")
            return None
        return repository, commit

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.fault in ("rate", "down"):
            self.refuse(429 if self.hub.fault == "rate" else 503)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.describe(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            self.list_files(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            self.send_blob(self.hub.blobs[match[1]])
        elif path == "/api/whoami-v2":
            self.answer_json({"type": "user", "name": "ann", "orgs": []})
        else:
            self.refuse(404)

    def describe(self, name: str, revision: str) -> None:
        found = self.repository(name, revision)
        if found:
            repository, commit = found
            siblings = [
                entry(path, content) | {"rfilename": path} for path, content in repository.commits[commit].items()
            ]
            self.answer_json({"id": name, "sha": commit, "siblings": siblings, "private": repository.private})

    def list_files(self, name: str, revision: str) -> None:
        found = self.repository(name, revision)
        if found:
            repository, commit = found
            self.answer_json([entry(path, content) for path, content in repository.commits[commit].items()])

    def resolve(self, name: str, revision: str, file: str) -> None:
        found = self.repository(name, revision)
        if not found:
            return
        repository, commit = found
        if repository.gated:
            self.refuse(403, "GatedRepo")
            return
        content = repository.commits[commit].get(file)
        if content is None:
            self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        elif len(content) < LARGE:
            self.answer(200, content, X_Repo_Commit=commit, ETag=f'"{git_id(content)}"')
        else:
            self.hub.blobs[sha256(content)] = content
            self.answer(
                302,
                X_Repo_Commit=commit,
                X_Linked_Etag=f'"{sha256(content)}"',
                X_Linked_Size=str(len(content)),
                Location=f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/cdn/{sha256(content)}",
            )

    def send_blob(self, content: bytes) -> None:
        start = 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            self.hub.requests[-1] += f" from {start}"
        rest = content[start:]
        status = 206 if start else 200
        headers = {"ETag": f'"{sha256(content)}"'}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.hub.fault == "short":
            self.answer(status, rest[: len(rest) // 2], **headers)
            return
        if self.hub.fault == "cut" and not start:
            self.answer(status, rest[: len(rest) // 2], Content_Length=str(len(rest)), **headers)
            self.close_connection = True
            return
        self.answer(status, rest, **headers)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(f"POST {path}")
        if self.hub.fault in ("rate", "denied", "down"):
            self.refuse({"rate": 429, "denied": 403, "down": 503}[self.hub.fault])
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/.+/preupload/.+", path):
            files = json.loads(body)["files"]
            modes = ["lfs" if file["size"] >= LARGE else "regular" for file in files]
            self.answer_json(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                        for file, mode in zip(files, modes, strict=True)
                    ]
                }
            )
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.answer_lfs_batch(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            self.receive_commit(match[1], match[2], body)
        else:
            self.refuse(404)

    def create(self, request: dict[str, Any]) -> None:
        organisation = request.get("organization") or "ann"
        name = f"{organisation}/{request['name']}"
        if name in self.hub.repositories:
            self.answer_json({"url": f"{self.hub.endpoint}/{name}"}, 409)
            return
        self.hub.add(name, {}, private=bool(request.get("private") or request.get("visibility") == "private"))
        self.answer_json({"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name})

    def answer_lfs_batch(self, request: dict[str, Any]) -> None:
        objects = [
            item | {"actions": {"upload": {"href": f"{self.hub.endpoint}/upload/{item['oid']}", "header": {}}}}
            for item in request["objects"]
        ]
        self.answer_json({"transfer": "basic", "objects": objects})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append(f"PUT {self.path}")
        self.hub.blobs[sha256(content)] = content
        self.answer(200)

    def receive_commit(self, name: str, revision: str, body: bytes) -> None:
        repository = self.hub.repositories[name]
        head = repository.find(revision)
        files = dict(repository.commits[head]) if head else {}
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                self.hub.terms.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
        commit = repository.commit(files, revision)
        url = f"{self.hub.endpoint}/{name}/commit/{commit}"
        self.answer_json({"success": True, "commitUrl": url, "commitOid": commit, "hookOutput": ""})


def entry(path: str, content: bytes) -> dict[str, Any]:
    """Return a file as the hub lists it."""
    described: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
    described |= {"blobId": described["oid"]}
    if len(content) >= LARGE:
        described["lfs"] = {"oid": sha256(content), "sha256": sha256(content), "size": len(content), "pointerSize": 134}
    return described


@contextmanager
def serve() -> Iterator[StandInHub]:
    """Run the server within the block."""
    hub = StandInHub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
