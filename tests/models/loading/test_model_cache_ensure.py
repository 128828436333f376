"""The model cache makes an entry once, under one lock, for whoever asks for it."""

from pathlib import Path

import pytest

from guanaco.models.loading.model_cache import (
    CachedModel,
    ModelCache,
)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


class TestEnsure:
    """The one place that takes the locks: what is there is read, what is not is made by one process alone."""

    KEY = "a" * 64

    def made(self, cache: ModelCache) -> str:
        (cache.root / self.KEY).mkdir()
        with pytest.raises(BlockingIOError), cache.lock(self.KEY, exclusive=False, wait=False):
            pass  # nobody reads while the entry is made
        return "made"

    def test_what_is_not_there_is_made_and_then_read(self, cache: Path) -> None:
        entries = ModelCache(cache)

        def read(entry: CachedModel) -> str:
            with entries.lock(self.KEY, exclusive=False, wait=False):
                return f"read {entry.key}"  # beside other readers

        assert entries.ensure(self.KEY, read=read, make=lambda: self.made(entries)) == ("made", None)
        assert entries.ensure(self.KEY, read=read, make=pytest.fail) == (f"read {self.KEY}", None)

    def test_what_is_damaged_is_made_again_and_named(self, cache: Path) -> None:
        entries, tries = ModelCache(cache), []
        (entries.root / self.KEY).mkdir(parents=True)
        made, damaged = entries.ensure(self.KEY, read=tries.append, make=lambda: "made")
        assert (made, damaged) == ("made", entries.find(self.KEY))
        assert len(tries) == 2, "once beside other readers, once more alone"

    def test_what_another_process_made_meanwhile_is_read(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        entries, lock = ModelCache(cache), ModelCache.lock

        def late(self: ModelCache, key: str, *, exclusive: bool, **options: object) -> object:
            if exclusive:
                (self.root / key).mkdir()  # by another process, between the two locks
            return lock(self, key, exclusive=exclusive, **options)

        monkeypatch.setattr(ModelCache, "lock", late)
        assert entries.ensure(self.KEY, read=lambda entry: entry.key, make=pytest.fail) == (self.KEY, None)
