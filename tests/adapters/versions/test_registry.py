"""Names, collisions, and one consistent view for two threads."""

import contextlib
import threading
from pathlib import Path

import pytest

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.peft.weights import AdapterLimits
from guanaco.adapters.versions import registry as registry_module
from guanaco.adapters.versions.names import parse_adapter_option
from guanaco.adapters.versions.registry import AdapterRegistry
from support.adapters.tiny_adapters import make_adapter

TARGETS = {"layers.0.self_attn.q_proj": (8, 8), "layers.0.mlp.up_proj": (8, 24)}


@pytest.fixture
def registry():
    return AdapterRegistry(TARGETS, base_names=("tiny", "alias"), limits=AdapterLimits(max_rank=16))


def test_what_a_name_stands_for(registry, tmp_path):
    path = make_adapter(tmp_path, TARGETS, 4, modules=["q_proj"])
    assert registry.resolve("pirate") is None
    entry = registry.load("pirate", path)
    assert registry.resolve("pirate") is entry
    assert registry.resolve("Pirate") is None
    adapter = registry.host_copy(entry.version)
    assert (entry.name, entry.version, entry.source) == ("pirate", adapter.version, str(path))
    assert (entry.max_rank, entry.modules_applied, entry.modules_possible) == (4, 1, 2)
    assert entry.num_bytes == adapter.num_bytes == registry.num_bytes == 4 * (4 * 8 + 8 * 4)


def test_order_and_shared_content(registry, tmp_path):
    first = make_adapter(tmp_path / "a", TARGETS, 4, seed=1)
    second = make_adapter(tmp_path / "b", TARGETS, 8, seed=2)
    loaded = [registry.load(name, path) for name, path in (("z", first), ("m", second), ("a", first))]
    assert registry.entries() == tuple(loaded)
    assert loaded[0].version == loaded[2].version != loaded[1].version
    assert registry.num_bytes == loaded[0].num_bytes + loaded[1].num_bytes, "the same content is kept once"


@pytest.mark.parametrize("name", ["tiny", "alias", "pirate"])
def test_taken_names(registry, tmp_path, name):
    path = make_adapter(tmp_path, TARGETS, 4)
    registry.load("pirate", path)
    with pytest.raises(AdapterError) as error:
        registry.load(name, path)
    assert error.value.code == "name_taken"
    assert len(registry.entries()) == 1


def test_a_refused_adapter_leaves_nothing_behind(registry, tmp_path):
    with pytest.raises(AdapterError) as error:
        registry.load("big", make_adapter(tmp_path, TARGETS, 17))
    assert error.value.code == "rank_too_large"
    assert registry.entries() == ()
    assert registry.num_bytes == 0
    registry.load("big", make_adapter(tmp_path, TARGETS, 16))


def test_an_unknown_field_is_a_note(tmp_path):
    loaded = AdapterRegistry(TARGETS, base_names=()).load("a", make_adapter(tmp_path, TARGETS, 4, novelty=True))
    assert "novelty" in loaded.notes[0]


GOOD_NAMES = ["a", "0", "guanaco-7b", "A.b_c-D", "x" * 64, "a..", "1.5", "CON", "null", "a" + "-" * 63]
BAD_NAMES = [
    *[
        "",
        " ",
        ".",
        "..",
        "...",
        ".a",
        "-a",
        "_a",
        "-rf",
        "a b",
        " a",
        "a ",
        "a\n",
        "\na",
        "a\0",
        "a\tb",
        "a\r",
        "a\x0b",
    ],
    *["a\x85", "a\u2028", "a\u00a0", "\u3000", "a/b", "a\\b", "/etc/passwd", "../x", "a/../../b", "..%2fx", "..%252fx"],
    *[
        "....//x",
        "C:\\x",
        "\\\\srv\\x",
        "file:///x",
        "http://x",
        "a:b",
        "a@b",
        "a=b",
        "a,b",
        "a;b",
        "a?b",
        "a#b",
        "a%41",
    ],
    *[
        "$(id)",
        "`id`",
        "{{7*7}}",
        "<script>",
        "a'b",
        'a"b',
        "a|b",
        "a&b",
        "a*",
        "~",
        "a~",
        "[a]",
        "(a)",
        "a!",
        "+a",
        "a+b",
    ],
    *[
        "x" * 65,
        "x" * 1_000_000,
        "é",
        "e\u0301",
        "\u2024\u2024",
        "\uff0e\uff0e",
        "\u202eabc",
        "\ufeffa",
        "a\u200b",
        "日本",
    ],
    *["\ud800", "\x1b[2J", "%s", "%00", "\u0430bc"],
]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_good_names(registry, tmp_path, name):
    assert registry.load(name, make_adapter(tmp_path, TARGETS, 4)).name == name
    assert parse_adapter_option(f"{name}=path") == (name, Path("path"))


@pytest.mark.parametrize("name", BAD_NAMES, ids=range(len(BAD_NAMES)))
def test_bad_names(registry, tmp_path, name):
    with pytest.raises(AdapterError) as error:
        registry.load(name, tmp_path / "never read")
    assert error.value.code == "bad_name"
    assert str(error.value).isascii()
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 2000
    if "=" not in name:
        with pytest.raises(AdapterError):
            parse_adapter_option(f"{name}=/path")


def test_adapter_option():
    assert parse_adapter_option("a=/x/y=z") == ("a", Path("/x/y=z"))
    assert parse_adapter_option("a=~/x") == ("a", Path.home() / "x")
    for text in ("", "a", "a=", "=", "=/x", "/x"):
        with pytest.raises(AdapterError):
            parse_adapter_option(text)


def test_readers_see_whole_entries_while_others_load(registry, tmp_path):
    """Every name that resolves has its host copy, at any moment and from any thread."""
    paths = [make_adapter(tmp_path / str(seed), TARGETS, 2, seed=seed) for seed in range(16)]
    done = threading.Event()
    problems = []

    def read():
        while not done.is_set():
            for entry in registry.entries():
                if registry.host_copy(entry.version).version != entry.version:
                    problems.append(entry)

    def load(worker):
        for index in range(worker, 16, 4):
            registry.load(f"a{index}", paths[index])

    def contend():
        try:
            registry.load("same", paths[0])
        except AdapterError as error:
            problems.append(error.code)

    readers = [threading.Thread(target=read, daemon=True) for _ in range(2)]
    writers = [threading.Thread(target=load, args=(worker,), daemon=True) for worker in range(4)]
    rivals = [threading.Thread(target=contend, daemon=True) for _ in range(5)]
    for thread in [*readers, *writers, *rivals]:
        thread.start()
    for thread in [*writers, *rivals]:
        thread.join(timeout=60)
    done.set()
    for thread in readers:
        thread.join(timeout=60)
    assert problems == ["name_taken"] * 4, "exactly one of five rivals gets the name"
    assert len(registry.entries()) == 17


def test_two_loads_that_finish_together_both_count(registry, tmp_path, monkeypatch):
    """Each waits a moment for the other just before it publishes: without the lock, both would start from nothing."""
    paths = [make_adapter(tmp_path / str(seed), TARGETS, 2, seed=seed) for seed in range(2)]
    meeting = threading.Barrier(2)
    real = registry_module.MappingProxyType

    def meet(value):
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait(timeout=0.3)
        return real(value)

    monkeypatch.setattr(registry_module, "MappingProxyType", meet)
    threads = [threading.Thread(target=registry.load, args=(f"a{i}", paths[i]), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert {entry.name for entry in registry.entries()} == {"a0", "a1"}
