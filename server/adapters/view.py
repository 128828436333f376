"""One adapter name as an operator sees it: plain data, for the admin routes. Made by the adapter manager."""

from dataclasses import dataclass
from typing import Any

from guanaco.adapters.versions.registry import AdapterEntry, BrokenEntry


@dataclass(frozen=True)
class LoadingEntry:
    """A name whose first version is still being loaded."""

    name: str
    source: str


@dataclass(frozen=True)
class AdapterView:
    """What an operator sees of one name."""

    entry: AdapterEntry | BrokenEntry | LoadingEntry
    num_requests: int  # how many requests hold its version now
    num_uses: int  # requests since the start
    last_used: float | None  # seconds since the epoch
    tier: str  # "device", "host" or "disk"
    num_loads: int = 0  # how often the name was loaded, replaced or rolled back since the start
    loading: str | None = None  # the source that is being loaded for it now
    aliases: tuple[str, ...] = ()  # the aliases that lead to it
    is_pinned: bool = False  # an operator keeps it in host memory

    def public(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        entry = self.entry
        common = {"name": entry.name, "loading": self.loading, "aliases": list(self.aliases)}
        if isinstance(entry, LoadingEntry):
            return {**common, "state": "loading", "source": entry.source}
        if isinstance(entry, BrokenEntry):
            return {
                **common,
                "state": "broken",
                "version": entry.version,
                "source": entry.source,
                "error": {"code": entry.code, "message": entry.problem},
                "history": list(entry.history),
            }
        return {
            **common,
            "state": "ready",
            "version": entry.version,
            "source": entry.source,
            "rank": entry.max_rank,
            "modules_applied": entry.modules_applied,
            "modules_possible": entry.modules_possible,
            "num_bytes": entry.num_bytes,
            "tier": self.tier,
            "pinned": self.is_pinned,
            "pins": self.num_requests,
            "num_loads": self.num_loads,
            "num_uses": self.num_uses,
            "loaded_at": entry.loaded_at,
            "last_used": self.last_used,
            "effect": entry.effect,
            "history": list(entry.history),
            "notes": list(entry.notes),
            "profile": None if entry.profile is None else entry.profile.public(),
        }
