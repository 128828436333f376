"""The store of responses: each for its owner, bounded in number, bytes and time; the oldest go first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guanaco.server.api.responses.answer import ResponsesAnswer
from guanaco.server.api.responses.store import ResponseStore, StoredItem, StoredResponse, StoreLimits

SIZE = 100  # bytes of each response in these tests


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Running:
    def __init__(self, name: str, owner: str) -> None:
        self.id, self.owner = name, owner

    def snapshot(self) -> dict[str, object]:
        return {}

    async def cancel(self) -> None: ...

    def last_state(self) -> bytes:
        return b""


def limits(**changes: float) -> StoreLimits:
    fields = {"seconds": 60.0, "count": 6, "count_per_key": 3, "num_bytes": 10_000, "num_bytes_per_key": 10_000}
    return StoreLimits(**{**fields, **changes})  # type: ignore[arg-type]


def keep(store: ResponseStore, name: str, owner: str = "a", size: int = SIZE) -> None:
    store.begin(Running(name, owner))
    store.end(name, StoredResponse(name, owner, b"x" * (size - 2), (StoredItem("i", b"i"),), (StoredItem("o", b"o"),)))


def kept(store: ResponseStore, names: str, owner: str = "a") -> str:
    return "".join(name for name in names if store.get(name, owner))


def test_a_keys_oldest_goes_first() -> None:
    store = ResponseStore(limits())
    keep(store, "x", "b")
    for name in "12345":
        keep(store, name)
    assert kept(store, "12345") == "345"
    assert kept(store, "x", "b") == "x", "another key's is not touched"


def test_the_oldest_of_all_goes_where_all_are_too_many() -> None:
    store = ResponseStore(limits())
    for owner in "abc":
        for index in range(3):
            keep(store, f"{owner}{index}", owner)
    assert len(store) == 6
    assert [store.get(f"a{index}", "a") for index in range(3)] == [None] * 3


def test_bytes_count_as_numbers_do() -> None:
    store = ResponseStore(limits(num_bytes_per_key=250, num_bytes=350))
    for name in "123":
        keep(store, name)
    assert (kept(store, "123"), store.num_bytes) == ("23", 200)
    for name in "xy":
        keep(store, name, "b")
    assert (kept(store, "123"), kept(store, "xy", "b"), store.num_bytes) == ("3", "xy", 300)


def test_what_is_larger_than_a_share_is_not_kept_and_costs_nobody_a_place() -> None:
    store = ResponseStore(limits(num_bytes_per_key=250))
    keep(store, "1")
    keep(store, "2", size=251)
    assert (kept(store, "12"), store.running("2", "a")) == ("1", None)


def test_time_is_up() -> None:
    clock = Clock()
    store = ResponseStore(limits(), clock)
    keep(store, "1")
    clock.now = 30.0
    keep(store, "2")
    clock.now = 59.9
    assert kept(store, "12") == "12"
    clock.now = 60.0
    store.forget_expired()
    assert (len(store), store.num_bytes) == (1, SIZE)
    clock.now = 90.0
    assert (kept(store, "12"), len(store), store.num_bytes) == ("", 0, 0)


def test_no_time_at_all_keeps_nothing() -> None:
    store = ResponseStore(limits(seconds=0))
    keep(store, "1")
    assert len(store) == 0


def test_a_response_is_its_owners_alone() -> None:
    store = ResponseStore(limits())
    keep(store, "1", "a")
    store.begin(Running("2", "a"))
    for owner in ("b", ""):
        assert store.get("1", owner) is None
        assert store.running("2", owner) is None
        assert not store.delete("1", owner)
        assert not store.delete("2", owner)
    assert store.running("2", "a")
    assert store.delete("1", "a")
    assert not store.delete("1", "a")


def test_one_that_is_deleted_while_it_is_made_is_not_kept() -> None:
    store = ResponseStore(limits())
    store.begin(Running("1", "a"))
    assert store.delete("1", "a")
    store.end("1", StoredResponse("1", "a", b"", (), ()))
    assert (store.get("1", "a"), len(store)) == (None, 0)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(2, 300), st.booleans(), st.floats(0, 20))))
def test_the_bounds_hold_whatever_comes(steps: list[tuple[str, int, bool, float]]) -> None:
    clock = Clock()
    store = ResponseStore(limits(num_bytes=500, num_bytes_per_key=300), clock)
    sizes: dict[str, tuple[str, int]] = {}
    for index, (owner, size, delete, seconds) in enumerate(steps):
        clock.now += seconds
        if delete and index:
            store.delete(str(index - 1), owner)
        keep(store, str(index), owner, size)
        sizes[str(index)] = (owner, size)
        there = [(who, n) for name, (who, n) in sizes.items() if store.get(name, who)]
        assert len(there) == len(store) <= 6
        assert sum(n for _, n in there) == store.num_bytes <= 500
        for who in "abcd":
            mine = [n for it, n in there if it == who]
            assert len(mine) <= 3
            assert sum(mine) <= 300
        assert store.get(str(index), owner), "the newest one is kept"


def test_a_response_that_cant_be_written_is_not_running_for_ever() -> None:
    """Whatever breaks the last state of a stream, the store lets go of it."""
    store = ResponseStore(limits())
    answer = ResponsesAnswer({"more": object()}, (), "a", store, None, None)
    answer.start(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        answer.first_events()
    assert store.running(answer.id, "a") is not None
    with pytest.raises(AssertionError):
        answer.close()
    assert store.running(answer.id, "a") is None
