"""A Hugging Face Hub on this machine: as much of its HTTP interface as its own client needs for small repositories."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

MODEL = re.compile(r"/api/models/([^/]+/[^/]+)/(\w+)/([^/?]+)(?:/.*)?")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Hub(ThreadingHTTPServer):
    """Hold repositories: of each its commits by their digest, and what a branch or tag stands at."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, name: str, branch: str, files: dict[str, bytes]) -> str:
        """Add files to what a branch holds; return the commit."""
        content = self.commits[name].get(self.branches[name].get(branch, ""), {}) | files
        mark = hashlib.sha1(repr((branch, len(self.commits[name]), sorted(content))).encode()).hexdigest()
        self.commits[name][mark] = content
        self.branches[name][branch] = mark
        return mark

    def at(self, name: str, revision: str) -> str | None:
        """The commit that a branch, tag or commit means."""
        revision = unquote(revision)
        mark = self.branches.get(name, {}).get(revision, revision)
        return mark if mark in self.commits.get(name, {}) else None


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body, hub = self.rfile.read(int(self.headers.get("Content-Length") or 0)), self.server
        if hub.status != 200:
            return self._say(hub.status, {"error": "no"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            if name in hub.commits:
                return self._say(409, {"error": "exists", "url": f"{hub.url}/{name}"})
            hub.commits[name], hub.branches[name], hub.private[name] = (
                {},
                {},
                asked.get("private") is True or asked.get("visibility") == "private",
            )
            hub.commit(name, "main", {})
            return self._say(200, {"url": f"{hub.url}/{name}"})
        if self.path == "/api/validate-yaml":
            return self._say(200, {"errors": [], "warnings": []})
        found = MODEL.fullmatch(self.path)
        assert found is not None, self.path
        name, verb, revision = found.groups()
        if verb == "branch":
            hub.branches[name][revision] = hub.branches[name]["main"]
            return self._say(200, {})
        if verb == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in files]
            return self._say(200, {"files": modes})
        assert verb == "commit", self.path
        lines = [json.loads(line) for line in body.splitlines()]
        new = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        hub.messages += [line["value"]["summary"] for line in lines if line["key"] == "header"]
        mark = hub.commit(name, unquote(revision), new)
        return self._say(200, {"commitUrl": f"{hub.url}/{name}/commit/{mark}", "commitOid": mark, "hookOutput": ""})

    def do_GET(self) -> None:
        hub = self.server
        if hub.status != 200:
            return self._say(hub.status, {"error": "no"})
        if found := FILE.fullmatch(self.path):
            name, revision, path = found.groups()
            mark = hub.at(name, revision)
            content = None if mark is None else hub.commits[name][mark].get(unquote(path))
            if content is None:
                return self._say(404, {}, "EntryNotFound")
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self._say(200, content, headers={"ETag": etag, "X-Repo-Commit": str(mark)})
        if self.path.startswith("/api/whoami"):
            return self._say(200, {"name": "me", "type": "user"})
        found = MODEL.fullmatch(self.path.split("?")[0])
        name = found[1] if found else self.path.split("?")[0].removeprefix("/api/models/")
        if name not in hub.commits:
            return self._say(404, {"error": "Repository not found"}, "RepoNotFound")
        if (mark := hub.at(name, found[3] if found else "main")) is None:
            return self._say(404, {"error": "no revision"}, "RevisionNotFound")
        files = hub.commits[name][mark]
        if found and found[2] == "tree":
            return self._say(
                200,
                [
                    {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for p, c in files.items()
                ],
            )
        about = {"id": name, "modelId": name, "sha": mark, "private": hub.private[name], "tags": [], "downloads": 0}
        return self._say(200, {**about, "likes": 0, "siblings": [{"rfilename": path} for path in files]})

    do_HEAD = do_GET

    def _say(self, status: int, answer: Any, error: str = "", headers: dict[str, str] | None = None) -> None:
        text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, *args: Any) -> None:
        """Print nothing."""


@contextmanager
def hub(patch: pytest.MonkeyPatch, cache: Any) -> Iterator[Hub]:
    """Serve a Hub, which the client of this process takes for the real one, with a cache of its own."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "ENDPOINT", server.url)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setenv("HF_TOKEN", "hf_of_a_test")
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
