"""/v1/fine_tuning/jobs over HTTP and through the `openai` package: the whole circle, two keys, refusals by name."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import NotFoundError, OpenAI

from guanaco.server.adapters.sources import LoadRequest
from support.server.adapter_server import BASE
from support.server.api_server import WAIT
from support.training.training_server import ADMIN, ALICE, BOB, CAROL, TrainingServer, key_id, make_training_server

ROW = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}]}\n'
JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def client(server: TrainingServer) -> Iterator[httpx.Client]:
    with server.http() as http:
        yield http


def upload(client: httpx.Client) -> str:
    answer = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("chat.jsonl", ROW)})
    return str(answer.json()["id"])


def create(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post(JOBS, json={"model": BASE, "training_file": upload(client), **fields})


def until(client: httpx.Client, job_id: str, *statuses: str) -> dict[str, Any]:
    deadline = time.monotonic() + WAIT
    while (job := client.get(f"{JOBS}/{job_id}").json())["status"] not in statuses:
        assert time.monotonic() < deadline, job
        time.sleep(0.01)
    return dict(job)


def trained(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = create(client, **fields)
    assert answer.status_code == 200, answer.text
    return until(client, answer.json()["id"], "succeeded", "failed")


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_the_circle_through_the_openai_package(server: TrainingServer, tmp_path: Path) -> None:
    data = tmp_path / "chat.jsonl"
    data.write_bytes(ROW * 3)
    with OpenAI(base_url=f"{server.url}/v1", api_key=ALICE, max_retries=0) as openai:
        with data.open("rb") as opened:
            file = openai.files.create(file=opened, purpose="fine-tune")
        assert openai.files.content(file.id).read() == ROW * 3
        job = openai.fine_tuning.jobs.create(
            model=BASE,
            training_file=file.id,
            suffix="circle",
            seed=3,
            metadata={"team": "a"},
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        )
        assert job.status == "validating_files"
        assert job.method is not None
        assert job.method.supervised is not None
        assert job.method.supervised.hyperparameters is not None
        assert job.method.supervised.hyperparameters.n_epochs == 2
        assert job.hyperparameters.batch_size == "auto"
        assert (job.seed, job.metadata, job.training_file) == (3, {"team": "a"}, file.id)
        deadline = time.monotonic() + WAIT
        seen: dict[str, str] = {}
        while (job := openai.fine_tuning.jobs.retrieve(job.id)).status not in ("succeeded", "failed"):
            assert time.monotonic() < deadline
            for event in openai.fine_tuning.jobs.list_events(job.id, limit=2):  # several pages
                seen[event.id] = event.message
            time.sleep(0.01)
        assert (job.status, job.fine_tuned_model, job.error) == ("succeeded", "circle", None)
        assert (job.trained_tokens, job.organization_id) == (40, "guanaco")
        events = list(openai.fine_tuning.jobs.list_events(job.id, limit=2))
        assert seen.keys() <= {event.id for event in events}
        assert events[0].message == "The job succeeded: the model circle answers now."
        metrics = [event for event in events if event.type == "metrics"]
        assert [event.data["step"] for event in metrics] == [4, 3, 2, 1]  # type: ignore[index]
        checkpoints = list(openai.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
        assert [checkpoint.step_number for checkpoint in checkpoints] == [4, 3, 2, 1]
        assert checkpoints[0].metrics.train_loss == 1.0
        assert openai.files.content(job.result_files[0]).text.startswith("step,train_loss")
        assert job.id in [each.id for each in openai.fine_tuning.jobs.list(limit=1)]
        assert "circle" in [model.id for model in openai.models.list()]
        answer = openai.completions.create(model="circle", prompt="Ahoy", max_tokens=4, temperature=0)
        base = openai.completions.create(model=BASE, prompt="Ahoy", max_tokens=4, temperature=0)
        assert answer.choices[0].text != base.choices[0].text
        assert openai.models.delete("circle").deleted
        assert "circle" not in [model.id for model in openai.models.list()]
        with pytest.raises(NotFoundError):
            openai.models.delete("circle")
        assert openai.files.delete(file.id).deleted


def test_jobs_belong_to_their_key_and_so_does_the_model(server: TrainingServer, client: httpx.Client) -> None:
    job = trained(client, suffix="mine")
    assert job["error"] is None
    with server.http(BOB) as bob, server.http(CAROL) as carol, server.http(ADMIN) as admin:
        for other in (bob, admin):
            assert job["id"] not in [each["id"] for each in other.get(JOBS, params={"limit": 100}).json()["data"]]
            for method, path in (("GET", ""), ("POST", "/cancel"), ("GET", "/events"), ("GET", "/checkpoints")):
                assert code(other.request(method, f"{JOBS}/{job['id']}{path}")) == (404, "job_not_found")
            assert code(other.delete("/v1/models/mine")) == (404, "model_not_found")
            theirs = other.post(JOBS, json={"model": BASE, "training_file": job["training_file"]})
            assert code(theirs) == (404, "file_not_found")
            assert theirs.json()["error"]["param"] == "training_file"
            assert code(create(other, suffix="mine")) == (409, "name_taken")
        for other in (bob, carol):
            assert "mine" not in [model["id"] for model in other.get("/v1/models").json()["data"]]
            asked = other.post("/v1/completions", json={"model": "mine", "prompt": "x", "max_tokens": 1})
            assert code(asked) == (404, "model_not_found")
        assert code(carol.delete("/v1/models/mine")) == (404, "model_not_found")
        card = admin.get("/v1/adapters/mine").json()
        assert card["profile"]["allowed_keys"] == [key_id(ALICE)]
        assert card["source"] == f"job:{job['id']}"


def test_the_same_suffix_again_is_a_new_version_and_can_be_rolled_back(
    server: TrainingServer, client: httpx.Client
) -> None:
    assert trained(client, suffix="twice")["fine_tuned_model"] == "twice"
    with server.http(ADMIN) as admin:
        first = admin.get("/v1/adapters/twice").json()["version"]
        opened = {"source": admin.get("/v1/adapters/twice").json()["source"], "profile": {}}
        assert admin.put(
            "/v1/adapters/twice", json={**opened, "profile": {"allowed_keys": [key_id(ALICE), key_id(BOB)]}}
        )
        server.source("made", seed=6)
        try:
            assert trained(client, suffix="twice")["fine_tuned_model"] == "twice"
        finally:
            server.source("made", seed=5)
        card = admin.get("/v1/adapters/twice").json()
        assert (card["version"] != first, card["history"]) == (True, [first])
        assert card["profile"]["allowed_keys"] == [key_id(ALICE), key_id(BOB)], "what its operator allowed stays"
        assert admin.post("/v1/adapters/twice/rollback", json={}).json()["version"] == first
        assert trained(client, suffix="twice")["fine_tuned_model"] == "twice", "after a rollback, too"


def test_a_name_that_its_key_did_not_create_is_never_replaced(server: TrainingServer, client: httpx.Client) -> None:
    server.source("other", seed=9)
    with server.http(ADMIN) as admin:
        assert admin.put("/v1/adapters/handmade", json={"source": "other"}).status_code == 201
        version = admin.get("/v1/adapters/handmade").json()["version"]
        for taken in ("handmade", BASE):
            refused = create(client, suffix=taken)
            assert code(refused) in ((409, "name_taken"), (400, "invalid_value"))
        assert admin.get("/v1/adapters/handmade").json()["version"] == version
        # A name that was the key's, until its operator gave it to something else.
        assert trained(client, suffix="lost")["fine_tuned_model"] == "lost"
        assert admin.put("/v1/adapters/lost", json={"source": "other"}).status_code == 200
        assert code(create(client, suffix="lost")) == (409, "name_taken")
        assert code(client.delete("/v1/models/lost")) == (404, "model_not_found")


def test_a_name_that_was_taken_while_the_job_ran(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with make_training_server(tmp_path, env={"FAKE_GATE": str(gate)}) as server, server.http() as client:
        job = create(client, suffix="wanted").json()
        server.source("other", seed=9)
        server.run(server.manager.load(LoadRequest("wanted", "other")))
        gate.touch()
        done = until(client, job["id"], "succeeded", "failed")
        assert done["error"] is None
        assert done["fine_tuned_model"] == f"wanted-{job['id'].removeprefix('ftjob-')[:12]}"
        events = client.get(f"{JOBS}/{job['id']}/events").json()["data"]
        assert any(event["level"] == "warn" and "was taken while the job ran" in event["message"] for event in events)
        entry = server.registry.resolve("wanted")
        assert entry is not None
        assert entry.source == "other"
        assert client.delete(f"/v1/models/{done['fine_tuned_model']}").status_code == 200


def test_an_adapter_that_does_nothing_is_not_published(tmp_path: Path) -> None:
    with make_training_server(tmp_path) as server, server.http() as client:
        weights = next((server.root / "made").glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-8])
        failed = trained(client, suffix="bad")
        assert failed["status"] == "failed"
        assert failed["error"]["code"] == "publish_failed"
        assert str(tmp_path) not in failed["error"]["message"]
        assert server.registry.resolve("bad") is None


def test_cancel(tmp_path: Path) -> None:
    env = {"FAKE_STEPS": "10000", "FAKE_SECONDS": "0.01"}
    with make_training_server(tmp_path, env=env) as server, server.http() as client:
        job, waiting = create(client).json(), create(client).json()
        until(client, job["id"], "running")
        with OpenAI(base_url=f"{server.url}/v1", api_key=ALICE) as openai:
            assert openai.fine_tuning.jobs.cancel(waiting["id"]).status == "cancelled"
            assert openai.fine_tuning.jobs.cancel(job["id"]).status == "cancelled"
        assert code(client.post(f"{JOBS}/{job['id']}/cancel")) == (409, "job_not_cancellable")
        metrics = client.get("/metrics").text
        assert 'guanaco_training_jobs{status="cancelled"} 2.0' in metrics


@pytest.mark.parametrize(
    ("fields", "status", "word", "param"),
    [
        ({"model": "nobody"}, 404, "model_not_found", "model"),
        ({"training_file": "file-" + "0" * 24}, 404, "file_not_found", "training_file"),
        ({"validation_file": "../x"}, 404, "file_not_found", "validation_file"),
        ({"method": {"type": "dpo", "dpo": {}}}, 400, "unsupported_parameter", "method.dpo"),
        ({"method": {"type": "reinforcement"}}, 400, "unsupported_parameter", "method.reinforcement"),
        ({"method": {"type": "magic"}}, 400, "invalid_value", "method.type"),
        ({"integrations": [{"type": "wandb"}]}, 400, "unsupported_parameter", "integrations"),
        ({"lora_rank": 8}, 400, "unsupported_parameter", "lora_rank"),
        ({"hyperparameters": {"beta": 1}}, 400, "unsupported_parameter", "hyperparameters.beta"),
        ({"hyperparameters": {"n_epochs": 0}}, 400, "invalid_value", None),
        ({"hyperparameters": {"n_epochs": "many"}}, 400, "invalid_value", None),
        ({"hyperparameters": {"learning_rate_multiplier": -1.0}}, 400, "invalid_value", None),
        ({"seed": -1}, 400, "invalid_value", "seed"),
        ({"suffix": "../../etc"}, 400, "invalid_value", "suffix"),
        ({"suffix": "a/b"}, 400, "invalid_value", "suffix"),
        ({"suffix": ".hidden"}, 400, "invalid_value", "suffix"),
        ({"suffix": "x" * 65}, 400, "invalid_value", "suffix"),
        ({"suffix": ""}, 400, "invalid_value", "suffix"),
        ({"metadata": {"a": 1}}, 400, "invalid_type", "metadata.a"),
        ({"metadata": {str(n): "" for n in range(17)}}, 400, None, "metadata"),
    ],
)
def test_requests_that_are_refused(
    client: httpx.Client, fields: dict[str, Any], status: int, word: str | None, param: str | None
) -> None:
    answer = create(client, **fields)
    error = answer.json()["error"]
    assert answer.status_code == status, answer.text
    assert word in (None, error["code"])
    assert param in (None, error["param"])
    assert all(job["status"] == "succeeded" for job in client.get(JOBS, params={"limit": 100}).json()["data"])


def test_hyperparameters_that_contradict_each_other(client: httpx.Client) -> None:
    inner = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}
    answer = create(client, method=inner, hyperparameters={"n_epochs": 3})
    assert code(answer) == (400, "invalid_value")


def test_an_adapter_is_no_start(server: TrainingServer, client: httpx.Client) -> None:
    trained(client, suffix="grown")
    answer = create(client, model="grown")
    assert code(answer) == (400, "invalid_value")
    assert BASE in answer.json()["error"]["message"]


def test_pages_of_jobs(server: TrainingServer) -> None:
    with server.http(BOB) as client:
        ids = [trained(client)["id"] for _ in range(3)]
        first = client.get(JOBS, params={"limit": 2}).json()
        assert (first["has_more"], len(first["data"])) == (True, 2)
        rest = client.get(JOBS, params={"limit": 2, "after": first["last_id"]}).json()
        assert rest["has_more"] is False
        assert {each["id"] for each in (*first["data"], *rest["data"])} == set(ids)
        assert code(client.get(JOBS, params={"after": "ftjob-x"})) == (400, "invalid_value")
        assert code(client.get(JOBS, params={"metadata[a]": "b"})) == (400, "invalid_value")


def test_jobs_and_files_survive_a_restart(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with make_training_server(tmp_path, env={"FAKE_GATE": str(gate)}) as server, server.http() as client:
        running = create(client, suffix="survivor").json()["id"]
        until(client, running, "running")
    gate.touch()
    with make_training_server(tmp_path) as server, server.http() as client:
        done = until(client, running, "succeeded", "failed")
        assert done["fine_tuned_model"] == "survivor"
        assert len(client.get("/v1/files", params={"purpose": "fine-tune"}).json()["data"]) == 1
    with make_training_server(tmp_path) as server, server.http() as client:
        asked = client.post("/v1/completions", json={"model": "survivor", "prompt": "x", "max_tokens": 1})
        assert asked.status_code == 200
        assert trained(client, suffix="survivor")["fine_tuned_model"] == "survivor"


def test_the_keys_are_nowhere_on_the_disk(server: TrainingServer, client: httpx.Client) -> None:
    trained(client)
    for path in server.training.directory.rglob("*"):
        if path.is_file():
            assert not any(key.encode() in path.read_bytes() for key in (ALICE, BOB, ADMIN)), path
