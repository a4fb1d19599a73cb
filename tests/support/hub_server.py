"""A hub of the test's own, on loopback, with what the hub's client asks for when a model is pushed: repositories, branches,
commits, and LFS uploads. It checks the digest of every file that arrives."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_aTokenOfTheTest"
LOCKED = "locked"
"""An owner whose repositories the token may not write."""


@dataclass
class Repository:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(
        default_factory=lambda: {"main": {".gitattributes": b"*.safetensors filter=lfs"}}
    )
    messages: list[str] = field(default_factory=list)


class Refused(Exception):
    """Status, message for the client, and the code that the hub gives for it."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class HubServer:
    """`repositories` hold the files of every branch. `fails`: path's part -> status of every request to it."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    verified: set[str] = field(default_factory=set)
    fails: dict[str, int] = field(default_factory=dict)

    def add(self, repo_id: str, private: bool = True, **files: bytes) -> Repository:
        self.repositories[repo_id] = Repository(private)
        self.repositories[repo_id].branches["main"].update(files)
        return self.repositories[repo_id]

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """Of a branch, without the hub's own."""
        found = self.repositories[repo_id].branches[branch]
        return {name: content for name, content in found.items() if name != ".gitattributes"}

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> Any:
        for part, status in self.fails.items():
            if part in path:
                raise Refused(status, "as the test said")
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if method == "PUT" and parts[0] == "storage":
            # A storage of its own, which knows no tokens: the address is the permission.
            assert hashlib.sha256(body).hexdigest() == parts[1], "another file than was announced"
            self.uploads[parts[1]] = body
            return {}
        if token != f"Bearer {TOKEN}":
            raise Refused(401, "Invalid credentials in Authorization header")
        if parts[0] == "verified":
            asked = json.loads(body)
            assert len(self.uploads[asked["oid"]]) == asked["size"]
            self.verified.add(asked["oid"])
            return {}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return {"warnings": [], "errors": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            return {"transfer": "basic", "objects": [self._place(each) for each in json.loads(body)["objects"]]}
        assert parts[:2] == ["api", "models"], f"{method} {path}: not among what the stand-in knows"
        repo_id = "/".join(parts[2:4])
        if repo_id not in self.repositories:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return self._of_repository(repo_id, parts[4:], body)

    def _create(self, asked: dict[str, Any]) -> Any:
        owner = asked["organization"]
        if owner == LOCKED:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {LOCKED!r}")
        repo_id = f"{owner}/{asked['name']}"
        if repo_id in self.repositories:
            raise Refused(409, "You already created this model repo")
        self.add(repo_id, asked.get("visibility") == "private")
        return {"url": f"{self.url}/{repo_id}"}

    def _place(self, asked: dict[str, Any]) -> Any:
        upload = {"href": f"{self.url}/storage/{asked['oid']}"}
        return asked | {"actions": {"upload": upload, "verify": {"href": f"{self.url}/verified"}}}

    def _of_repository(self, repo_id: str, asked: list[str], body: bytes) -> Any:
        repository = self.repositories[repo_id]
        match asked:
            case []:
                return {"id": repo_id, "private": repository.private, "sha": "0" * 40}
            case ["branch", name]:
                if name in repository.branches:
                    raise Refused(409, "Reference already exists")
                repository.branches[name] = dict(repository.branches["main"])
                return {}
        what, name = asked
        if name not in repository.branches:
            raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
        files = repository.branches[name]
        match what:
            case "revision":
                return {"id": repo_id, "private": repository.private, "sha": "0" * 40}
            case "tree":
                return [
                    {"type": "file", "path": path, "oid": "0" * 40, "size": len(content)} for path, content in files.items()
                ]
            case "preupload":
                return {"files": [self._mode(each["path"]) for each in json.loads(body)["files"]]}
            case "commit":
                self._commit(repository, files, [json.loads(line) for line in body.splitlines()])
                return {"commitUrl": f"{self.url}/{repo_id}/commit/{'1' * 40}", "commitOid": "1" * 40}
        raise AssertionError(f"{what}: not among what the stand-in knows")

    def _mode(self, path: str) -> Any:
        return {"path": path, "uploadMode": "lfs" if path.endswith(".safetensors") else "regular", "shouldIgnore": False}

    def _commit(self, repository: Repository, files: dict[str, bytes], operations: list[dict[str, Any]]) -> None:
        for operation in operations:
            value = operation["value"]
            match operation["key"]:
                case "header":
                    repository.messages.append(value["summary"])
                case "file":
                    assert not value["path"].endswith(".safetensors")
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    assert value["oid"] in self.verified, "committed before it was uploaded"
                    files[value["path"]] = self.uploads[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
                case other:
                    raise AssertionError(f"{other}: not among what the stand-in knows")


@contextmanager
def hub_server() -> Iterator[HubServer]:
    hub = HubServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            path = urlsplit(self.path).path
            code, message = "", ""
            try:
                answer, status = hub.answer(str(self.command), path, self._body(), self.headers.get("Authorization")), 200
            except Refused as refused:
                answer, status, code, message = {"error": str(refused)}, refused.status, refused.code, str(refused)
                if status == 409:
                    answer["url"] = f"{hub.url}/an/existing"
            except (AssertionError, KeyError, ValueError) as error:
                # The client sees a request that the hub did not understand, so that the test fails with the reason.
                answer, status, message = {"error": repr(error)}, 422, repr(error)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if message:
                self.send_header("X-Error-Message", message)
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _handle

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content

        def log_message(self, *_: Any) -> None:
            """Nothing: pytest's output is the test's."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
