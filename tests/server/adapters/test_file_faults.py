"""Files that are deleted, exchanged, truncated, overwritten or locked while a real server reads them or has read them:
resident adapters answer as before, a load ends with what it says, and a restart serves what is whole.
"""

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.adapters.tiny_adapters import make_adapter
from support.models.tiny_models import make_tiny_llama
from support.server.documented import ADAPTER_CODES
from support.server.real_server import (
    ADMIN,
    BASE,
    PROMPTS,
    WAIT,
    RealServer,
    Traffic,
    ask,
    complete,
    make_real_server,
    nothing_is_left,
    obey_permissions,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAMES = ("r0", "r1", "r2", "r3")  # one more than there are places on the device
FAULTS = ("delete", "rename over", "truncate", "overwrite", "chmod")


def damage(path: Path, fault: str, rng: random.Random, other: bytes) -> None:
    """Do to a file what `fault` says; `other` is another adapter's file of the same kind, whole and in order."""
    try:
        match fault:
            case "delete":
                path.unlink()
            case "rename over":
                beside = path.with_suffix(f".{rng.random()}")
                beside.write_bytes(other)
                beside.rename(path)
            case "truncate":
                os.truncate(path, rng.randrange(path.stat().st_size))
            case "overwrite":  # with NaN, or what is no JSON; bit by bit, as a slow copy would
                with path.open("r+b", buffering=0) as file:
                    for at in range(rng.randrange(path.stat().st_size), path.stat().st_size, 16384):
                        file.seek(at)
                        file.write(b"\xff" * 64)
            case "chmod":
                path.chmod(0)
    except (FileNotFoundError, ValueError):
        pass  # it is gone already, or empty


class Scene:
    """A server with its resident adapters, and sources s0 to s7 to load under other names."""

    def __init__(self, server: RealServer, admin: httpx.Client) -> None:
        self.server = server
        self.admin = admin
        self.versions: dict[str, str] = {}  # by source
        self.answers: dict[str, tuple[str, ...]] = {}  # by version
        for seed in range(8):
            self.write(f"s{seed}")
            version = self.load("learn", f"s{seed}").json()["version"]
            self.versions[f"s{seed}"], self.answers[version] = version, server.answers("learn")
        assert admin.delete("/v1/adapters/learn").status_code == 200
        assert len(set(self.answers.values())) == len(self.versions)
        for name, source in zip(NAMES, self.versions, strict=False):
            assert self.load(name, source).status_code == 201
        self.resident = {
            name: self.answers[self.versions[source]] for name, source in zip(NAMES, self.versions, strict=False)
        }

    def write(self, source: str) -> Path:
        """Put a source in order, at once."""
        folder = self.server.root / source
        fresh = make_adapter(self.server.root / f"new-{source}", self.server.targets, 8, seed=int(source[1:]))
        folder.mkdir(exist_ok=True)
        for name in (CONFIG, WEIGHTS):
            (fresh / name).rename(folder / name)
        return folder

    def load(self, name: str, source: str) -> httpx.Response:
        return self.admin.put(f"/v1/adapters/{name}", json={"source": source})

    def check(self, name: str, response: httpx.Response) -> str:
        """A load either says why not, in documented words, or its version's tokens come; the outcome, for counting."""
        if response.status_code not in (200, 201):
            error = response.json()["error"]
            assert ADAPTER_CODES.get(error["code"]) == response.status_code, response.text
            return str(error["code"])
        version = response.json()["version"]
        assert version in self.answers, "a version that nobody made was published"
        assert complete(self.admin, name, PROMPTS[0]) == self.answers[version][0]
        return "loaded"

    def store_file(self, rng: random.Random) -> Path | None:
        """Some file of the store: of a version, or of a copy that is being made."""
        try:
            files = [path for path in self.server.store.glob("*/*") if path.suffix in (".json", ".safetensors")]
        except FileNotFoundError:  # a copy that was being made is refused, and gone
            return None
        return rng.choice(files) if files else None


def scene_of(directory: Path, model: Path, **settings: Any) -> RealServer:
    """What was loaded before is read here, and permissions count for that too."""
    with ThreadPoolExecutor(1, initializer=obey_permissions) as thread:
        return thread.submit(
            make_real_server, directory, model=model, thread_setup=obey_permissions, **settings
        ).result()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / BASE)


