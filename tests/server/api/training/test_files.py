"""/v1/files over HTTP: multipart alone and here alone, streamed within limits, one key's files hidden from others."""

import ast
import os
import re
from pathlib import Path

import httpx
import pytest

from guanaco.server.training.jobs.limits import TrainLimits
from support.server.api_server import LiveServer, http_post, make_state
from support.server.documented import REPOSITORY
from support.training.training_server import ADMIN, ALICE, BOB, CAROL, TrainingServer, make_training_server

ROW = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}]}\n'


def upload(
    client: httpx.Client, content: bytes = ROW, name: str = "chat.jsonl", purpose: str = "fine-tune"
) -> httpx.Response:
    return client.post("/v1/files", data={"purpose": purpose}, files={"file": (name, content)})


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_the_life_of_a_file(server: TrainingServer) -> None:
    content = ROW * 40_000  # several pieces
    with server.http() as client, server.http(BOB) as other:
        file = upload(client, content, "../../x/chat.jsonl").json()
        assert file.pop("created_at") > 1_600_000_000
        name = file["id"]
        assert file == {
            "id": name,
            "object": "file",
            "bytes": len(content),
            "expires_at": None,
            "filename": "chat.jsonl",
            "purpose": "fine-tune",
            "status": "processed",
            "status_details": None,
        }
        assert client.get(f"/v1/files/{name}").json()["bytes"] == len(content)
        assert client.get(f"/v1/files/{name}/content").content == content
        assert name in [each["id"] for each in client.get("/v1/files").json()["data"]]
        assert other.get("/v1/files").json()["data"] == []
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            assert code(other.request(method, f"/v1/files/{name}{path}")) == (404, "file_not_found")
        assert client.delete(f"/v1/files/{name}").json() == {"id": name, "object": "file", "deleted": True}
        assert code(client.get(f"/v1/files/{name}")) == (404, "file_not_found")
        assert code(client.get("/v1/files/..%2F..%2Fetc")) == (404, "not_found")


def test_pages(server: TrainingServer) -> None:
    with server.http(ADMIN) as client:
        ids = [upload(client).json()["id"] for _ in range(3)]
        first = client.get("/v1/files", params={"limit": 2, "order": "asc"}).json()
        assert (len(first["data"]), first["has_more"], first["last_id"]) == (2, True, first["data"][-1]["id"])
        rest = client.get("/v1/files", params={"after": first["last_id"], "order": "asc"}).json()
        assert rest["has_more"] is False
        assert {each["id"] for each in (*first["data"], *rest["data"])} == set(ids)
        assert client.get("/v1/files", params={"purpose": "batch"}).json()["data"] == []
        for query in (
            {"limit": 0},
            {"limit": "x"},
            {"limit": "1" * 5000},
            {"limit": "0" * 8 + "19999999"},
            {"after": "file-none"},
            {"order": "up"},
            {"nonsense": 1},
        ):
            assert code(client.get("/v1/files", params=query)) == (400, "invalid_value")


def test_who_may(server: TrainingServer) -> None:
    for key, status, word in (
        (None, 401, "missing_api_key"),
        ("sk-wrong", 401, "invalid_api_key"),
        (CAROL, 403, "training_not_allowed"),
    ):
        with server.http(key) as client:
            for path in ("/v1/files", "/v1/fine_tuning/jobs"):
                assert code(client.get(path)) == (status, word)
            assert code(upload(client)) == (status, word)
    with server.http(CAROL) as client:
        assert client.get("/v1/models").status_code == 200


def test_without_api_keys_the_admin_key_is_needed(tmp_path: Path) -> None:
    with make_training_server(tmp_path, keys=()) as server:
        with server.http(None) as client:
            assert code(client.get("/v1/files")) == (401, "missing_admin_key")
            assert client.get("/v1/models").status_code == 200
        with server.http("wrong") as client:
            assert code(client.get("/v1/files")) == (401, "invalid_admin_key")
        with server.http(ADMIN) as client:
            assert upload(client).status_code == 200


def test_without_the_extra_there_is_one_clear_refusal(tmp_path: Path) -> None:
    with make_training_server(tmp_path, is_available=False) as server, server.http() as client:
        for answer in (upload(client), client.get("/v1/files"), client.get("/v1/fine_tuning/jobs")):
            assert code(answer) == (403, "training_unavailable")
            assert "make install EXTRAS=train" in answer.json()["error"]["message"]


def test_without_an_admin_key_the_routes_are_not_there() -> None:
    with LiveServer(make_state()) as live, live.client() as client:
        assert code(upload(client)) == (404, "route_not_served")


