"""The ledger of holds: nobody is told that a version is free while anybody uses it, and everybody's end is news."""

import random
import threading
from collections import Counter

import pytest

from guanaco.adapters.versions.holds import USERS, Holder, HoldLedger


@pytest.fixture
def freed() -> list[str]:
    return []


@pytest.fixture
def holds(freed: list[str]) -> HoldLedger:
    ledger = HoldLedger()
    ledger.on_free = freed.append
    return ledger


@pytest.mark.parametrize("holder", sorted(USERS))
def test_the_last_user_that_leaves_is_news(holds: HoldLedger, freed: list[str], holder: Holder) -> None:
    holds.take("v", holder)
    holds.take("v", holder)
    holds.take("v", Holder.HISTORY)
    holds.give_back("v", holder)
    assert freed == []
    holds.give_back("v", holder)
    assert (freed, holds.is_used("v"), holds.is_held("v")) == (["v"], False, True)
    holds.give_back("v", Holder.HISTORY)
    assert (freed, holds.is_held("v"), holds.held()) == (["v", "v"], False, frozenset())


def test_one_kind_does_not_stand_for_another(holds: HoldLedger, freed: list[str]) -> None:
    holds.take("v", Holder.REQUEST)
    holds.take("v", Holder.NAME)
    with pytest.raises(AssertionError, match="given back once"):
        holds.give_back("v", Holder.LOAD)
    holds.give_back("v", Holder.REQUEST)
    with pytest.raises(AssertionError, match="given back once"):
        holds.give_back("v", Holder.REQUEST)
    assert (freed, holds.count("v", Holder.NAME), holds.count("v", Holder.REQUEST)) == ([], 1, 0)
    assert holds.held(Holder.NAME, Holder.LOAD) == {"v"}
    assert holds.held(Holder.REQUEST, Holder.LOAD) == frozenset()


def test_what_only_changes_its_kind_is_never_free(holds: HoldLedger, freed: list[str]) -> None:
    holds.assign("registry", {Holder.NAME: ["old"], Holder.HISTORY: []})
    holds.assign("registry", {Holder.NAME: ["new"], Holder.HISTORY: ["old"]})
    assert (freed, holds.held()) == (["old"], {"old", "new"}), "nobody uses it, and its stored copy stays"
    freed.clear()
    holds.assign("registry", {Holder.HISTORY: ["new"], Holder.NAME: ["old"]})
    assert (freed, holds.count("old", Holder.NAME), holds.count("new", Holder.HISTORY)) == (["new"], 1, 1)


def test_parties_do_not_touch_each_others_holds(holds: HoldLedger, freed: list[str]) -> None:
    holds.assign("registry", {Holder.NAME: ["v", "v"], Holder.HISTORY: ["w"]})
    holds.assign("aliases", {Holder.HISTORY: ["w"]})
    holds.assign("registry", {Holder.NAME: ["v"]})
    assert (freed, holds.count("v", Holder.NAME), holds.count("w", Holder.HISTORY)) == ([], 1, 2)
    assert holds.assigned("registry", Holder.HISTORY) == {"w"}
    holds.assign("registry", {Holder.NAME: [], Holder.HISTORY: []})
    assert (freed, holds.held()) == (["v"], {"w"})
    holds.assign("aliases", {Holder.HISTORY: []})
    assert freed == ["v", "w"]


def test_nothing_is_kept_of_names_that_are_gone(holds: HoldLedger) -> None:
    """Adapters come and go for months; an entry for each name that ever was would never be freed."""
    for number in range(100):
        holds.assign(f"name {number}", {Holder.NAME: ["v"], Holder.HISTORY: ["u", "v"]})
        holds.assign(f"name {number}", {Holder.NAME: [], Holder.HISTORY: []})
        assert holds.assigned(f"name {number}", Holder.NAME) == frozenset()
    assert (holds._assigned, holds._counts) == ({}, {})


def test_threads_lose_no_hold_and_no_news() -> None:
    """Every version is freed as often as its count of users came back to zero; at the end nothing is held."""
    holds, freed = HoldLedger(), Counter[str]()
    lock = threading.Lock()

    def count(version: str) -> None:
        with lock:
            freed[version] += 1

    holds.on_free = count

    def work(seed: int) -> None:
        rng, mine = random.Random(seed), []
        for _ in range(400):
            if mine and rng.random() < 0.5:
                holds.give_back(*mine.pop(rng.randrange(len(mine))))
            else:
                mine.append((rng.choice("ab"), rng.choice(list(Holder))))
                holds.take(*mine[-1])
        for one in mine:
            holds.give_back(*one)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert holds.held() == frozenset()
    assert set(freed) == {"a", "b"}
