"""Adapters named as other servers' clients name them: exactly that adapter, or a refusal; never a path."""

from typing import Any

import httpx
import pytest

from guanaco.server.api.generation.catalog import Catalog, ServedModel
from guanaco.server.api.values.adapters import number_of
from support.server.api_server import BASE, PIRATE, PIRATE_VERSION, TERSE, TERSE_VERSION, LiveServer, make_state

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
}


def post(client: httpx.Client, route: str, **fields: Any) -> httpx.Response:
    return client.post(route, json={"model": BASE, "max_tokens": 1, **BODIES[route], **fields})


def lora(**scales: float) -> list[dict[str, Any]]:
    return [{"id": number_of(name), "scale": scale} for name, scale in scales.items()]


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize(
    ("fields", "loras"),
    [
        ({"model": f"{BASE}:{PIRATE}"}, [(PIRATE_VERSION, 1.0)]),
        ({"model": f"{BASE}:{PIRATE}", "lora_path": PIRATE}, [(PIRATE_VERSION, 1.0)]),
        ({"lora_path": PIRATE}, [(PIRATE_VERSION, 1.0)]),
        ({"model": PIRATE, "lora_path": None}, [(PIRATE_VERSION, 1.0)]),
        ({"adapter_id": TERSE}, [(TERSE_VERSION, 1.0)]),
        ({"model": TERSE, "adapter_id": TERSE}, [(TERSE_VERSION, 1.0)]),
        ({"lora_path": None, "adapter_id": None, "lora": None}, []),
        ({"lora": lora(pirate=0.5, terse=0)}, [(PIRATE_VERSION, 0.5)]),
        ({"lora": lora(terse=1, pirate=-2)}, [(TERSE_VERSION, 1.0), (PIRATE_VERSION, -2.0)]),
        ({"lora": []}, []),
        ({"lora": lora(pirate=0)}, []),
    ],
)
def test_what_answers(server: LiveServer, client: httpx.Client, route: str, fields: dict, loras: list) -> None:
    response = post(client, route, **fields)
    assert response.status_code == 200, response.text
    assert [(ref.version, ref.scale) for ref in server.engine.requests[-1].loras] == loras
    assert response.headers.get("X-Adapter-Version", "") == ",".join(version for version, _ in loras)
    tokenize = {"model": BASE, **BODIES[route], **fields}
    assert client.post("/tokenize", json=tokenize).status_code == 200


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": f"{BASE}:nobody"}, 404, "model"),
        ({"model": f"{BASE}:{BASE}"}, 404, "model"),
        ({"model": f"{BASE}:"}, 404, "model"),
        ({"model": f"other:{PIRATE}"}, 404, "model"),
        ({"lora_path": "/etc/passwd"}, 404, "lora_path"),
        ({"lora_path": [PIRATE]}, 400, "lora_path"),
        ({"lora_path": BASE}, 400, "lora_path"),
        ({"model": TERSE, "lora_path": PIRATE}, 400, "lora_path"),
        ({"adapter_id": "nobody"}, 404, "adapter_id"),
        ({"adapter_id": PIRATE, "adapter_source": "hub"}, 400, "adapter_source"),
        ({"adapter_id": PIRATE, "lora_path": PIRATE}, 400, "lora_path"),
        ({"adapters": [{"name": PIRATE}], "lora": []}, 400, "lora"),
        ({"lora": [{"id": 0, "scale": 1}]}, 404, "lora[0].id"),
        ({"lora": [{"id": 0, "scale": 0}]}, 404, "lora[0].id"),
        ({"lora": lora(pirate=1) * 2}, 400, "lora"),
        ({"lora": [{"id": number_of(PIRATE)}]}, 400, "lora[0].scale"),
        ({"lora": [{**lora(pirate=1)[0], "path": "x"}]}, 400, "lora[0]"),
        ({"model": PIRATE, "lora": lora(terse=1)}, 400, "lora"),
    ],
)
def test_what_is_refused(
    server: LiveServer, client: httpx.Client, route: str, fields: dict, status: int, param: str
) -> None:
    before = len(server.engine.requests)
    response = post(client, route, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text
    assert "passwd" not in response.text
    assert len(server.engine.requests) == before, "the base must not answer in an adapter's place"


def test_the_numbers_are_listed_and_stay(client: httpx.Client) -> None:
    entries = client.get("/lora-adapters").json()
    assert [entry["path"] for entry in entries] == sorted([PIRATE, TERSE])
    assert [entry["id"] for entry in entries] == [number_of(PIRATE), number_of(TERSE)]
    assert all(entry["scale"] == 0 for entry in entries)
    assert number_of(PIRATE) == 31385767, "clients may keep them"


def test_keys_hold() -> None:
    with LiveServer(make_state(keys=("sesame",))) as server, server.client() as client:
        assert client.get("/lora-adapters").status_code == 401
        assert client.get("/lora-adapters", headers={"Authorization": "Bearer sesame"}).status_code == 200


def test_an_adapter_that_is_closed_to_a_key_has_no_number() -> None:
    base = ServedModel(BASE, 64, root="")
    closed = ServedModel("closed", 64, root="", parent=BASE, version="c" * 64, version_keys=("k1",))
    opened = ServedModel("opened", 64, root="", parent=BASE, version="d" * 64)
    assert list(Catalog(base, [opened, closed]).numbered_adapters(None).values()) == ["opened"]