@pytest.mark.parametrize(
    ("data", "files", "status", "word", "param"),
    [
        ({"purpose": "assistants"}, {"file": ("a", ROW)}, 400, "invalid_value", "purpose"),
        ({}, {"file": ("a", ROW)}, 400, "missing_required_parameter", "purpose"),
        ({"purpose": "fine-tune"}, {"other": ("a", ROW)}, 400, "unsupported_parameter", "other"),
        ({"purpose": "fine-tune"}, {"purpose": ("a", b"fine-tune")}, 400, "invalid_value", "purpose"),
        ({"purpose": "fine-tune"}, {"file": ("a", b"")}, 400, "invalid_value", "file"),
        ({"purpose": "x" * 2000}, {"file": ("a", ROW)}, 400, "invalid_value", "purpose"),
        (
            {"purpose": "fine-tune", "expires_after[seconds]": "1"},
            {"file": ("a", ROW)},
            400,
            "unsupported_parameter",
            "expires_after",
        ),
    ],
)
def test_forms_that_are_refused(
    server: TrainingServer,
    data: dict[str, str],
    files: dict[str, tuple[str, bytes]],
    status: int,
    word: str,
    param: str,
) -> None:
    with server.http() as client:
        answer = client.post("/v1/files", data=data, files=files)
        assert code(answer) == (status, word), answer.text
        assert answer.json()["error"]["param"] == param
        assert client.get("/v1/files").json()["data"] == []
    assert os.listdir(server.training.directory / "incoming") == []


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"Content-Type": "application/json"}, b"{}", 415),
        ({"Content-Type": "multipart/form-data"}, b"--x--\r\n", 415),
        ({"Content-Type": "multipart/form-data; boundary=x", "Content-Encoding": "gzip"}, b"--x--\r\n", 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, b"no boundary", 400),
        ({"Content-Type": "multipart/form-data; boundary=x"}, b"", 400),
        (
            {"Content-Type": "multipart/form-data; boundary=x"},
            b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n",
            400,
        ),
        (
            {"Content-Type": "multipart/form-data; boundary=x"},
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhalf a file',
            400,
        ),
    ],
)
def test_bodies_that_are_no_form(server: TrainingServer, headers: dict[str, str], body: bytes, status: int) -> None:
    with server.http() as client:
        answer = client.post("/v1/files", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert os.listdir(server.training.directory / "incoming") == []


def test_a_file_beyond_the_limit_is_refused_and_removed(tmp_path: Path) -> None:
    limits = TrainLimits(max_file_bytes=1 << 20, max_files_per_key=2)
    with make_training_server(tmp_path, limits=limits, max_train_file_bytes=1 << 20) as server, server.http() as client:

        def chunks() -> object:
            form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
            yield form
            yield from (b"y" * (1 << 18) for _ in range(6))

        announced = upload(client, b"y" * (3 << 20))
        assert code(announced) == (413, "request_too_large")
        chunked = client.post(
            "/v1/files", content=chunks(), headers={"Content-Type": "multipart/form-data; boundary=x"}
        )
        assert code(chunked) == (413, "request_too_large")
        assert upload(client, b"y" * (1 << 20)).status_code == 200
        assert upload(client).status_code == 200
        full = upload(client)
        assert code(full) == (429, "training_quota_exceeded")
        assert "Retry-After" in full.headers
        with server.http(BOB) as other:
            assert upload(other).status_code == 200
        assert os.listdir(tmp_path / "training" / "incoming") == []


def test_a_client_that_leaves_leaves_nothing(server: TrainingServer) -> None:
    head = f"POST /v1/files HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {ALICE}\r\nContent-Length: 9000000\r\n"
    form = '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    incoming = server.training.directory / "incoming"
    with server.connect() as sock:
        sock.sendall(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n{form}".encode() + b"y" * (2 << 20))
        server.wait(lambda: os.listdir(incoming) != [])
    server.wait(lambda: os.listdir(incoming) == [])


def test_multipart_is_read_here_alone(server: TrainingServer) -> None:
    """Every other route with a body wants JSON, and nothing else in the package takes forms apart."""
    paths = server.server.config.app.openapi()["paths"]
    posts = [path for path, methods in paths.items() if "post" in methods and path != "/v1/files"]
    with server.http(ADMIN) as client:
        for path in posts:
            if path.endswith("/cancel") or path == "/v1/drain":  # they have no body
                continue
            answer = client.post(re.sub(r"\{[^}]+\}", "x", path), files={"file": ("a", ROW)})
            assert answer.status_code == 415, path
    readers = set()
    for top in ("server", "models", "adapters", "kernels"):
        for path in (REPOSITORY / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [getattr(node, "module", "") or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
                is_form = isinstance(node, ast.Attribute) and node.attr == "form"
                if is_form or any("multipart" in name or name in ("Form", "UploadFile", "File") for name in names):
                    readers.add(path.relative_to(REPOSITORY).as_posix())
    assert readers == {"server/api/training/upload.py"}


def test_an_upload_has_limits_of_its_own(tmp_path: Path) -> None:
    """Other bodies keep theirs: what an upload may have is refused elsewhere."""
    with make_training_server(tmp_path, max_body_bytes=1000) as server, server.http() as client:
        assert upload(client, b"y" * 100_000).status_code == 200
        assert client.post("/v1/completions", json={"model": "x", "prompt": "y" * 2000}).status_code == 413
        raw = server.raw(http_post("/v1/fine_tuning/jobs", b"y" * 20_000, headers={"Authorization": f"Bearer {ALICE}"}))
        assert b" 413 " in raw.split(b"\r\n")[0]
