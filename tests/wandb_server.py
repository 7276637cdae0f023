"""A W&B server on this machine, as good as `wandb sync` needs it, or as bad as servers can be."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "a" * 40
"""What W&B takes for a key until it asks a server."""


class Server(ThreadingHTTPServer):
    """Hold what was asked of it: operations in order, and the lines of history by their place."""

    daemon_threads = True

    def __init__(self, status: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = status
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.history: dict[int, dict[str, Any]] = {}
        self.bucket: dict[str, Any] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, operation: str, values: dict[str, Any]) -> dict[str, Any]:
        """Answer GraphQL; only what `wandb sync` reads of an answer is in it."""
        self.asked.append((operation, values))
        if operation == "UpsertBucket":
            project = {"id": "1", "name": values["project"], "entity": {"id": "2", "name": "me"}}
            named = {name: values.get(name) or "" for name in ("name", "displayName")}
            self.bucket = {"id": "3", "description": "", "config": values.get("config"), "project": project, **named}
            return {"upsertBucket": {"bucket": self.bucket, "inserted": True}}
        if operation == "RunResumeStatus":
            return {"model": {"id": "1", "name": "x", "entity": {"id": "2", "name": "me"}, "bucket": self._resumed()}}
        if operation == "CreateArtifact":
            artifact = {"id": "4", "state": "COMMITTED", "artifactSequence": {"id": "5", "latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/storage/{name}"} for name in values["files"]]
            return {"createRunFiles": {"runID": "3", "uploadHeaders": [], "files": files}}
        if operation == "Viewer":
            account = {"id": "2", "entity": "me", "username": "me", "email": "me@here", "flags": "{}"}
            return {"viewer": {**account, "teams": {"edges": []}}}
        if operation == "UpsertSweep":
            project = {"id": "1", "name": "x", "entity": {"id": "2", "name": "me"}}
            return {
                "upsertSweep": {"sweep": {"id": "6", "name": "s", "project": project}, "configValidationWarnings": []}
            }
        if operation == "NotifyScriptableRunAlert":
            return {"notifyScriptableRunAlert": {"success": True}}
        return {}

    def _resumed(self) -> dict[str, Any] | None:
        if self.bucket is None:
            return None
        tail = [json.dumps(self.history[max(self.history)])] if self.history else []
        counts = {"historyLineCount": len(self.history), "eventsLineCount": 0, "logLineCount": 0}
        tails = {"historyTail": json.dumps(tail), "eventsTail": "[]", "summaryMetrics": "{}", "tags": []}
        return {**self.bucket, **counts, **tails, "wandbConfig": '{"t": 1}'}


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer: dict[str, Any] = {}
        if self.server.status == 200 and self.path == "/graphql":
            query = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", query["query"])
            assert operation is not None
            answer = {"data": self.server.answer(operation[1], query.get("variables") or {})}
        elif self.server.status == 200 and self.path.endswith("/file_stream"):
            lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            for place, line in enumerate(lines["content"], lines["offset"]):
                self.server.history[place] = json.loads(line)
        text = json.dumps(answer).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_PUT = do_POST

    def log_message(self, *args: Any) -> None:
        """Print nothing."""


@contextmanager
def serving(status: int = 200) -> Iterator[Server]:
    """Serve with this status: 200 takes everything, any other says no to everything."""
    server = Server(status)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def broken(how: str) -> Iterator[str]:
    """The address of a server that ``refuses``, ``hangs``, or says a status such as ``500`` to everything."""
    if how not in ("refuses", "hangs"):
        with serving(int(how)) as server:
            yield server.url
        return
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        if how == "hangs":
            port.listen(64)
        yield f"http://127.0.0.1:{port.getsockname()[1]}"
