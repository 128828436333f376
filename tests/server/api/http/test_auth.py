"""With keys everything but health is closed: every route, every method, every spelling."""

import hmac
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.routing import BaseRoute, Mount

from guanaco.server.api.app import create_app
from guanaco.server.api.generation.catalog import ServedModel
from guanaco.server.api.generation.state import ApiState
from guanaco.server.api.http.auth import OPEN_PATHS, KeyRing, presented_key
from guanaco.server.config import Settings, SettingsError
from support.server.api_server import BASE, LiveServer, chat_body, http_post, make_state

KEY, OTHER_KEY = "sk-guanaco-1", "clé-secrète-ß"
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "PURGE", "PROPFIND")


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer(make_state(keys=(KEY, OTHER_KEY))) as live:
        yield live


def paths_of(routes: list[BaseRoute], prefix: str = "") -> Iterator[str]:
    """Every path of an application, mounts included, with parameters filled in."""
    for route in routes:
        if isinstance(route, Mount):
            yield from paths_of(route.routes, prefix + route.path)
        elif hasattr(route, "path"):
            yield prefix + route.path.replace("{name:path}", BASE)
        else:  # a router that FastAPI includes lazily
            yield from paths_of(route.original_router.routes, prefix)


def test_route_discovery_finds_them_all() -> None:
    found = set(paths_of(create_app(make_state()).routes))
    assert {"/v1/models", "/v1/chat/completions", "/metrics", "/openapi.json", "/health/live", "/tokenize"} <= found
    assert len(found) >= 13
    assert found >= OPEN_PATHS


def test_every_route_and_method_is_closed_without_a_key(server: LiveServer) -> None:
    paths = {*paths_of(create_app(make_state()).routes), "/", "/nope", "/v1", "/docs", "/static/x"}
    with server.client() as client:
        for path in sorted(paths - OPEN_PATHS):
            for method in METHODS:
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-Api-Key": "wrong"}):
                    response = client.request(method, path, headers=headers, json={})
                    assert response.status_code == 401, (method, path)
                    assert response.headers["www-authenticate"] == "Bearer"
                    if method != "HEAD":
                        error = response.json()["error"]
                        code = error["code"] if "code" in error else error["details"]["error_code"]
                        assert code == ("invalid_api_key" if headers else "missing_api_key")
    assert server.engine.requests == []


def test_health_stays_open(server: LiveServer) -> None:
    with server.client() as client:
        for path in OPEN_PATHS:
            assert client.get(path).status_code == 200
            assert client.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/models/", "//v1/models", "/v1//models", "/v1/./models", "/v1/../v1/models", "/%76%31/models"),
        *("/V1/models", "/v1/models;x", "/v1/models?api_key=" + KEY, "/health/", "/health/live/", "//health"),
        *(
            "/health/../metrics",
            "/health%2f..%2fmetrics",
            "/health/live/../../v1/models",
            "/Health",
            "/health;/metrics",
        ),
        *("/health%00", "/metrics/", "/openapi.json/"),
    ],
)
def test_no_spelling_of_a_path_opens_it(server: LiveServer, path: str) -> None:
    head = server.raw(f"GET {path} HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n".encode())
    assert head.startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"bearer  {KEY}"},
        {"Authorization": f"BEARER {KEY}"},
        {"X-Api-Key": KEY},
        {"Authorization": f"Bearer {KEY}", "X-Api-Key": KEY},
        {"Authorization": f"Bearer {OTHER_KEY}".encode()},
    ],
)
def test_right_keys(server: LiveServer, headers: dict[str, Any]) -> None:
    with server.client() as client:
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json"):
            assert client.get(path, headers=headers).status_code == 200
        assert client.get("/nope", headers=headers).status_code == 404


