"""POST /v1/drain ends the server in order, for the admin key alone."""

from pathlib import Path

import httpx

from guanaco.server.api.http.auth import KeyRing
from support.server.adapter_server import ADMIN, make_adapter_server
from support.server.api_server import WAIT, LiveServer, chat_body, http_post, make_state, read_all


def test_it_ends_the_server_as_sigterm_does(tmp_path: Path) -> None:
    with make_adapter_server(tmp_path, drain_timeout=7.0) as server:
        with server.client() as client:
            assert client.post("/v1/drain").status_code == 401
            assert client.get("/health/ready").status_code == 200
            answer = client.post("/v1/drain", headers=ADMIN)
        assert (answer.status_code, answer.json()) == (
            202,
            {"object": "drain", "status": "draining", "seconds_at_most": 7.0},
        )
        server.join()
        assert server.server.exit_code == 0


def test_what_runs_may_finish() -> None:
    state = make_state(drain_timeout=WAIT)
    object.__setattr__(state, "admin_keys", KeyRing(["sesame"]))
    with LiveServer(state) as server, server.connect() as sock:
        gate = server.gate()
        sock.sendall(http_post("/v1/chat/completions", chat_body(stream=True, max_tokens=5)))
        server.until(lambda engine: len(engine.running) == 1)
        with server.client(headers=ADMIN) as client:
            assert client.post("/v1/drain").status_code == 202
            assert client.get("/health/ready").json() == {"status": "draining"}
            server.until(lambda engine: engine.draining)
            assert client.post("/v1/chat/completions", json=chat_body()).json()["error"]["code"] == "server_draining"
        server.open(gate)
        assert b"data: [DONE]" in read_all(sock)
        server.join()
        assert server.server.exit_code == 0


def test_without_an_admin_key_nobody_may() -> None:
    with LiveServer(make_state()) as server, server.client() as client:
        answer: httpx.Response = client.post("/v1/drain")
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_disabled")
        assert client.get("/health/ready").status_code == 200
