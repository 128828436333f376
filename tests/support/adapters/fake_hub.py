"""A Hugging Face Hub of one process: enough of its HTTP API for a snapshot download, and its ways to refuse one."""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


@dataclass
class FakeHub:
    """`files[revision][name]` is the content of one repository, `org/tiny`."""

    files: dict[str, dict[str, bytes]]
    token: str | None = None  # if set: the repository is gated, and only this token opens it
    break_off: dict[str, int] = field(default_factory=dict)  # name → bytes after which its next answer breaks off
    status_after_break: int | None = None  # what `fail_status` becomes then
    fail_status: int | None = None  # if set: every answer
    silent: threading.Event | None = None  # if set: requests wait for it before they are answered
    drip_seconds: float = 0.0  # above 0: contents come one byte at a time, with so long between them
    redirect: str | None = None  # if set: every answer sends the client there
    sizes: dict[str, int] = field(default_factory=dict)  # name → what the list of files says instead of the truth
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range header
    endpoint: str = ""

    def downloaded(self) -> set[str]:
        """Names of the files whose content was asked for."""
        return {path.rsplit("/", 1)[1] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path}


@contextmanager
def serve_hub(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve `hub` on loopback; `hub.endpoint` is its address meanwhile."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if self.hub.silent is not None:
            self.hub.silent.wait(120)
            self.close_connection = True
            return None
        if self.hub.redirect is not None:
            return self._send(302, b"", {"Location": self.hub.redirect})
        if self.hub.fail_status is not None:
            return self._send(self.hub.fail_status, b"{}")
        if self.hub.token is not None and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._send(401, b"{}", {"X-Error-Code": "GatedRepo"})
        match = re.fullmatch(r"(?:/api/models)?/org/tiny/(revision|tree|resolve)/([^/]+)(?:/(.+))?", path)
        if match is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        kind, revision, name = match.groups()
        commit = {"main": COMMIT, "v2": OTHER_COMMIT}.get(revision, revision)
        files = self.hub.files.get(commit)
        if files is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if kind == "revision":
            return self._send_json({"id": "org/tiny", "sha": commit, "siblings": [{"rfilename": n} for n in files]})
        if kind == "tree":
            oids = {n: hashlib.sha1(content).hexdigest() for n, content in files.items()}
            return self._send_json(
                [
                    {"type": "file", "path": n, "size": self.hub.sizes.get(n, len(files[n])), "oid": oids[n]}
                    for n in files
                ]
            )
        return self._send_file(name, files[name], commit)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode())

    def _send_file(self, name: str, content: bytes, commit: str) -> None:
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(part[1]) if part else 0
        if part:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        limit = self.hub.break_off.pop(name, None) if self.command == "GET" else None
        self._send(206 if part else 200, body, headers, limit=limit)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, limit: int | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET" and self.hub.drip_seconds and headers and "ETag" in headers:
            for byte in body:
                time.sleep(self.hub.drip_seconds)
                try:
                    self.wfile.write(bytes([byte]))
                except OSError:  # the client has left
                    return
        elif self.command == "GET":
            self.wfile.write(body[:limit])
        if limit is not None:
            self.close_connection = True
            self.hub.fail_status = self.hub.status_after_break