@pytest.mark.parametrize(
    "value",
    [
        *(b"", b"Bearer", b"Bearer ", b"Basic " + KEY.encode(), KEY.encode(), b"Bearer" + KEY.encode()),
        *(b"Bearer " + KEY.encode()[:-1], b"Bearer " + KEY.encode() + b"x", b"Bearer " + KEY.upper().encode()),
        *(b"Bearer \xff\xfe", "Bearer ключ".encode(), b"Bearer " + b"k" * 20_000, b"Bearer " + KEY.encode() + b",x"),
    ],
)
def test_wrong_keys(server: LiveServer, value: bytes) -> None:
    request = b"GET /v1/models HTTP/1.1\r\nHost: t\r\nConnection: close\r\nAuthorization: " + value + b"\r\n\r\n"
    assert server.raw(request).startswith(b"HTTP/1.1 401")


def test_two_different_keys_are_none(server: LiveServer) -> None:
    lines = f"Authorization: Bearer {KEY}\r\nAuthorization: Bearer wrong\r\n".encode()
    request = b"GET /v1/models HTTP/1.1\r\nHost: t\r\nConnection: close\r\n" + lines + b"\r\n"
    assert server.raw(request).startswith(b"HTTP/1.1 401")


def test_a_body_without_a_key_is_not_read(server: LiveServer) -> None:
    answer = server.raw(http_post("/v1/chat/completions", chat_body("x")))
    assert answer.startswith(b"HTTP/1.1 401")


def test_tenants_have_different_cache_salts(server: LiveServer) -> None:
    salts = []
    with server.client() as client:
        for key, fields in (
            (KEY, {}),
            (KEY, {}),
            (OTHER_KEY, {}),
            (KEY, {"cache_salt": "a"}),
            (OTHER_KEY, {"cache_salt": "a"}),
        ):
            headers = {"Authorization": f"Bearer {key}".encode()}
            body = chat_body("x", max_tokens=1, **fields)
            assert client.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
            salts.append(server.engine.requests[-1].cache_salt)
    assert salts[0] == salts[1]
    assert len(set(salts)) == 4
    assert all(salts)
    assert KEY not in "".join(salts)