def test_file_faults(tmp_path: Path, model: Path, proof_count: Callable[[int, int], int]) -> None:
    rng, outcomes, count = random.Random(5), Counter[str](), proof_count(40, 500)
    with scene_of(tmp_path, model) as server, server.client(headers=ADMIN) as admin:
        scene = Scene(server, admin)
        others = {name: (server.root / "s7" / name).read_bytes() for name in (WEIGHTS, CONFIG)}
        with nothing_is_left(server), Traffic(server, {BASE: server.answers(BASE), **scene.resident}) as traffic:
            for turn in range(count):
                fault, source = FAULTS[turn % len(FAULTS)], f"s{rng.randrange(7)}"
                folder = scene.write(source)
                victim: Path | None = folder / rng.choice((WEIGHTS, WEIGHTS, CONFIG))
                if turn % 3 == 2:
                    victim = scene.store_file(rng)
                if turn % 2 and victim is not None:  # before the load; else in the middle of it
                    damage(victim, fault, rng, others[victim.name])
                    victim = None
                breaker = threading.Thread(target=_later, args=(scene, victim, fault, rng, others), daemon=True)
                breaker.start()
                outcomes[scene.check("loading", scene.load("loading", source))] += 1
                breaker.join(WAIT)
            for name in NAMES:  # the resident ones too, now that their stored copies have suffered
                assert tuple(complete(admin, name, prompt) for prompt in PROMPTS) == scene.resident[name]
            admin.delete("/v1/adapters/loading")
            for source in scene.versions:
                scene.write(source)
            for name, source in zip(NAMES, scene.versions, strict=False):
                assert scene.check(name, scene.load(name, source)) == "loaded", "a new load mends the stored copy"
        assert traffic.wrong == []
        assert traffic.num_right > 20
    assert outcomes["loaded"] > count // 10, outcomes
    assert len(outcomes) > 4, f"the faults were not felt: {outcomes}"


def _later(scene: Scene, victim: Path | None, fault: str, rng: random.Random, others: dict[str, bytes]) -> None:
    """A fault at some moment of a load; without a victim, to a copy that it makes."""
    time.sleep(rng.random() * 0.03)
    victim = victim or scene.store_file(rng)
    if victim is not None:
        damage(victim, fault, rng, others[victim.name])


def test_faults_of_what_waits_on_disk(tmp_path: Path, model: Path, proof_count: Callable[[int, int], int]) -> None:
    """Memory has room for three of four adapters, so requests wait for copies to be read that suffer meanwhile: they
    get the right answer or are told why there is none, and a new load mends it."""
    rng, outcomes, count = random.Random(9), Counter[str](), proof_count(16, 250)
    allowed = frozenset({"adapter_broken", "adapter_read_failed", "model_not_found"})
    with scene_of(tmp_path, model, adapter_host_memory=250_000) as server, server.client(headers=ADMIN) as admin:
        scene = Scene(server, admin)
        others = {name: (server.root / "s7" / name).read_bytes() for name in (WEIGHTS, CONFIG)}
        expected = {BASE: server.answers(BASE), **scene.resident}
        with nothing_is_left(server), Traffic(server, expected, allowed=allowed) as traffic:
            for turn in range(count):
                number = rng.randrange(len(NAMES))
                name, source = NAMES[number], f"s{number}"
                victim = server.store / scene.versions[source] / rng.choice((WEIGHTS, WEIGHTS, CONFIG))
                damage(victim, FAULTS[turn % len(FAULTS)], rng, others[victim.name])
                for _ in range(4):
                    response = ask(admin, rng.choice(NAMES), PROMPTS[0])
                    outcomes[str(response.status_code)] += 1
                assert scene.check(name, scene.load(name, source)) == "loaded"
                assert tuple(complete(admin, name, prompt) for prompt in PROMPTS) == scene.resident[name]
        assert traffic.wrong == []
        assert traffic.num_right > 20
        assert traffic.refused.total() + outcomes.total() - outcomes["200"] > 0, "no fault was felt"


def test_a_restart_serves_what_is_whole(tmp_path: Path, model: Path) -> None:
    """A fault of each kind to a stored copy of its own: those names are listed as broken, the others answer, and
    loading them again mends them."""
    with scene_of(tmp_path, model) as server, server.client(headers=ADMIN) as admin:
        scene = Scene(server, admin)
        other = (server.root / "s7" / WEIGHTS).read_bytes()
        broken = {f"s{number}": fault for number, fault in enumerate(FAULTS, start=1)}
        for source in broken:
            assert scene.load(f"of-{source}", source).status_code in (200, 201)
    for source, fault in broken.items():
        damage(server.store / scene.versions[source] / WEIGHTS, fault, random.Random(1), other)
    with scene_of(tmp_path, model) as server, server.client(headers=ADMIN) as admin:
        cards = {card["name"]: card for card in admin.get("/v1/adapters").json()["data"]}
        assert {name for name, card in cards.items() if card["state"] == "broken"} == {
            *(f"of-{source}" for source in broken),
            *NAMES[1:],
        }
        assert tuple(complete(admin, NAMES[0], prompt) for prompt in PROMPTS) == scene.resident[NAMES[0]]
        scene.admin, scene.server = admin, server
        for source in broken:
            assert admin.post("/v1/completions", json={"model": f"of-{source}", "prompt": "x"}).status_code == 404
            assert scene.check(f"of-{source}", scene.load(f"of-{source}", source)) == "loaded"
