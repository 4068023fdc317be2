"""The index: which chunks are in memory, who may read them, and who is writing them.

    ABSENT --reserve--> WRITING --all shards committed--> READY --evict--> ABSENT
                           |                                |
                           `--abort / timeout / session ended / owner lost / reset--> DOOMED --last copy ended--> ABSENT
                                                            |--reset while pinned or leased---^
                                                            `--reset--> stale --swept--> ABSENT

This is the door. Behind it: `chunks` (every transition of a chunk, and eviction), `readers` (leases, pins, holds) and
`writers` (reservations), over `rows` (flat arrays), `arena` (byte ranges) and `policy` (the order of eviction).

No I/O, no clock, no waiting: times are seconds on the caller's monotonic clock, ids come from a function that is passed
in, and a method that raises has changed nothing (but a late commit, which raises `Gone` and ends its copy).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lmcache_trio._core.index.arena import Arena
from lmcache_trio._core.index.asking import REASONS
from lmcache_trio._core.index.chunks import Chunks
from lmcache_trio._core.index.generations import Namespace
from lmcache_trio._core.index.grants import SERVER, Hold, Lease, Pin, Reservation, SessionKey, Slot
from lmcache_trio._core.index.policy import EvictionPolicy, LeastRecentlyUsed
from lmcache_trio._core.index.readers import Readers
from lmcache_trio._core.index.writers import Writers
from lmcache_trio._core.keys import DIGEST_BYTES, ChunkKey
from lmcache_trio.errors import Misuse

__all__ = ["SERVER", "Hold", "Index", "Lease", "Pin", "Reservation", "SessionKey", "Slot"]

_COUNTERS = (
    "chunks_hit",
    "chunks_missed",
    "stored_chunks",
    "loaded_chunks",
    "aborted_chunks",
    "reset_chunks",
    "leases_expired",
    "reservations_expired",
    "namespaces_dropped",
)

_LOADS: SessionKey = ("", 0)
"""The session of the server's own loads: of no engine, never ended."""