class TestKeyRing:
    def test_every_key_is_compared_in_constant_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[tuple[bytes, bytes]] = []
        original = hmac.compare_digest

        def spy(a: bytes, b: bytes) -> bool:
            seen.append((a, b))
            return original(a, b)

        monkeypatch.setattr(hmac, "compare_digest", spy)
        ring = KeyRing(["a", "b", "c"])
        for presented, found in ((b"a", True), (b"c", True), (b"x", False), (b"\xff", False)):
            seen.clear()
            assert (ring.find(presented) is not None) == found
            assert len(seen) == 3, "an early end tells how many keys there are before the right one"
            assert all(len(a) == len(b) == 32 for a, b in seen), "digests, not keys"

    def test_ids_tell_keys_apart_and_nothing_else(self) -> None:
        ring = KeyRing([KEY, OTHER_KEY])
        ids = [ring.find(key.encode()).id for key in (KEY, OTHER_KEY)]
        assert len(set(ids)) == 2
        assert not any(part in key for part in ids for key in (KEY, OTHER_KEY))
        assert KeyRing([KEY]).find(KEY.encode()).id == ids[0], "the same after a restart: logs can be compared"

    def test_salts_are_secret_of_the_process(self) -> None:
        first, second = KeyRing([KEY]), KeyRing([KEY])
        assert first.cache_salt(first.find(KEY.encode()), None) != second.cache_salt(second.find(KEY.encode()), None)

    def test_no_keys(self) -> None:
        assert not KeyRing()
        assert KeyRing().find(b"") is None
        assert KeyRing().cache_salt(None, None) == ""

    def test_from_settings(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_text("# ours\n  from-file-1  \n\nfrom-file-2\n")
        ring = KeyRing.from_settings(Settings(api_key=("flag",), api_key_file=file))
        assert all(ring.find(key) for key in (b"flag", b"from-file-1", b"from-file-2"))
        assert not any(ring.find(key) for key in (b"", b"# ours", b"  from-file-1  "))
        assert not KeyRing.from_settings(Settings())

    @pytest.mark.parametrize("content", [None, b"", b"# only a comment\n", b"\xff\xfe"])
    def test_bad_key_file_stops_the_program(self, tmp_path: Path, content: bytes | None) -> None:
        file = tmp_path / "keys"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(SettingsError, match="--api-key-file") as error:
            KeyRing.from_settings(Settings(api_key_file=file))
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("content", [None, b"", b" \n\t\n", b"# only a comment\n"])
    def test_bad_admin_key_file_stops_the_program(self, tmp_path: Path, content: bytes | None) -> None:
        file = tmp_path / "keys"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(SettingsError, match="--admin-key-file"):
            KeyRing.admin(Settings(admin_key_file=file))

    def test_admin_keys_from_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "keys"
        file.write_bytes(b"\xef\xbb\xbffirst \r\nsecond")
        settings = Settings(admin_key="flag", admin_key_file=file)
        ring = KeyRing.admin(settings)
        assert all(ring.find(key) for key in (b"flag", b"first", b"second"))
        assert Settings(admin_key_file=file).has_admin

    @pytest.mark.parametrize("empty", ["", " ", "\t"])
    def test_an_empty_key_is_never_one(self, empty: str) -> None:
        with pytest.raises(SettingsError, match="empty"):
            KeyRing([KEY, empty])
        for headers in ([(b"x-api-key", empty.encode())], [(b"authorization", b"Bearer " + empty.encode())]):
            assert presented_key(headers) is None

    def test_presented_key(self) -> None:
        assert presented_key([(b"authorization", b"Bearer x")]) == b"x"
        assert presented_key([(b"x-api-key", b"x")]) == b"x"
        assert presented_key([(b"authorization", b"Bearer x"), (b"x-api-key", b"y")]) is None
        assert presented_key([]) is None


def test_keys_never_show(server: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with server.client() as client:
        for path in ("/v1/models", "/nope", "/metrics"):
            response = client.get(path, headers={"Authorization": f"Bearer {KEY}"})
            assert KEY not in response.text
            assert KEY not in str(response.headers)
    ours = [record for record in caplog.records if record.name.startswith("guanaco")]
    assert [r.fields["key_id"] for r in ours if r.name == "guanaco.access"] == [
        KeyRing([KEY]).find(KEY.encode()).id
    ] * 3
    assert KEY not in json.dumps([[str(r.msg), str(r.args), getattr(r, "fields", None)] for r in ours])


class TestAdminKeyOnClientRoutes:
    """Controllers have one key: it lists models and loads adapters."""

    @pytest.fixture(params=[(KEY,), ()], ids=["with API keys", "without"])
    def state(self, request: pytest.FixtureRequest) -> ApiState:
        return replace(make_state(keys=request.param), admin_keys=KeyRing(["sesame"]))

    def test_it_is_a_tenant_of_its_own(self, state: ApiState) -> None:
        salts = []
        with LiveServer(state) as server, server.client() as client:
            for key in ("sesame", "sesame", KEY):
                headers = {"Authorization": f"Bearer {key}"}
                assert client.get("/v1/models", headers=headers).status_code == 200
                answer = client.post("/v1/chat/completions", json=chat_body("x", max_tokens=1), headers=headers)
                assert answer.status_code == 200
                salts.append(server.engine.requests[-1].cache_salt)
            wrong = client.get("/v1/models", headers={"Authorization": "Bearer wrong"})
            assert wrong.status_code == (401 if state.keys else 200)
            assert client.get("/v1/adapters", headers={"Authorization": f"Bearer {KEY}"}).status_code == 401
        assert salts[0] == salts[1]
        assert salts[2] not in salts[:2]
        assert salts[0]

    def test_a_profiles_allowed_keys_apply_to_it(self, state: ApiState) -> None:
        admin = KeyRing(["sesame"]).find(b"sesame")
        assert admin is not None
        for name, allowed in (("for-nobody", ()), ("for-admin", (admin.id,))):
            profile = SimpleNamespace(allowed_keys=allowed, chat_template=None, stop=(), sampling={})
            state.catalog._models[name] = ServedModel(name, 64, root=name, profile=profile)
        with LiveServer(state) as server, server.client(headers={"X-Api-Key": "sesame"}) as client:
            names = [card["id"] for card in client.get("/v1/models").json()["data"]]
            assert client.get("/v1/models/for-nobody").status_code == 404
        assert ("for-nobody" in names, "for-admin" in names) == (False, True)
