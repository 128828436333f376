"""Aliases without a server: shares, what a changed weight moves, circles, renaming, and a fuzz against a slow model."""

import random
from collections import Counter
from pathlib import Path

import pytest

from guanaco.adapters.errors import AdapterError
from guanaco.adapters.versions.aliases import MAX_TARGETS, Alias, AliasTable, Revision, Target, parse_targets
from guanaco.adapters.versions.registry import MAX_HISTORY, AdapterRegistry
from guanaco.adapters.versions.registry_file import RegistryFile
from support.adapters.tiny_adapters import make_adapter

TARGETS = {"layers.0.self_attn.q_proj": (8, 8)}
KEYS = [f"user-{number}" for number in range(4000)]


@pytest.fixture
def registry(tmp_path: Path) -> AdapterRegistry:
    made = AdapterRegistry(TARGETS, base_names=("base",))
    for seed, name in enumerate("abc"):
        made.load(name, make_adapter(tmp_path / name, TARGETS, 2, seed=seed))
    return made


@pytest.fixture
def table(registry: AdapterRegistry) -> AliasTable:
    return AliasTable(registry)


def put(table: AliasTable, name: str, **split: int) -> Alias:
    return table.put(name, parse_targets(split), now=1.0)


def code_of(table: AliasTable, name: str, **split: int) -> str:
    with pytest.raises(AdapterError) as refused:
        put(table, name, **split)
    return refused.value.code


def shares(table: AliasTable, name: str) -> dict[str, float]:
    chosen = Counter(target.name for key in KEYS if (target := table.follow(name, key)) is not None)
    return {target: count / len(KEYS) for target, count in chosen.items()}


def test_a_split_gives_each_its_share_and_each_key_always_the_same(table: AliasTable) -> None:
    put(table, "prod", a=90, b=10, c=0)
    assert shares(table, "prod") == pytest.approx({"a": 0.9, "b": 0.1}, abs=0.02)
    first = [table.follow("prod", key) for key in KEYS]
    assert first == [table.follow("prod", key) for key in KEYS]
    put(table, "other", a=90, b=10)
    both = sum(table.follow("prod", k).name == table.follow("other", k).name == "b" for k in KEYS)  # type: ignore[union-attr]
    assert both / len(KEYS) < 0.03, "two aliases split independently of each other"


def test_a_changed_weight_moves_only_what_it_must(table: AliasTable) -> None:
    put(table, "prod", a=90, b=10)
    before = [table.follow("prod", key) for key in KEYS]
    put(table, "prod", a=80, b=20)
    moved = [old.name for key, old in zip(KEYS, before, strict=True) if table.follow("prod", key).name != old.name]  # type: ignore[union-attr]
    assert set(moved) == {"a"}
    assert len(moved) / len(KEYS) == pytest.approx(0.1, abs=0.02)


def test_the_choice_is_written_in_stone() -> None:
    """Whoever keeps a key must get the same version from the next release of this server too."""
    alias = Alias("prod", Revision(1, 0.0, (Target("a", weight=1), Target("b", weight=1))))
    assert "".join(alias.choose(f"k{number}").name for number in range(16)) == "babbbbbbaaabbaba"


def test_aliases_of_aliases(table: AliasTable) -> None:
    put(table, "inner", a=1, b=1)
    put(table, "outer", inner=1, c=1)
    assert shares(table, "outer") == pytest.approx({"a": 0.25, "b": 0.25, "c": 0.5}, abs=0.03)
    assert {target.name for target in table.leads_to("outer")} == {"a", "b", "c"}
    assert table.pointing_to("a") == ("inner",)
    table.rename("inner", "core")
    assert {target.name for target in table.leads_to("outer")} == {"a", "b", "c"}
    assert (table.follow("inner", "k"), table.get("outer").now.targets[0].name) == (None, "core")  # type: ignore[union-attr]
    table.remove("core")
    assert {target.name for target in table.leads_to("outer")} == {"core", "c"}


def test_a_rename_to_the_name_of_a_removed_target_adds_the_weights(table: AliasTable) -> None:
    """A split still leads to a removed alias. Another target of it may then be renamed to that name."""
    put(table, "inner", a=1)
    put(table, "core", b=1)
    put(table, "outer", inner=2, core=3, c=5)
    put(table, "outer", c=1)
    table.remove("core")
    table.rename("inner", "core")
    [past] = table.get("outer").history  # type: ignore[union-attr]
    assert past.targets == (Target("core", weight=5), Target("c", weight=5))
    table.put("outer", past.targets, now=2.0)
    assert shares(table, "outer") == pytest.approx({"a": 0.5, "c": 0.5}, abs=0.03)