class Index:
    """Chunks, leases, pins, reservations and holds over one arena.

    *new_id* gives unguessable ids; *lease_share* is the part of the arena's taken bytes that leases may hold before
    they are taken; *write_share* is the part that one engine may be writing, of what no other engine is writing;
    *most_unused* is how many namespaces that no engine uses may keep their chunks.
    """

    def __init__(  # noqa: PLR0913 each is a setting
        self,
        arena: Arena,
        *,
        new_id: Callable[[], bytes],
        lease_share: float = 0.5,
        write_share: float = 1.0,
        lease_timeout: float = 30.0,
        reservation_timeout: float = 60.0,
        most_unused: int = 256,
        policy: EvictionPolicy | None = None,
    ) -> None:
        for name, share in (("lease_share", lease_share), ("write_share", write_share)):
            if not 0 < share <= 1:
                raise Misuse(f"{name} is {share}: it must be above 0 and at most 1")
        for name, timeout in (("lease_timeout", lease_timeout), ("reservation_timeout", reservation_timeout)):
            if not timeout > 0:
                raise Misuse(f"{name} is {timeout}: it must be above 0")
        self._arena = arena
        self._lease_share = lease_share
        self._most_unused = most_unused
        self._counted: Counter[str] = Counter()
        self._chunks = Chunks(arena, LeastRecentlyUsed() if policy is None else policy, write_share)
        self._readers = Readers(self._chunks, new_id, lease_timeout, self._counted)
        self._writers = Writers(self._chunks, new_id, reservation_timeout, self._counted)

    def grow(self, taken: int) -> None:
        """Bytes up to *taken* are backed by memory now."""
        self._arena.grow(taken)

    def attach(self, namespace: bytes, shard_bytes: Sequence[int]) -> None:
        """An engine uses *namespace*, with the bytes of each shard's slot; Misuse if they differ from another's."""
        self._chunks.attach(namespace, shard_bytes)

    def detach(self, namespace: bytes) -> None:
        """An engine that attached *namespace* uses it no more.

        What no engine uses is forgotten with its last chunk. Where more than *most_unused* of them hold chunks, the one
        that was left longest ago is dropped, as by a `reset`: `sweep` then.
        """
        self._chunks.detach(self._chunks.namespaces[namespace])
        if len(self._chunks.unused) > self._most_unused:
            oldest = next(iter(self._chunks.unused.values()))
            self._counted["namespaces_dropped"] += 1
            self._writers.reset(oldest)
            if self._chunks.namespaces.get(oldest.name) is oldest:  # its last rows were not being written
                self._chunks.retire(oldest)

    def shard_bytes(self, namespace: bytes) -> Sequence[int]:
        """The bytes of each shard's slot, as attached; none for a namespace that is not."""
        known = self._chunks.namespaces.get(namespace)
        return () if known is None else known.lengths

    def chunk_bytes(self, namespace: bytes) -> int:
        """What a chunk takes in the arena, over all shards; 0 for a namespace that is not attached."""
        known = self._chunks.namespaces.get(namespace)
        return 0 if known is None else known.extent

    @property
    def arena_bytes(self) -> int:
        """What the arena holds once all of it is backed by memory."""
        return self._arena.capacity

    def bytes_written_by(self, engine: str) -> int:
        """Bytes of the chunks that *engine* began and has not committed, those in quarantine among them."""
        return self._chunks.bytes_written_by(engine)

    def overdue_writers(self) -> Sequence[int]:
        """Workers of which a reservation was overdue since this was asked last, once each."""
        return self._writers.take_overdue()

    @property
    def bytes_taken(self) -> int:
        """Bytes that are backed by memory."""
        return self._arena.taken

    @property
    def room_to_offer(self) -> int:
        """Bytes that leases may still be given; what is beyond it, a lookup would not be offered."""
        return int(self._lease_share * self._arena.taken) - self._chunks.bytes_offered

    # --- reading ----------------------------------------------------------------------------------------------------

    def match(self, namespace: bytes, digests: Sequence[bytes]) -> int:
        """How many leading chunks are READY. Changes nothing."""
        known = self._chunks.namespaces.get(namespace)
        return 0 if known is None else self._chunks.match(known, digests)

    def lease(self, session: SessionKey, namespace: bytes, digests: Sequence[bytes], now: float) -> Lease | None:
        """Lease and touch the leading READY run, cut where lease_share is reached; None when that is empty.

        A session has one lease: asking for a new one ends the former, whatever the answer.
        """
        known = self._chunks.namespaces.get(namespace)
        return self._readers.lease(session, known, digests, int(self._lease_share * self._arena.taken), now)

    def take(self, lease_id: bytes) -> None:
        """The engine allocated blocks for it: it leaves lease_share. Idempotent; an ended lease is let pass."""
        self._readers.take(lease_id)

    def release(self, lease_id: bytes) -> None:
        """End a lease, which touches its chunks. Idempotent; pins live on."""
        self._readers.release(lease_id)

    def pin(  # noqa: PLR0913
        self, lease_id: bytes, engine: str, namespace: bytes, worker: int, shard: int, start: int, count: int
    ) -> Pin:
        """Turn *count* chunks of a lease, from *start*, into a read in progress of *worker*, for its *shard*.

        *namespace* is the engine's, as things are. Gone: no such lease, another engine's or another namespace's, or its
        namespace was reset. Misuse: a shard or range it does not have.
        """
        return self._readers.pin(lease_id, engine, namespace, worker, shard, start, count)

    def unpin(self, pin_id: bytes, worker: int) -> bool:
        """The read ended. Was it valid to the end? False: unknown, another worker's, or its namespace was reset."""
        return self._readers.unpin(pin_id, worker)

    def is_valid(self, pin_id: bytes) -> bool:
        """Would an `unpin` say that what was read is valid, as things are?"""
        return self._readers.is_valid(pin_id)

    def hold(self, key: ChunkKey) -> Hold | None:
        """Keep a READY chunk in place without a session, and without a touch; None when it is not READY."""
        return self._readers.hold(key)

    def unhold(self, hold: Hold) -> None:
        """Let go of what `hold` kept. Idempotent."""
        self._readers.unhold(hold.number)

    # --- writing ----------------------------------------------------------------------------------------------------

    def reserve(  # noqa: PLR0913 the protocol's sentence has as many words
        self,
        session: SessionKey,
        worker: int,
        shard: int,
        namespace: bytes,
        parent: bytes,
        digests: Sequence[bytes],
        now: float,
    ) -> Reservation:
        """Promise slots for *shard* of the leading absent run of *digests* that fits now; drop and count the rest.

        *parent* is the digest before the first (empty: a chain's first chunk). Workers of one engine share a chunk:
        the first to reserve it allocates all its shards, the others claim theirs. Nothing waits for space: what is
        neither leased, pinned, held nor being written is evicted for it, the least recently used leaf first.
        """
        asking = self._writers.ask(session, shard, self._attached(namespace, shard, parent, digests), parent, now)
        for position, digest in enumerate(digests):
            asking.step(position, digest)
        return Reservation(self._writers.promise(asking, worker, 1), asking.slots, asking.dropped)

    def reserve_load(self, namespace: bytes, parent: bytes, digest: bytes, now: float) -> Reservation | None:
        """Promise all shards of one chunk to the server itself; None when it gets no slots, or no engine wants it.

        The server commits and aborts it as worker `SERVER`; a slot's position is its shard.
        """
        known = self._chunks.namespaces.get(namespace)
        if known is None or not known.users:
            return None
        asking = self._writers.ask(_LOADS, 0, self._attached(namespace, 0, parent, (digest,)), parent, now)
        asking.step(0, digest)
        if asking.rows:
            asking.claim_others()
        reservation = self._writers.promise(asking, SERVER, len(asking.slots))
        return Reservation(reservation, asking.slots, asking.dropped) if reservation else None

    def commit(self, reservation_id: bytes, worker: int) -> Sequence[ChunkKey]:
        """The copy ended, and all is written. Returns the keys of the chunks that became READY through it.

        Gone when it was aborted before, by whatever end: nothing is published, but the copy counts as ended.
        """
        return self._writers.commit(reservation_id, worker)

    def abort(self, reservation_id: bytes, worker: int) -> None:
        """The copy ended and is to be forgotten, with all shards of its chunks. Idempotent."""
        self._writers.abort(reservation_id, worker)

    def may_publish(self, reservation_id: bytes) -> bool:
        """Would a `commit` still publish something? Not once it was aborted, by whatever end."""
        return self._writers.is_live(reservation_id)

    def would_keep(self, reservation_id: bytes) -> int:
        """How many of its chunks a `commit` would keep: not those that were doomed meanwhile, as by another shard."""
        return self._writers.would_keep(reservation_id)

    # --- ends -------------------------------------------------------------------------------------------------------

    def end_session(self, session: SessionKey) -> None:
        """End its lease. Pins live on, and what is being written is finished. Idempotent."""
        self._readers.end_session(session)

    def lose_worker(self, worker: int) -> None:
        """Its connection is gone: its pins end; its reservations are aborted and their slots quarantined. Idempotent.

        The quarantine ends with `copies_ended`. A lost worker's reads are not waited for: nobody will believe them.
        """
        self._readers.lose_worker(worker)
        self._writers.lose_worker(worker)

    def copies_ended(self, worker: int) -> None:
        """No copy of *worker* is in progress any more, by its own word or by its exit: its quarantine is freed."""
        self._writers.copies_ended(worker)

    def reset(self, namespace: bytes) -> None:
        """Drop every chunk of *namespace*: nothing of it is served, nor committed by what began before. Idempotent.

        Costs as much as the copies in progress, however many chunks there are: those are given back by `sweep`.
        """
        known = self._chunks.namespaces.get(namespace)
        if known is not None:
            self._writers.reset(known)
            self._counted["reset_chunks"] += self._chunks.replace(known)

    def sweep(self, limit: int) -> bool:
        """Give back up to *limit* chunks that a `reset` dropped. Is there more to do?

        Then call again, between other work. Without a call they wait until a reserve needs room, and go before
        anything is evicted.
        """
        return self._chunks.sweep(limit)

    def expire(self, now: float) -> float:
        """End leases and reservations that are overdue. Returns when to call next (inf: never, as things are).

        That is in the past where more leases are overdue than are ended in one go.
        """
        return min(self._readers.expire(now), self._writers.expire(now))

    # --- status -----------------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, dict[str, Any]]:
        """Two parts: `held` goes up and down, `counted` only up. Costs the same whatever is held."""
        chunks, arena = self._chunks, self._arena
        held = self._readers.held() | self._writers.held() | chunks.held()
        held |= {
            "namespaces": len(chunks.namespaces),
            "bytes_taken": arena.taken,
            "bytes_free": arena.free_bytes,
            "largest_hole": arena.largest_hole,
        }
        counted: dict[str, Any] = {name: self._counted[name] for name in _COUNTERS}
        counted["evictions"] = chunks.evictions
        counted["dropped"] = {reason: self._writers.dropped[reason] for reason in REASONS}
        return {"held": held, "counted": counted}

    def _attached(self, namespace: bytes, shard: int, parent: bytes, digests: Sequence[bytes]) -> Namespace:
        known = self._chunks.namespaces.get(namespace)
        if known is None:
            raise Misuse("the namespace is not attached")
        if not 0 <= shard < known.shards:
            raise Misuse(f"shard is {shard}: the namespace has {known.shards}")
        if set(map(len, digests)) - {DIGEST_BYTES} or len(parent) not in (0, DIGEST_BYTES):
            raise Misuse(f"digests and parent must have {DIGEST_BYTES} bytes each")
        return known
