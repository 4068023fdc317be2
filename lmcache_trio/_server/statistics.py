"""What a server holds and has counted, as one object of plain numbers. It only reads."""

from collections import Counter
from typing import Any

from lmcache_trio._server.state import State

__all__ = ["statistics_of"]

_COUNTED_HERE = ("chunks_hit", "chunks_missed", "dropped")
"""Counted by the index of what it sees alone: a lookup of an engine without a namespace misses before that."""


def statistics_of(state: State) -> dict[str, Any]:
    """`held`: what is there now, and goes back to what it was. `counted`: monotonic since the start. `tiers`: each."""
    index = state.index.statistics()
    engines = list(state.engines.values())
    held: dict[str, Any] = {
        "connections": sum(client.transport is not None for client in state.clients.values()),
        "welcomes": sum(client.transport is None for client in state.clients.values()),
        "engines": len(engines),
        "sessions": sum(len(engine.sessions) for engine in engines),
        "tasks": state.tasks.running,
        "lost_writers": len(state.lost_writers),
        "prefetches": state.count_prefetches(),
        "queued_messages": sum(len(client.outbox) for client in state.clients.values()),
        **(state.transfer.statistics() if state.transfer is not None else {}),
        **index["held"],
    }
    memory = state.memory.statistics()
    held["bytes_taken"], held["bytes_size"] = memory["bytes_taken"], memory["bytes_size"]
    counted = {name: count for name, count in index["counted"].items() if name not in _COUNTED_HERE}
    counted["limits"] = {**state.limits_hit, "namespaces": counted.pop("namespaces_dropped")}
    counted["limits"]["unfinished_bytes"] = state.unfinished.given_up
    drops = Counter(index["counted"]["dropped"]) + state.dropped
    found: dict[str, Any] = {
        "held": held,
        "counted": {**counted, **state.counted, "drops": dict(drops)},
    }
    found["tiers"] = state.tiers.statistics()
    return found
