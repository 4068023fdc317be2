"""The server's counters beside the index's: events by name, dropped chunks by reason, and limits that were met."""

import logging
from collections import Counter

import attrs

from lmcache_trio._core.misses import Reason
from lmcache_trio._core.sizing import SizeCurve
from lmcache_trio._server.peer import Peer
from lmcache_trio.config import Limits
from lmcache_trio.errors import Misuse
from lmcache_trio.statistics import Events

__all__ = ["Counts"]

log = logging.getLogger("lmcache_trio.server")


@attrs.define(eq=False)
class Counts:
    """Monotonic since the start, but for *curve*. The index counts its own events."""

    curve: SizeCurve
    """What lookups and stores show of the hit ratio by size."""
    events: Counter[str] = attrs.field(factory=lambda: Counter({f.name: 0 for f in attrs.fields(Events)}))
    requested_tokens: int = 0
    hit_tokens: Counter[str] = attrs.field(factory=lambda: Counter(memory=0, tier=0))
    """Tokens that lookups were offered, by where their chunks were."""
    missed_tokens: Counter[str] = attrs.field(factory=lambda: Counter({reason.value: 0 for reason in Reason}))
    """Tokens that lookups asked for and were not offered, by reason."""
    dropped: Counter[str] = attrs.field(factory=Counter)
    """Chunks of stores that got no slots, by the server's reason."""
    limits: Counter[str] = attrs.field(factory=lambda: Counter({f.name: 0 for f in attrs.fields(Limits)}))
    """Requests that exceeded a limit, by the limit's name."""

    def over_limit(self, peer: Peer, name: str, what: str) -> Misuse:
        """The error for *peer*, which would exceed the limit *name*: *what* says how. Counted; logged once per peer."""
        self.limits[name] += 1
        error = Misuse(f"{peer} has {what}: that is limits.{name}; the server's configuration can raise it")
        if name not in peer.limits_met:
            peer.limits_met.add(name)
            log.warning("%s", error)
        return error
