"""Answers of lookups: a lease on what memory has, and the sentence that tells a scheduler of it.

Two parts answer: `lookups` at once, where memory covers the lookup, and `prefetch` after tiers have been asked.
"""

import math
from collections.abc import Sequence

import trio

from lmcache_trio._core.index.index import Index, Lease
from lmcache_trio._core.index.session import LookupState, Session
from lmcache_trio._server.clock import Clock
from lmcache_trio._server.counts import Counts
from lmcache_trio._server.drain import Drain
from lmcache_trio._server.tiers.tiers import Tiers
from lmcache_trio._wire.messages import Answer, AnswerState

__all__ = ["Answers", "answer_of"]

_STATES = {
    LookupState.UNKNOWN: AnswerState.UNKNOWN,
    LookupState.PENDING: AnswerState.PENDING,
    LookupState.ANSWERED: AnswerState.ANSWERED,
}


class Answers:
    """Makes answers, and counts hits and misses."""

    def __init__(self, index: Index, clock: Clock, tiers: Tiers, drain: Drain, counts: Counts) -> None:
        self._index = index
        self._clock = clock
        self._tiers = tiers
        self._drain = drain
        self._events = counts.events

    def lease(self, engine: str, session: Session, wanted: Sequence[bytes], namespace: bytes) -> Lease | None:
        """Lease what memory has of *wanted* in *namespace* (b"": nothing), in place of the session's former lease."""
        if not wanted or not namespace or self._drain.stopping:
            return None
        lease = self._index.lease((engine, session.number), namespace, wanted, trio.current_time())
        if lease is not None:
            self._clock.not_later_than(lease.expires)
        return lease

    def give(self, session: Session, asked: int, wanted: Sequence[bytes], lease: Lease | None) -> None:
        """Make *lease* the answer to *asked*, which wanted to know of *wanted*."""
        if lease is None:
            session.answer(asked, 0)
        else:
            session.answer(asked, lease.chunks, lease.id, lease.expires)
            self._tiers.used(lease.namespace, wanted[: lease.chunks])
        self._events["lookups"] += bool(wanted)
        self._events["hits"] += session.chunks
        self._events["misses"] += len(wanted) - session.chunks


def answer_of(session: Session, reply_to: int) -> Answer:
    """The state of *session*'s lookup, as its scheduler is told; *reply_to* is 0 in a push."""
    now = trio.current_time()
    status = session.status(now)
    ttl_ms = math.floor(status.ttl * 1000)
    return Answer(reply_to, session.number, status.asked, _STATES[status.state], status.chunks, status.lease, ttl_ms)
