"""The figures of a server, held and counted, as one object of plain numbers. It only reads."""

from collections import Counter
from typing import Any

from lmcache_trio._server.parts import Parts

__all__ = ["statistics_of"]

_COUNTED_HERE = ("chunks_hit", "chunks_missed", "dropped")
"""Counted by the index of what it sees alone: a lookup of an engine without a namespace misses before that."""


def statistics_of(parts: Parts) -> dict[str, Any]:
    """`held`: figures of now, which go up and down. `counted`: monotonic since the start. `tiers`: a table per tier."""
    index = parts.index.statistics()
    held: dict[str, Any] = {
        "connections": sum(peer.transport is not None for peer in parts.peers),
        "welcomes": sum(peer.transport is None for peer in parts.peers),
        "engines": len(parts.engines),
        "sessions": sum(len(engine.sessions.live) for engine in parts.engines),
        "tasks": parts.tasks.running,
        "lost_writers": len(parts.peers.lost_writers),
        "prefetches": len(parts.answers.prefetches),
        "queued_messages": sum(len(peer.outbox) for peer in parts.peers),
        **(parts.transfer.statistics() if parts.transfer is not None else {}),
        **index["held"],
    }
    memory = parts.memory.statistics()
    held["bytes_taken"], held["bytes_size"] = memory["bytes_taken"], memory["bytes_size"]
    counted = {name: count for name, count in index["counted"].items() if name not in _COUNTED_HERE}
    counted["limits"] = {**parts.counts.limits, "namespaces": counted.pop("namespaces_dropped")}
    counted["limits"]["unfinished_bytes"] = parts.turns.unfinished.given_up
    drops = Counter(index["counted"]["dropped"]) + parts.counts.dropped
    found: dict[str, Any] = {
        "held": held,
        "counted": {**counted, **parts.counts.events, "drops": dict(drops)},
    }
    found["tiers"] = parts.tiers.statistics()
    return found
