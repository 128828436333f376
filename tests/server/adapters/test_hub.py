"""Adapters of the hub, over HTTP and on the command line, from a hub of our own on loopback: only what is asked for is
downloaded, at one commit, within the limits; and each way to fail has its code.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from guanaco.adapters.peft.config import MAX_CONFIG_BYTES
from guanaco.server.adapters.hub import AdapterHub, HubAddress
from guanaco.server.commands.main import app
from guanaco.server.metrics.adapters import LOAD_STAGES
from support.adapters.fake_hub import COMMIT, OTHER_COMMIT, FakeHub, serve_hub
from support.adapters.tiny_adapters import make_adapter
from support.server.adapter_client import check_text, complete, error_code, put
from support.server.adapter_server import ADMIN, TARGETS, AdapterServer, make_adapter_server

WANTED = {"adapter_config.json", "adapter_model.safetensors", "guanaco.json"}


def repository(path: Path, seed: int) -> dict[str, bytes]:
    """What such repositories hold: an adapter, and things that we must not fetch."""
    made = make_adapter(path, TARGETS, 2, seed=seed, modules=("q_proj", "down_proj"))
    files = {file.name: file.read_bytes() for file in made.iterdir()}
    more = {"README.md": b"a card", "training_args.bin": b"a pickle", "evil.py": b"raise SystemExit"}
    return {**files, **more, "tokenizer.json": b"{}", "guanaco.json": b'{"top_p": 0.5}'}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    files = {commit: repository(tmp_path / f"r{seed}", seed) for seed, commit in enumerate((COMMIT, OTHER_COMMIT))}
    with serve_hub(FakeHub(files)) as made:
        yield made


def asking(hub: FakeHub, tmp_path: Path, **options: object) -> AdapterHub:
    return AdapterHub(tmp_path / "cache", endpoint=hub.endpoint, **options)  # type: ignore[arg-type]


@pytest.fixture
def server(tmp_path: Path, hub: FakeHub) -> Iterator[AdapterServer]:
    with make_adapter_server(tmp_path, hub=asking(hub, tmp_path)) as made:
        yield made
        made.assert_quiet()


@pytest.fixture
def client(server: AdapterServer) -> Iterator[httpx.Client]:
    with server.client(headers=ADMIN) as made:
        yield made


def refused(client: httpx.Client, source: str) -> tuple[int, str]:
    answer = client.put("/v1/adapters/h", json={"source": source})
    return answer.status_code, error_code(answer)


def test_it_is_pinned_to_a_commit_and_nothing_else_is_fetched(
    server: AdapterServer, client: httpx.Client, hub: FakeHub
) -> None:
    first = put(client, "a", "org/tiny@main")
    assert (first["source"], first["profile"]) == (f"org/tiny@{COMMIT}", {"top_p": 0.5})
    assert hub.downloaded() == WANTED
    second = put(client, "a", "org/tiny@v2")
    assert (second["source"], second["history"]) == (f"org/tiny@{OTHER_COMMIT}", [first["version"]])
    assert check_text(complete(client, model="a"), "hi", 8) == second["version"]
    num_requests = len(hub.requests)
    assert put(client, "b", f"org/tiny@{COMMIT}")["version"] == first["version"]
    assert len(hub.requests) == num_requests, "a commit that is here is not asked for again"
    report = client.post("/v1/adapters/c/check", json={"source": "org/tiny@main"}).json()
    assert (report["version"], report["source"]) == (first["version"], f"org/tiny@{COMMIT}")
    read = server.state.metrics.registry.get_sample_value
    counts = {s: read("guanaco_adapter_load_stage_seconds_count", {"stage": s}) for s in LOAD_STAGES}
    assert counts == {"fetch": 4, "read": 4, "ingest": 4, "probe": 3, "publish": 3}
    assert complete(client, model="org/tiny@main").status_code == 404, "clients send registered names only"


def test_what_lies_below_the_root_goes_first(server: AdapterServer, client: httpx.Client, hub: FakeHub) -> None:
    (server.root / "org").mkdir()
    server.source("org/tiny@main", 9)
    assert put(client, "a", "org/tiny@main")["source"] == "org/tiny@main"
    assert not hub.requests


def test_each_failure_has_its_code(server: AdapterServer, client: httpx.Client, hub: FakeHub) -> None:
    put(client, "good", "org/tiny@main")
    for source, expected in (
        ("org/other@main", (404, "hub_not_found")),
        ("org/tiny@no-such-branch", (404, "hub_not_found")),
        ("org/tiny", (404, "not_found")),  # a path
        ("org/tiny@", (404, "not_found")),
        ("org/tiny@../main", (404, "not_found")),
        ("org/tiny/more@main", (404, "not_found")),
        ("../tiny@main", (400, "outside_root")),
    ):
        assert refused(client, source) == expected, source
    hub.token = "secret"
    assert refused(client, "org/tiny@v2") == (403, "hub_forbidden")
    hub.token, hub.fail_status = None, 500
    assert refused(client, "org/tiny@v2") == (502, "hub_failed")
    hub.fail_status = None
    config = hub.files[OTHER_COMMIT].pop("adapter_config.json")
    assert refused(client, "org/tiny@v2") == (400, "hub_incomplete")
    hub.files[OTHER_COMMIT]["adapter_config.json"] = config + b" " * MAX_CONFIG_BYTES
    assert refused(client, "org/tiny@v2") == (400, "file_too_large")
    assert "adapter_model.safetensors" in hub.downloaded(), "of the good one"
    weights = hub.files[OTHER_COMMIT].pop("adapter_model.safetensors")
    hub.files[OTHER_COMMIT] |= {"adapter_config.json": config, "adapter_model.bin": b"a pickle"}
    answer = client.put("/v1/adapters/h", json={"source": "org/tiny@v2"}).json()["error"]
    assert (answer["code"], "guanaco adapters convert" in answer["message"]) == ("hub_incomplete", True)
    hub.files[OTHER_COMMIT]["adapter_model.safetensors"] = weights[:-4]
    assert refused(client, "org/tiny@v2") == (400, "truncated")
    assert [card["name"] for card in client.get("/v1/adapters").json()["data"]] == ["good"]
    assert check_text(complete(client, model="good"), "hi", 8)


def test_many_loads_of_one_adapter_at_once_are_one_download(server: AdapterServer, hub: FakeHub) -> None:
    def load(_: int) -> int:
        with server.client(headers=ADMIN) as client:
            return client.put("/v1/adapters/h", json={"source": "org/tiny@main"}).status_code

    with ThreadPoolExecutor(12) as pool:
        statuses = list(pool.map(load, range(12)))
    assert set(statuses) <= {200, 201}
    downloads = [path for method, path, _ in hub.requests if method == "GET" and path.endswith(".safetensors")]
    assert len(downloads) == 1, downloads


def test_a_hub_that_lies_about_sizes(tmp_path: Path, hub: FakeHub) -> None:
    hub.sizes = {"adapter_model.safetensors": 1}
    settings = asking(hub, tmp_path, max_weights_bytes=100)
    with make_adapter_server(tmp_path, hub=settings) as server, server.client(headers=ADMIN) as client:
        assert refused(client, "org/tiny@main") == (400, "file_too_large")


def test_a_token_opens_and_a_broken_download_goes_on(tmp_path: Path, hub: FakeHub) -> None:
    hub.token = "secret"
    settings = asking(hub, tmp_path, token="secret")
    with make_adapter_server(tmp_path, hub=settings) as server, server.client(headers=ADMIN) as client:
        hub.break_off, hub.status_after_break = {"adapter_model.safetensors": 40}, 403
        # Which of the files, fetched at the same time, meets the hub's refusal first is not ours to say.
        assert refused(client, "org/tiny@main") in ((502, "hub_failed"), (403, "hub_forbidden"))
        hub.fail_status = None
        assert put(client, "a", "org/tiny@main")["source"] == f"org/tiny@{COMMIT}"


def test_offline_and_off(tmp_path: Path, hub: FakeHub) -> None:
    offline = asking(hub, tmp_path, offline=True)
    with make_adapter_server(tmp_path, hub=offline) as server, server.client(headers=ADMIN) as client:
        assert refused(client, "org/tiny@main") == (503, "hub_offline")
        assert not hub.requests
        asking(hub, tmp_path).fetch(HubAddress("org/tiny", "main"))
        num_requests = len(hub.requests)
        assert put(client, "a", f"org/tiny@{COMMIT}")["source"] == f"org/tiny@{COMMIT}"
        assert put(client, "b", "org/tiny@main")["source"] == f"org/tiny@{COMMIT}"
        assert len(hub.requests) == num_requests
    with make_adapter_server(tmp_path) as server, server.client(headers=ADMIN) as client:
        assert check_text(complete(client, model="a"), "hi", 8), "a restart needs no hub"
        assert refused(client, "org/tiny@main") == (400, "hub_disabled")


def test_without_a_revision_where_that_is_allowed(tmp_path: Path, hub: FakeHub) -> None:
    with (
        make_adapter_server(tmp_path, hub=asking(hub, tmp_path, allows_unpinned=True)) as server,
        server.client(headers=ADMIN) as client,
    ):
        body = {"lora_name": "a", "lora_path": "org/tiny"}
        assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert client.get("/v1/adapters/a").json()["source"] == f"org/tiny@{COMMIT}", "resolved, and shown"
        assert client.get("/v1/models/a").json()["root"] == f"org/tiny@{COMMIT}"
        assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert put(client, "b", "org/tiny@v2")["source"] == f"org/tiny@{OTHER_COMMIT}"
        assert refused(client, "org/other") == (404, "hub_not_found")
        assert refused(client, "org/tiny/more") == (404, "not_found"), "a path"
        (server.root / "org").mkdir()
        server.source("org/tiny", 9)
        assert put(client, "c", "org/tiny")["source"] == "org/tiny", "what lies below the root goes first"


def test_pull(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guanaco.server.commands.adapter_actions.AdapterHub.of", lambda settings: asking(hub, tmp_path))

    def pull(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["adapters", "pull", *arguments])
        return done.exit_code, " ".join(done.output.split())

    target = tmp_path / "new" / "adapter"
    assert pull("org/tiny@v2", str(target)) == (0, f"org/tiny@{OTHER_COMMIT} → {target}")
    assert {file.name for file in target.iterdir()} == WANTED
    for name in WANTED:
        assert (target / name).read_bytes() == hub.files[OTHER_COMMIT][name]
        assert not (target / name).is_symlink()
    assert [path.name for path in target.parent.iterdir()] == ["adapter"], "nothing is left beside it"
    code, said = pull("org/tiny")
    assert (code, f"org/tiny@{COMMIT} →" in said) == (0, True)
    for arguments, words in (
        (["org/tiny@v2", str(target)], "is there already"),
        (["nonsense"], "ORG/NAME"),
        (["org/nope"], "is not on the hub"),
    ):
        code, said = pull(*arguments)
        assert (code, words in said) == (2, True), said
