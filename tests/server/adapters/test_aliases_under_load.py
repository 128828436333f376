"""Aliases, versions and requests all at once: adapters are replaced, rolled back and removed under names that lead to
them, while everybody asks by those names. Each answer is one version's, and at the end nothing is left.
"""

import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from guanaco.adapters.versions.holds import Holder
from support.server.adapter_client import check_text, complete, error_code, put
from support.server.adapter_server import ADMIN, AdapterServer, make_adapter_server
from support.server.api_server import WAIT

NAMES, ALIASES = ("a", "b", "c"), ("p", "q", "r")
REFUSED = {  # what may happen to who asks while names come and go
    *("adapter_not_found", "alias_cycle", "alias_not_found", "alias_target_missing", "bad_target", "model_not_found"),
    *("name_taken", "no_history", "target_not_found", "version_missing", "adapter_unloaded", "revision_conflict"),
}


class Turns:
    """One thread's random operations."""

    def __init__(self, server: AdapterServer, client: httpx.Client, seed: int) -> None:
        self.server = server
        self.client = client
        self.rng = random.Random(seed)

    def change_adapter(self) -> httpx.Response:
        name, roll = self.rng.choice(NAMES), self.rng.random()
        if roll < 0.5:
            return self.client.put(f"/v1/adapters/{name}", json={"source": f"s{self.rng.randrange(6)}"})
        if roll < 0.8:
            return self.client.post(f"/v1/adapters/{name}/rollback", json={})
        force = self.rng.choice(("true", "false"))
        return self.client.delete(f"/v1/adapters/{name}?timeout=0&force={force}")

    def change_alias(self) -> httpx.Response:
        alias, roll = self.rng.choice(ALIASES), self.rng.random()
        if roll < 0.1:
            return self.client.delete(f"/v1/aliases/{alias}")
        if roll < 0.2:
            return self.client.post(f"/v1/aliases/{alias}/rename", json={"name": self.rng.choice(ALIASES)})
        if roll < 0.35:
            return self.client.post(f"/v1/aliases/{alias}/rollback", json={})
        split = {self.target(): self.rng.randrange(1, 4) for _ in range(self.rng.randrange(1, 4))}
        return self.client.put(f"/v1/aliases/{alias}", json={"split": split})

    def target(self) -> str:
        name = self.rng.choice((*NAMES, *NAMES, *ALIASES))
        card = self.client.get(f"/v1/adapters/{name}").json()
        versions = [card.get("version"), *card.get("history", [])]
        return name if versions[0] is None or self.rng.random() < 0.3 else f"{name}@{self.rng.choice(versions)[:12]}"

    def ask(self) -> str | None:
        """The refusal's code; None for an answer, which is checked."""
        prompt = f"p{self.rng.randrange(3)}" * self.rng.randrange(1, 12)
        answer = complete(self.client, prompt, 6, model=self.rng.choice((*ALIASES, *ALIASES, *NAMES)))
        if answer.status_code == 200:
            check_text(answer, prompt, 6)
            return None
        return error_code(answer)


def shown(client: httpx.Client) -> dict[str, list[object]]:
    """What a restart brings back of each alias."""
    cards = client.get("/v1/aliases").json()["data"]
    return {card["name"]: [card["revision"], card["split"], card["history"]] for card in cards}


@pytest.mark.parametrize("host_memory", [1 << 30, 2000], ids=["all in memory", "most on disk"])
def test_everything_at_once(tmp_path: Path, proof_count: Callable[[int, int], int], host_memory: int) -> None:
    num_threads, num_turns = proof_count(4, 16), proof_count(40, 300)
    ended = Counter[str | None]()

    def work(server: AdapterServer, seed: int) -> None:
        with server.client(headers=ADMIN) as client:
            turns = Turns(server, client, seed)
            for _ in range(num_turns):
                roll = turns.rng.random()
                if roll < 0.6:
                    ended[turns.ask()] += 1
                    continue
                response = turns.change_adapter() if roll < 0.75 else turns.change_alias()
                if response.is_error:
                    ended[error_code(response)] += 1

    with make_adapter_server(tmp_path, host_memory=host_memory) as server, server.client(headers=ADMIN) as client:
        for seed in range(6):
            server.source(f"s{seed}", seed)
        for name in NAMES:
            put(client, name, "s0")
        with ThreadPoolExecutor(num_threads) as threads:
            for done in [threads.submit(work, server, seed) for seed in range(num_threads)]:
                done.result(WAIT * 20)
        assert ended.keys() - REFUSED == {None}, ended
        assert ended[None] > num_threads * num_turns / 10
        before = shown(client)
    with make_adapter_server(tmp_path, host_memory=host_memory) as server, server.client(headers=ADMIN) as client:
        assert shown(client) == before, "a restart changes nothing"
        for name in before:
            client.delete(f"/v1/aliases/{name}")
        for card in client.get("/v1/adapters").json()["data"]:
            client.delete(f"/v1/adapters/{card['name']}")
        server.wait(lambda: not server.registry.versions() and not server.model.slots)
        server.wait(lambda: not server.store.versions())
        assert not server.registry.holds.held(Holder.REQUEST, Holder.LOAD)
        server.assert_quiet()
