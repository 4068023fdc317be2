"""The parts of a running server, in one record that handlers and connections are given.

`supervise.open_server` makes the parts in order of need, each whole, and this record last.
"""

from collections import Counter

import attrs
import trio

from lmcache_trio._core.index.index import Index
from lmcache_trio._server.answers import Answers
from lmcache_trio._server.clock import Clock
from lmcache_trio._server.counts import Counts
from lmcache_trio._server.drain import Drain
from lmcache_trio._server.engines import Engines
from lmcache_trio._server.peer import Peer
from lmcache_trio._server.peers import Peers
from lmcache_trio._server.requests import Requests
from lmcache_trio._server.tasks import Tasks
from lmcache_trio._server.tiers.tiers import Tiers
from lmcache_trio._server.transfer.worker import TransferWorker
from lmcache_trio._server.watches import Watches
from lmcache_trio._transport import Unfinished
from lmcache_trio.abc import Memory
from lmcache_trio.config import Config
from lmcache_trio.statistics import Events, MemoryHeld, ServerCounted, ServerHeld, ServerRates, ServerStatistics

__all__ = ["Parts", "Turns"]


@attrs.define(eq=False)
class Turns:
    """What the connections share: the loop's time, and the room for messages that have not come whole.

    `connection` says how long a turn takes.
    """

    unfinished: Unfinished
    lane: trio.Lock = attrs.field(factory=trio.Lock)
    """Held by the peer whose turn it is, among those that ask much."""
    last_in_lane: Peer | None = None
    leaving: trio.Lock = attrs.field(factory=trio.Lock)
    """Held by the peer that is being taken apart."""


@attrs.frozen(eq=False)
class Parts:
    """Each part below is made from those above it. *sockets* are the files that an end in a hurry must remove."""

    config: Config
    boot: bytes
    version: str
    """Of lmcache-trio."""
    began: float
    """On Trio's clock."""
    memory: Memory
    tasks: Tasks
    counts: Counts
    drain: Drain
    turns: Turns
    sockets: set[str]
    index: Index
    clock: Clock
    tiers: Tiers
    answers: Answers
    requests: Requests
    transfer: TransferWorker | None
    engines: Engines
    peers: Peers
    watches: Watches

    def statistics(self) -> ServerStatistics:
        """The figures of all parts. The cost does not depend on how much is held."""
        index, memory = self.index.statistics(), self.memory.statistics()
        requested, hit = self.answers.last_minute.sums(trio.current_time())
        curve, largest = self.counts.curve, self.tiers.capacity
        refused = {"namespaces": index.namespaces_dropped, "unfinished_bytes": self.turns.unfinished.given_up}
        return ServerStatistics(
            held=ServerHeld(
                connections=sum(peer.transport is not None for peer in self.peers),
                welcomes=sum(peer.transport is None for peer in self.peers),
                engines=len(self.engines),
                sessions=sum(len(engine.sessions.live) for engine in self.engines),
                tasks=self.tasks.running,
                lost_writers=len(self.peers.lost_writers),
                prefetches=len(self.answers.prefetches),
                queued_messages=sum(len(peer.outbox) for peer in self.peers),
                transfers=self.transfer.statistics() if self.transfer is not None else None,
                index=index.held,
                memory=MemoryHeld(int(memory["bytes_taken"]), int(memory["bytes_size"])),
            ),
            counted=ServerCounted(
                index=index.counted,
                limits={**self.counts.limits, **refused},
                events=Events(**self.counts.events),
                requested_tokens=self.counts.requested_tokens,
                hit_tokens=dict(self.counts.hit_tokens),
                missed_tokens=dict(self.counts.missed_tokens),
                drops=Counter(index.dropped) + self.counts.dropped,
            ),
            rates=ServerRates(
                recent_requested_tokens=requested,
                recent_hit_tokens=hit,
                evicted_idle=index.evicted_idle,
                expected_hit_ratio_memory=curve.table(self.memory.size),
                expected_hit_ratio_tiers=curve.table(max(largest, self.memory.size)) if largest else {},
            ),
            tiers=self.tiers.statistics(),
        )
