"""Why a server is not ready: what keeps engines from being cached now. Empty for one that serves as it was set up."""

from lmcache_trio._server.parts import Parts
from lmcache_trio._server.rendezvous import most_clients
from lmcache_trio.config import format_size
from lmcache_trio.statistics import NotReady

__all__ = ["find_faults"]


def find_faults(parts: Parts) -> list[NotReady]:
    """What is wrong now. The cost grows with the number of engines and tiers alone."""
    faults: list[NotReady] = []
    if parts.drain.stopping:
        faults.append(NotReady("stopping", "the server is ending: it lets no client in and grants nothing more"))
    taken, size = parts.index.arena.taken, parts.memory.size
    if taken < size:
        detail = f"{format_size(taken)} of {format_size(size)} are taken; if that does not grow, the log says why"
        faults.append(NotReady("memory_growing", detail))
    for tier in parts.tiers.statistics():
        if tier.state != "open":
            why = f": {tier.reason}" if tier.reason else ""
            faults.append(NotReady(f"tier_{tier.state}", f"{tier.name}{why}"))
    for engine in parts.engines:
        chunk = engine.chunk_bytes
        if chunk > size:
            detail = f"a chunk of engine {engine.name!r} takes {format_size(chunk)}, and the memory {format_size(size)}"
            faults.append(NotReady("chunk_too_large", f"{detail}: raise memory.size, or set a smaller chunk_tokens"))
    most = most_clients(parts.config)
    if most and len(parts.peers) >= most:
        faults.append(NotReady("clients_at_limit", f"{most} clients are connected, and no more are let in"))
    return faults
