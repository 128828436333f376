"""The document and the page of the API describe training's routes: every one, with answers that are as they say."""

import re
from typing import Any

import jsonschema

from guanaco.server.api.document.training import TRAINING_ANSWER_OF, TRAINING_EXAMPLES
from guanaco.server.api.http.auth import is_training_path
from support.server.adapter_server import BASE
from support.server.documented import REPOSITORY
from support.training.training_server import TrainingServer

ROW = b'{"prompt": "a", "completion": "b"}\n'


def test_every_route_is_described_and_answers_so(server: TrainingServer) -> None:
    document: dict[str, Any] = server.server.config.app.openapi()
    mine = {
        (method, path.replace("{name:path}", "{name}"))
        for path, methods in document["paths"].items()
        for method in methods
        if is_training_path(path) or (method, path) == ("delete", "/v1/models/{name}")
    }
    assert mine == set(TRAINING_ANSWER_OF)
    page = (REPOSITORY / "docs" / "http-api.md").read_text()
    listed = set(
        re.findall(r"^\| `([A-Z]+ /v1/(?:files|fine_tuning)[^`]*|DELETE /v1/models/\{name\})`", page, re.MULTILINE)
    )
    assert listed == {f"{method.upper()} {path}" for method, path in mine}

    def check(method: str, path: str, answer: Any) -> str:
        assert answer.status_code == 200, answer.text
        schema = document["paths"][path][method]["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(answer.json())
        return str(answer.json().get("id"))

    with server.http() as client:
        form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("a.jsonl", ROW)}}
        file = check("post", "/v1/files", client.post("/v1/files", **form))
        check("get", "/v1/files", client.get("/v1/files"))
        check("get", "/v1/files/{file_id}", client.get(f"/v1/files/{file}"))
        jobs = "/v1/fine_tuning/jobs"
        body = {**TRAINING_EXAMPLES[jobs], "model": BASE, "training_file": file}
        schema = document["paths"][jobs]["post"]["requestBody"]["content"]["application/json"]["schema"]
        jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(body)
        job = check("post", jobs, client.post(jobs, json=body))
        while client.get(f"{jobs}/{job}").json()["status"] not in ("succeeded", "failed"):
            check("get", jobs + "/{job_id}/events", client.get(f"{jobs}/{job}/events"))
        check("get", jobs, client.get(jobs))
        check("get", jobs + "/{job_id}", client.get(f"{jobs}/{job}"))
        check("get", jobs + "/{job_id}/checkpoints", client.get(f"{jobs}/{job}/checkpoints"))
        check("delete", "/v1/models/{name}", client.delete("/v1/models/support"))
        check("delete", "/v1/files/{file_id}", client.delete(f"/v1/files/{file}"))
