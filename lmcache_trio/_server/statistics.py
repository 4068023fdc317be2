"""The figures of a server, collected from its parts. It only reads."""

from collections import Counter

from lmcache_trio._server.parts import Parts
from lmcache_trio.statistics import Events, MemoryHeld, ServerCounted, ServerHeld, ServerStatistics

__all__ = ["statistics_of"]


def statistics_of(parts: Parts) -> ServerStatistics:
    """The cost does not depend on how much is held."""
    index, memory = parts.index.statistics(), parts.memory.statistics()
    refused = {"namespaces": index.namespaces_dropped, "unfinished_bytes": parts.turns.unfinished.given_up}
    return ServerStatistics(
        held=ServerHeld(
            connections=sum(peer.transport is not None for peer in parts.peers),
            welcomes=sum(peer.transport is None for peer in parts.peers),
            engines=len(parts.engines),
            sessions=sum(len(engine.sessions.live) for engine in parts.engines),
            tasks=parts.tasks.running,
            lost_writers=len(parts.peers.lost_writers),
            prefetches=len(parts.answers.prefetches),
            queued_messages=sum(len(peer.outbox) for peer in parts.peers),
            transfers=parts.transfer.statistics() if parts.transfer is not None else None,
            index=index.held,
            memory=MemoryHeld(int(memory["bytes_taken"]), int(memory["bytes_size"])),
        ),
        counted=ServerCounted(
            index=index.counted,
            limits={**parts.counts.limits, **refused},
            events=Events(**parts.counts.events),
            drops=Counter(index.dropped) + parts.counts.dropped,
        ),
        tiers=parts.tiers.statistics(),
    )
