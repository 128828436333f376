"""The load test itself against a stub whose times are known: what it calls a first token is the first token."""

import importlib.util
import json
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

# Not importorskip: importing locust replaces half of the standard library (gevent), also for the tests after this.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="needs the loadtest extra")
LOCUSTFILE = Path(__file__).resolve().parents[2] / "loadtest" / "locustfile.py"
BEFORE, BETWEEN, NUM_TOKENS = 0.2, 0.1, 6  # seconds; the stub sleeps at least that long


def chunk(delta, finish=None, **fields):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **fields}


class Stub(BaseHTTPRequestHandler):
    """Models that behave, and models that fail in one way each. One is not sent in HTTP chunks, as by some proxies:
    there a client that reads more than a byte at a time waits until as many are there."""

    protocol_version = "HTTP/1.1"
    asked: list = []

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.reply(200, {"data": [{"id": name} for name in ("good", "other")]})

    def reply(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send(self, event):
        data = b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if self.chunked else data)
        self.wfile.flush()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((body, self.headers["Authorization"]))
        model = body["model"]
        if model == "busy":
            self.reply(503, {"error": {"code": "overloaded"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.chunked = model != "other"
        self.send_header(*("Transfer-Encoding", "chunked") if self.chunked else ("Connection", "close"))
        self.end_headers()
        self.send(chunk({"role": "assistant", "content": ""}))
        time.sleep(BEFORE)
        for number in range(NUM_TOKENS):
            self.send(chunk({"content": f"{number} "}))
            time.sleep(BETWEEN)
        if model == "broken":
            self.send({"error": {"code": "engine_error"}})
        elif model != "cut":
            if model != "endless":
                self.send(chunk({}, "length"))
            self.send({"choices": [], "usage": {"completion_tokens": 2 * NUM_TOKENS}})
            self.send(b"[DONE]")
        if self.chunked:
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Clients are cut off at the end of a run."""


@pytest.fixture
def stub():
    Stub.asked = []
    server = QuietServer(("127.0.0.1", 0), Stub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join(timeout=20)


def run_locust(url, folder, *options):
    """A short run; its exit status and what was printed."""
    command = [
        *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--host", url, "-u", "3", "-r", "3"),
        *("-t", "4", "--stop-timeout", "30", *options),
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def run_for_rows(url, folder, *options):
    """The same, and the final rows by (type, name); locust then leaves out its table of errors."""
    done = run_locust(url, folder, "--json-file", str(folder / "run"), *options)
    rows = json.loads((folder / "run.json").read_text())
    return {(row["method"], row["name"]): row for row in rows}, done


def test_rows_are_what_they_say(stub, tmp_path):
    rows, done = run_for_rows(stub, tmp_path, "--api-key", "secret", "--ignore-eos", "--max-tokens", "6")
    assert done.returncode == 0, done.stderr[-2000:]
    measured = {(row, model) for row in ("TTFT", "ITL", "E2E") for model in ("good", "other")}
    assert set(rows) == {("GET", "/v1/models")} | measured
    total = 0
    for model in ("good", "other"):
        ttft, itl, e2e = (rows[row, model] for row in ("TTFT", "ITL", "E2E"))
        count = e2e["num_requests"]
        total += count
        assert ttft["num_requests"] == count >= 1
        assert itl["num_requests"] == count * (NUM_TOKENS - 1)
        assert ttft["num_failures"] == itl["num_failures"] == e2e["num_failures"] == 0
        assert ttft["min_response_time"] >= 1000 * BEFORE
        assert itl["total_response_time"] >= 900 * BETWEEN * itl["num_requests"]
        # What a client that waits for a full buffer gets wrong: the rest of the stream comes after the first token.
        rest = (e2e["total_response_time"] - ttft["total_response_time"]) / count
        assert rest >= 1000 * BETWEEN * (NUM_TOKENS - 1)
        assert e2e["total_content_length"] == 2 * NUM_TOKENS * count
    assert f"all: {2 * NUM_TOKENS * total} tokens" in done.stdout
    assert {key for _, key in Stub.asked} == {"Bearer secret"}
    contents = [body["messages"][0]["content"] for body, _ in Stub.asked]
    assert len(set(contents)) == len(contents), "prompts repeat, and a prefix cache would answer them"
    assert all(body["stream"] and body["ignore_eos"] and body["max_tokens"] == 6 for body, _ in Stub.asked)


def test_every_kind_of_failure_is_counted(stub, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "p"}\n\n{"text": "t"}\n{"input": "i"}\n{"messages": [{"role": "user", "content": "m"}]}\n'
    )
    models = ["--models", "busy,cut,broken,endless", "-u", "8", "-r", "8"]
    done = run_locust(stub, tmp_path, *models, "--prompts-file", str(prompts), "--shared-prompts", "--only-summary")
    assert done.returncode == 1, "locust's sign that something failed"
    printed = done.stdout + done.stderr
    assert "/v1/models" not in printed
    reasons = {"busy": "status 503", "cut": r"without \[DONE\]", "broken": "engine_error", "endless": "finish_reason"}
    for model, reason in reasons.items():
        assert re.search(rf"E2E +{model} +[1-9]\d* +\d+\(100.00%\)", printed), model
        assert re.search(rf"E2E {model}: .*{reason}", printed), model
    assert {body["messages"][0]["content"] for body, _ in Stub.asked} <= {"p", "t", "i", "m"}


def test_a_server_that_is_not_there_is_counted_as_a_failure(tmp_path):
    silent = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    silent.server_close()
    rows, done = run_for_rows(f"http://127.0.0.1:{silent.server_port}", tmp_path)
    assert done.returncode == 1
    assert rows["GET", "/v1/models"]["num_failures"] >= 3
