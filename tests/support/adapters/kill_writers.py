"""Run as a program: children that put adapters into a store and write them down, each killed at a random moment; after
each the store must open, and everything that is written down must be there and be what it was.

    kill_writers.py DIRECTORY NUM_KILLS [BUG]

BUG: one of `BUGS`, which is planted first: the check is worth what it can find.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from guanaco.adapters.peft.weights import LoadedAdapter
from guanaco.adapters.versions.holds import Holder, HoldLedger
from guanaco.adapters.versions.registry_file import RegistryFile, Saved
from guanaco.adapters.versions.store import VersionStore
from support.adapters.tiny_adapters import make_adapter

TARGETS = {"layers.0.self_attn.q_proj": (64, 64), "layers.0.mlp.down_proj": (64, 64)}


def write(directory: Path, rng: random.Random) -> None:
    """Load and replace until killed, as the adapter manager does: store, write down, collect."""
    holds = HoldLedger()
    store = VersionStore(directory / "store", TARGETS, holds)
    file = RegistryFile(store.directory / "registry.json")
    while True:
        records = {record.name: record for record in file.read()}
        name = rng.choice("abc")
        adapter = store.ingest(directory / f"source{rng.randrange(8)}", name=name)
        before = (records[name].version,) if name in records else ()
        records[name] = Saved(name, adapter.version, "source", before)
        file.write(records.values())
        wanted = [v for record in records.values() for v in (record.version, *record.history)]
        holds.assign("records", {Holder.NAME: wanted})
        holds.give_back(adapter.version, Holder.LOAD)
        store.collect()


def _write_in_place(self: RegistryFile, records: Iterable[Saved]) -> None:
    content = {"format": 1, "adapters": [asdict(record) for record in records], "aliases": [], "pinned": []}
    with self.path.open("w") as file:
        for line in json.dumps(content, indent=1).splitlines(keepends=True):
            file.write(line)
            file.flush()
            os.fsync(file.fileno())  # takes long enough for a kill to come


def _publish_file_by_file(self: VersionStore, incoming: Path, version: str) -> None:
    self._holds.take(version, Holder.LOAD)
    if (self.directory / version).exists():
        return
    (self.directory / version).mkdir()
    for path in incoming.iterdir():
        shutil.copyfile(path, self.directory / version / path.name)
        os.sync()


def _collect_too_early(self: VersionStore, path: Path, *, name: str, _original=VersionStore.ingest) -> LoadedAdapter:
    """What the list names goes before the list does."""
    adapter = _original(self, path, name=name)
    for other in self.versions() - {adapter.version}:
        shutil.rmtree(self.directory / other)
    return adapter


BUGS: dict[str, tuple[object, str, Callable[..., object]]] = {
    "the list is written in place": (RegistryFile, "write", _write_in_place),
    "a copy appears file by file": (VersionStore, "_publish", _publish_file_by_file),
    "a copy goes before the list does": (VersionStore, "ingest", _collect_too_early),
}


def main() -> None:
    directory, kills = Path(sys.argv[1]), int(sys.argv[2])
    if len(sys.argv) > 3:
        where, attribute, bug = BUGS[sys.argv[3]]
        setattr(where, attribute, bug)
    torch.set_num_threads(1)
    for seed in range(8):
        make_adapter(directory / f"source{seed}", TARGETS, 8, seed=seed, modules=("q_proj", "down_proj"))
    rng, num_seen = random.Random(0), 0
    for turn in range(kills):
        child = os.fork()
        if child == 0:
            write(directory, random.Random(turn))
        time.sleep(0.02 + 0.15 * rng.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        store = VersionStore(directory / "store", TARGETS, HoldLedger())
        for record in RegistryFile(store.directory / "registry.json").read():
            for version in (record.version, *record.history):
                assert store.read(version).version == version
                num_seen += 1
        for version in store.versions():
            store.read(version)  # whether or not it came to be written down
        left = [path.name for path in store.directory.iterdir() if path.name.startswith(".incoming")]
        assert left == [], left
        store.close()
    assert num_seen > kills, "the writers never came so far as to write anything down"
    print(f"{kills} kills, {num_seen} versions read back")


if __name__ == "__main__":
    main()
