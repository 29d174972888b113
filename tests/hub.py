"""A stand-in for the hub: the calls that huggingface_hub makes to publish, kept in memory, with planned mishaps."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils.sha import git_hash

LARGE = (".safetensors", ".png")
"""Endings of files that go to the large file storage, as the hub's own .gitattributes says."""


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    card: dict[str, str] = field(default_factory=dict)
    """Front matter of its card"""
    commits: list[list[str]] = field(default_factory=list)
    """The paths of each"""

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.seen: list[tuple[str, str, bytes]] = []
        """Method, path and body of each request"""
        self.authorised: set[str] = set()
        self.before: Callable[[str, str], bool] = lambda method, path: False
        """Asked when a request has come whole: True drops its connection, and nothing is done"""
        self.after: Callable[[str, str], bool] = lambda method, path: False
        """The same when it is done and only the answer is missing"""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def calls(self, method: str, part: str) -> list[str]:
        return [path for known, path, _ in self.seen if known == method and part in path]

    def sent(self) -> bytes:
        """All that has come: paths, bodies, and what is in base64 in them."""
        parts = []
        for _, path, body in self.seen:
            parts += [path.encode(), body]
            for line in body.splitlines() if "/commit/" in path or "/preupload/" in path else ():
                told = json.loads(line)
                inner = [told.get("value", {}), *told.get("files", [])]
                parts += [base64.b64decode(one[key]) for one in inner if isinstance(one, dict)
                          for key in ("content", "sample") if key in one]  # fmt: skip
        return b"\n".join(parts)


def once(matches: Callable[[str, str], bool]) -> Callable[[str, str], bool]:
    """The first request that matches."""
    left = [True]

    def mishap(method: str, path: str) -> bool:
        if left and matches(method, path):
            left.clear()
            return True
        return False

    return mishap


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: Any) -> None:
        pass

    def handle_any(self) -> None:
        body = self.body()
        path = self.path.partition("?")[0]
        self.server.seen.append((self.command, self.path, body))
        self.server.authorised.add(self.headers.get("Authorization", ""))
        if self.server.before(self.command, path):
            return self.drop()
        status, answer = self.answer(path, body)
        if self.server.after(self.command, path):
            return self.drop()
        told = json.dumps(answer).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    do_GET = do_POST = do_PUT = handle_any

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while length := int(self.rfile.readline(), 16):
            body += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def drop(self) -> None:
        self.close_connection = True
        self.connection.close()

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        parts = path.strip("/").split("/")
        if self.command == "PUT":
            return self.store(parts[-1], body)
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.endswith("/verify"):
            return 200, {}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self.offer(one) for one in json.loads(body)["objects"]]}
        name = "/".join(parts[2:4])
        if name not in self.server.repos:
            return 404, {"error": "Repository not found"}
        repo = self.server.repos[name]
        if "preupload" in parts:
            return 200, {"files": [self.mode(repo, one["path"]) for one in json.loads(body)["files"]]}
        if "commit" in parts:
            return self.commit(name, repo, [json.loads(line) for line in body.splitlines()])
        return 200, {"id": name, "private": repo.private, "sha": repo.sha, "siblings": [], "tags": [],
                     "cardData": repo.card}  # fmt: skip

    def create(self, told: dict[str, Any]) -> tuple[int, Any]:
        name = f"{told['organization']}/{told['name']}"
        if name in self.server.repos:
            return 409, {"error": "You already created this model repo"}
        self.server.repos[name] = Repo(told.get("private", told.get("visibility") == "private"))
        return 200, {"url": f"{self.server.url}/{name}"}

    def validate(self, content: str) -> tuple[int, Any]:
        """What the hub holds front matter to, as far as we write it."""
        data = yaml.safe_load(REGEX_YAML_BLOCK.search(content)[2])
        wrong = [name for name in ("license", "library_name", "pipeline_tag", "instance_prompt")
                 if name in data and not isinstance(data[name], str)]  # fmt: skip
        wrong += [] if all(isinstance(tag, str) for tag in data.get("tags", [])) else ["tags"]
        wrong += [] if data.get("base_model_relation") in (None, "adapter", "finetune") else ["base_model_relation"]
        return (400 if wrong else 200), {"errors": [{"message": name} for name in wrong], "warnings": []}

    def mode(self, repo: Repo, path: str) -> dict[str, Any]:
        large, held = path.endswith(LARGE), repo.files.get(path)
        oid = None if held is None else hashlib.sha256(held).hexdigest() if large else git_hash(held)
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def offer(self, told: dict[str, Any]) -> dict[str, Any]:
        if told["oid"] in self.server.blobs:
            return told
        actions = {"upload": {"href": f"{self.server.url}/storage/{told['oid']}"},
                   "verify": {"href": f"{self.server.url}/verify"}}  # fmt: skip
        return {**told, "actions": actions}

    def store(self, oid: str, body: bytes) -> tuple[int, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "other bytes than their name says"}
        self.server.blobs[oid] = body
        return 200, {}

    def commit(self, name: str, repo: Repo, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        paths = []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.server.blobs[value["oid"]]
            else:
                continue
            paths.append(value["path"])
        repo.commits.append(paths)
        return 200, {"commitUrl": f"{self.server.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha}
