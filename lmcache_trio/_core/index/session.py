"""Sessions: the server's side of one engine request, and of all requests of one engine.

    UNKNOWN --lookup--> PENDING --answer--> ANSWERED
       ^                   |                   |
       `-----release-------'------release------'        lookup: from any state to PENDING

A session holds the request's digest chain, its current lookup (the id of the Lookup message, its state, its answer)
and that answer's lease. Rule 1: every transition of a session lives in this file. Rule 2: no I/O and no clock here.
Rule 3: the answer stays until the next lookup or the end, so that a status question may be repeated. Rule 4: a method
that raises has changed nothing.

An answer whose lease has run out, or was ended by a reset, reads ANSWERED with 0 chunks. The answer is still
definitive, and 0 is the only count that the server can promise now. UNKNOWN would mean "ask again", and the old count
would make the engine load chunks that may be gone.
"""

import enum
import itertools
import math

import attrs

from lmcache_trio._core.keys import DIGEST_BYTES
from lmcache_trio.errors import Misuse

__all__ = ["LookupState", "Session", "Sessions", "Status"]


MOST_ENDED = 8192
"""Ended sessions that are remembered per engine, 100 bytes each: so many requests may end while a store of the first
one still waits to reserve."""


_serials = itertools.count(1)


class LookupState(enum.Enum):
    """The state of a session's lookup. UNKNOWN: there was no lookup, or it was released."""

    UNKNOWN = "unknown"
    PENDING = "pending"
    ANSWERED = "answered"


@attrs.frozen
class Status:
    """The answer to a status question; `ttl` is in seconds, 0 without a lease."""

    asked: int
    state: LookupState
    chunks: int = 0
    lease: bytes = b""
    ttl: float = 0.0
    loaded: int = 0


@attrs.define(eq=False)
class Session:
    """One engine request. *number* is the engine's name for it; *lease* is b"" when it has none."""

    number: int
    request: str = ""
    """The engine's name for it, as it was told; for people alone."""
    chain: bytes = b""
    """Packed: as lists of digests, ten thousand sessions cost a garbage collection 9 ms, and three times the memory."""
    known: int = 0
    """Chunks of the chain."""
    asked: int = 0
    state: LookupState = LookupState.UNKNOWN
    chunks: int = 0
    lease: bytes = b""
    expires: float = -math.inf
    loaded: int = 0
    """How many of the answer's chunks a tier brought for it."""
    generation: int = 0
    """How many resets its engine had seen when it was opened."""
    serial: int = attrs.field(init=False, factory=lambda: next(_serials))
    """No other session of this process has it. A client may use a number again."""

    def lookup(self, start: int, digests: bytes, upto: int, asked: int) -> list[bytes]:
        """Cut the chain to *start* chunks, extend it by *digests*, and make *asked* the lookup of its first *upto*.

        *digests* come packed, as `join_digests` packs them; the digests to look up are returned as a list. The former
        lookup's answer is forgotten, and with it its lease: read `lease` first and end it.
        Misuse when the chain has no *start* chunks, or the new one no *upto*.
        """
        if start > self.known:
            raise Misuse(f"start is {start}, but session {self.number} has {self.known} chunks: send them too")
        known = start + len(digests) // DIGEST_BYTES
        if upto > known:
            raise Misuse(f"upto is {upto}, but the chain of session {self.number} ends at {known}")
        self.chain = self.chain[: start * DIGEST_BYTES] + digests
        self.known = known
        self.state, self.asked = LookupState.PENDING, asked
        self.chunks, self.lease, self.expires, self.loaded = 0, b"", -math.inf, 0
        chain, width = self.chain, DIGEST_BYTES
        return [chain[i : i + width] for i in range(0, upto * width, width)]

    def answer(self, asked: int, chunks: int, lease: bytes = b"", expires: float = -math.inf, loaded: int = 0) -> bool:
        """The lookup *asked* found *chunks* leading chunks, *loaded* of them in a tier.

        False: it is not pending any more, and nothing changes.
        """
        if self.state is not LookupState.PENDING or self.asked != asked:
            return False
        self.state, self.chunks, self.lease, self.expires = LookupState.ANSWERED, chunks, lease, expires
        self.loaded = loaded
        return True

    def release(self) -> bytes:
        """The lookup is not wanted any more. Returns its lease, for the caller to end, or b""."""
        lease = self.lease
        self.lose_lease()
        self.state = LookupState.UNKNOWN
        return lease

    def lose_lease(self) -> None:
        """The session has no lease from now on, and the answer that was given under it reads 0 chunks."""
        self.chunks, self.lease, self.expires, self.loaded = 0, b"", -math.inf, 0

    def status(self, now: float) -> Status:
        """The lookup's status at *now*. Idempotent."""
        if self.lease and now >= self.expires:
            self.lose_lease()
        ttl = max(0.0, self.expires - now) if self.lease else 0.0
        return Status(self.asked, self.state, self.chunks, self.lease, ttl, self.loaded)


class Sessions:
    """The sessions of one engine. A reset, and a new identity, *bars* all sessions that are live or remembered.

    A barred session's KV was computed before, so its stores get no slots any more; its lookups go on. A request that
    goes on after its engine's own reset is a new session. The end of a session does not bar it: a store that was
    submitted before may ask for its slots later.
    """

    def __init__(self) -> None:
        self.live: dict[int, Session] = {}
        """By number. Only `open` and `end` change it."""
        self.live_serials: set[int] = set()
        self._ended: dict[int, tuple[int, int]] = {}  # by number: its generation and its serial
        self._generation = 0

    def open(self, session: Session) -> None:
        """*session* is live from now on. Idempotent."""
        if self.live.get(session.number) is not session:
            session.generation = self._generation
            self.live[session.number] = session
            self.live_serials.add(session.serial)
            self._ended.pop(session.number, None)

    def end(self, number: int) -> Session | None:
        """The session *number* ends. Returns it if it was live."""
        session = self.live.pop(number, None)
        if session is not None:
            self._ended[number] = (session.generation, session.serial)
            self.live_serials.discard(session.serial)
            if len(self._ended) > MOST_ENDED:
                del self._ended[next(iter(self._ended))]
        return session

    def bar(self) -> None:
        """KV that was computed before is not stored any more."""
        self._generation += 1

    def why_no_store(self, number: int) -> str:
        """The reason why a store of the session *number* gets no slots; "" if it may have some."""
        generation, serial = self._known(number)
        if not serial:
            return "no_session"
        return "" if generation == self._generation else "reset"

    def serial_of(self, number: int) -> int:
        """The serial of the session *number*; 0 if it is neither live nor remembered."""
        return self._known(number)[1]

    def _known(self, number: int) -> tuple[int, int]:
        session = self.live.get(number)
        return self._ended.get(number, (0, 0)) if session is None else (session.generation, session.serial)