def test_circles_are_refused(table: AliasTable) -> None:
    put(table, "x", a=1)
    put(table, "y", x=1, b=0)
    put(table, "z", y=0, c=1)
    for split in ({"x": 1}, {"y": 1}, {"z": 1}, {"a": 1, "z": 0}):
        assert code_of(table, "x", **split) == "alias_cycle"
    assert [target.name for target in table.get("x").now.targets] == ["a"]  # type: ignore[union-attr]


def test_names_and_targets(table: AliasTable, registry: AdapterRegistry, tmp_path: Path) -> None:
    assert code_of(table, "a", b=1) == code_of(table, "base", b=1) == "name_taken"
    assert code_of(table, "x/y", b=1) == "bad_name"
    assert code_of(table, "x", nope=1) == "target_not_found"
    for split, code in (
        ({}, "bad_split"),
        ({"a": 0}, "bad_split"),
        ({"a": -1, "b": 2}, "bad_split"),
        ({f"n{i}": 1 for i in range(MAX_TARGETS + 1)}, "bad_split"),
        ({"a@": 1}, "bad_target"),
        ({"a@12345": 1}, "bad_target"),
        ({"a@" + "g" * 8: 1}, "bad_target"),
        ({"../a": 1}, "bad_target"),
    ):
        with pytest.raises(AdapterError) as refused:
            parse_targets(split)
        assert refused.value.code == code
    put(table, "x", a=1)
    with pytest.raises(AdapterError, match="is an alias"):
        registry.load("x", tmp_path / "a")
    table.remove("x")
    registry.load("x", tmp_path / "a")
    with pytest.raises(AdapterError, match="adapter or the base"):
        table.rename(put(table, "w", a=1).name, "x")


def test_history_is_bounded(table: AliasTable) -> None:
    for turn in range(MAX_HISTORY + 3):
        alias = put(table, "x", **{"abc"[turn % 3]: 1})
    assert [past.number for past in alias.history] == list(range(3, MAX_HISTORY + 3))
    with pytest.raises(AdapterError, match=f"revision {MAX_HISTORY + 3}"):
        table.put("x", parse_targets({"a": 1}), now=1.0, expected=1)


def test_written_down_and_read_again(table: AliasTable, registry: AdapterRegistry, tmp_path: Path) -> None:
    put(table, "x", a=1)
    put(table, "x", a=3, b=4)
    put(table, "y", x=1)
    file = RegistryFile(tmp_path / "registry.json")
    file.write((), table.all())
    again = AliasTable(registry)
    again.restore(file.read_aliases())
    assert again.all() == table.all()
    text = file.path.read_text()
    for old, new in (
        ('"weight": 1', '"weight": -1'),
        ('"name": "x"', '"name": "../x"'),
        ('"number": 2', '"number": null'),
    ):
        file.path.write_text(text.replace(old, new))
        with pytest.raises(AdapterError, match="damaged"):
            file.read_aliases()
    file.path.write_text(text.replace('"name": "a"', '"name": "y"'))  # a circle, by hand
    again.restore(file.read_aliases())
    assert again.all() == ()


def test_any_changes_keep_the_promises(registry: AdapterRegistry) -> None:
    """No circle ever, every choice is a target with a weight, and what is refused changes nothing."""
    rng, table = random.Random(7), AliasTable(registry)
    names = ["p", "q", "r", "s", "t"]
    for _ in range(3000):
        name, before, refused = rng.choice(names), table.all(), None
        try:
            match rng.randrange(6):
                case 0:
                    table.remove(name)
                case 1:
                    table.rename(name, rng.choice(names))
                case _:
                    some = rng.sample([*"abc", *names], rng.randrange(1, 4))
                    put(table, name, **{target: rng.randrange(3) for target in some})
        except AdapterError as error:
            refused = error.code
        assert refused in {None, "alias_cycle", "alias_not_found", "bad_split", "name_taken", "target_not_found"}
        assert refused is None or table.all() == before
        for alias in table.all():
            reachable = {target.text for target in table.leads_to(alias.name)}
            chosen = table.follow(alias.name, str(rng.random()))
            assert chosen is not None
            assert chosen.text in reachable
            assert alias.name not in table._reachable(alias.name)
