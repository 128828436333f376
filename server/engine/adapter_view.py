"""What an operator sees of one adapter's name: plain data, for the admin routes. Made by the adapter manager."""

from dataclasses import dataclass
from typing import Any

from guanaco.adapters.registry import AdapterEntry, BrokenEntry


@dataclass(frozen=True)
class AdapterView:
    """What an operator sees of one name."""

    entry: AdapterEntry | BrokenEntry
    num_requests: int  # that hold its version now
    num_uses: int  # requests since the start
    last_used: float | None  # seconds since the epoch
    tier: str  # "device", "host" or "disk"
    aliases: tuple[str, ...] = ()  # that lead to it

    def public(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        entry = self.entry
        if isinstance(entry, BrokenEntry):
            problem = {"code": entry.code, "message": entry.problem}
            return {
                "name": entry.name,
                "state": "broken",
                "version": entry.version,
                "source": entry.source,
                "error": problem,
                "aliases": list(self.aliases),
            }
        return {
            "name": entry.name,
            "state": "ready",
            "version": entry.version,
            "source": entry.source,
            "rank": entry.max_rank,
            "modules_applied": entry.modules_applied,
            "modules_possible": entry.modules_possible,
            "num_bytes": entry.num_bytes,
            "tier": self.tier,
            "pins": self.num_requests,
            "num_uses": self.num_uses,
            "loaded_at": entry.loaded_at,
            "last_used": self.last_used,
            "effect": entry.effect,
            "history": list(entry.history),
            "notes": list(entry.notes),
            "aliases": list(self.aliases),
            "profile": None if entry.profile is None else entry.profile.public(),
        }
