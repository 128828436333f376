"""When the last user of a version leaves: registry, engine and store let it go in this order, and only then."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guanaco.adapters.peft.weights import load_adapter
from guanaco.adapters.versions.holds import Holder
from guanaco.adapters.versions.registry import AdapterRegistry
from guanaco.adapters.versions.registry_file import RegistryFile
from guanaco.server.adapters.retirement import Retirement
from support.adapters.tiny_adapters import make_adapter
from support.server.adapter_server import ADMIN, make_adapter_server
from support.server.api_server import WAIT

TARGETS = {"layers.0.self_attn.q_proj": (8, 8)}


class World:
    """A registry with one loaded adapter, `a`; a made-up engine and store that note what they are told."""

    def __init__(self, directory: Path) -> None:
        self.registry = AdapterRegistry(TARGETS, base_names=())
        self.adapter = load_adapter(make_adapter(directory, TARGETS, 2), TARGETS, name="a")
        self.version = self.adapter.version
        self.registry.publish("a", self.adapter, source="a")
        self.told: list[str] = []
        self.answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.collecting: asyncio.Event | None = None
        self.retirement = Retirement(self.registry, self, self, self)  # type: ignore[arg-type]
        self.retirement.start()

    async def forget(self, version: str) -> bool:
        assert not self.registry.knows(version), "a request could still ask for it"
        self.told.append("forget")
        return await self.answer

    async def collect(self) -> None:
        self.told.append("collect")
        if self.collecting is not None:
            await self.collecting.wait()

    def on_loop(self, tell: Callable[[str], None], version: str) -> None:
        asyncio.get_running_loop().call_soon(tell, version)

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)


def test_a_version_leaves_with_its_last_user(tmp_path: Path) -> None:
    async def run() -> None:
        world = World(tmp_path)
        assert world.registry.acquire("a") is not None
        world.registry.remove("a")
        await world.settle()
        assert world.told == [], "a request holds it"
        world.registry.release(world.version)
        await world.settle()
        assert world.told == ["forget"], "its stored copy may still be read"
        world.answer.set_result(True)
        await world.settle()
        assert world.told == ["forget", "collect"]
        assert not world.retirement.tasks

    asyncio.run(run())


def test_whoever_waits_for_its_end_is_told(tmp_path: Path) -> None:
    async def run() -> None:
        world = World(tmp_path)
        assert world.registry.acquire("a") is not None
        world.registry.remove("a")
        waiting = asyncio.create_task(world.retirement.wait([world.version], 60.0))
        assert not await world.retirement.wait([world.version], 0.0)
        world.registry.release(world.version)
        await world.settle()
        assert not waiting.done()
        world.answer.set_result(True)
        assert await waiting
        assert await world.retirement.wait([world.version], 60.0), "there is nothing to wait for"

    asyncio.run(run())


def test_one_that_is_published_again_is_not_waited_for(tmp_path: Path) -> None:
    async def run() -> None:
        world = World(tmp_path)
        assert world.registry.acquire("a") is not None
        world.registry.remove("a")
        waiting = asyncio.create_task(world.retirement.wait([world.version], 60.0))
        await world.settle()
        world.registry.publish("b", world.adapter, source="b")
        world.retirement.stays(world.version)
        assert await waiting
        world.registry.release(world.version)
        await world.settle()
        assert world.told == []

    asyncio.run(run())


@pytest.mark.parametrize("came_back", [True, False])
def test_one_that_is_freed_again_while_it_leaves_leaves_again(tmp_path: Path, came_back: bool) -> None:
    async def run() -> None:
        world = World(tmp_path)
        world.registry.remove("a")
        await world.settle()
        world.registry.holds.take(world.version, Holder.LOAD)
        if came_back:
            world.registry.stage(world.adapter)
        world.registry.holds.give_back(world.version, Holder.LOAD)
        await world.settle()
        assert world.told == ["forget"]
        first, world.answer = world.answer, asyncio.get_running_loop().create_future()
        first.set_result(not came_back)
        await world.settle()
        assert world.told == (["forget", "forget"] if came_back else ["forget", "collect", "collect"])
        world.answer.set_result(True)
        await world.settle()
        assert world.told[-1] == "collect"
        assert not world.registry.knows(world.version)
        assert not world.retirement.tasks

    asyncio.run(run())


def test_what_only_history_held_is_collected(tmp_path: Path) -> None:
    async def run() -> None:
        world = World(tmp_path)
        world.registry.holds.assign("aliases", {Holder.HISTORY: ["earlier"]})
        world.registry.holds.assign("aliases", {Holder.HISTORY: []})
        await world.settle()
        assert world.told == ["collect"], "the engine was never told of it"

    asyncio.run(run())


@pytest.mark.parametrize("fails", [False, True])
def test_a_stored_copy_stays_until_the_list_no_longer_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """A kill in between would leave a list of what is gone; so would a list that cannot be written."""
    going, writing = threading.Event(), threading.Event()
    with make_adapter_server(tmp_path) as server, server.client(headers=ADMIN) as client:
        put = client.put("/v1/adapters/a", json={"source": server.source("a", 1)})
        version = put.json()["version"]
        write = RegistryFile.write

        def slowly(self: RegistryFile, *arguments: Any, **names: Any) -> None:
            writing.set()
            assert going.wait(WAIT)
            if fails:
                raise OSError(28, "No space left on device")
            write(self, *arguments, **names)

        monkeypatch.setattr(RegistryFile, "write", slowly)
        deleting = threading.Thread(target=client.delete, args=("/v1/adapters/a",), daemon=True)
        deleting.start()
        assert writing.wait(WAIT)
        server.wait(lambda: not server.registry.versions() and not server.manager._retirement.tasks)
        assert server.store.versions() == {version}
        going.set()
        deleting.join(WAIT)
        server.wait(lambda: not server.manager._retirement.tasks)
        if fails:
            assert server.store.versions() == {version}
        else:
            server.wait(lambda: not server.store.versions())
