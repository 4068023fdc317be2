"""The index: which chunks are in memory, who may read them, and who is writing them.

    ABSENT --reserve--> WRITING --all shards committed--> READY --evict--> ABSENT
                           |                                |
                           `--abort / timeout / session ended / owner lost / reset--> DOOMED --last copy ended--> ABSENT
                                                            `--reset while pinned or leased---^

The transitions themselves stand in `chunks`; here stands who causes them: leases, pins, reservations, holds, sessions
and workers, and what ends each. A reservation is *live* until it commits or is aborted; one that was aborted for its
owner is *ending*: its slots stay in quarantine until the writer says that its copy ended, or has exited.

No I/O, no clock, no waiting: a method that raises has changed nothing.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from math import inf
from typing import Any, TypeVar

from lmcache_trio._core.arena import Arena
from lmcache_trio._core.asking import REASONS, Asking
from lmcache_trio._core.chunks import Chunks, State
from lmcache_trio._core.grants import SERVER, Hold, HoldNumber, Lease, Pin, Reservation, SessionKey, Slot
from lmcache_trio._core.keys import ChunkKey
from lmcache_trio._core.policy import EvictionPolicy, LeastRecentlyUsed
from lmcache_trio._core.records import Leased, Owners, Pinned, Reserved
from lmcache_trio.errors import Gone, Misuse

__all__ = ["SERVER", "Hold", "Index", "Lease", "Pin", "Reservation", "SessionKey", "Slot"]

T = TypeVar("T")

_COUNTERS = (
    "chunks_hit",
    "chunks_missed",
    "stored_chunks",
    "loaded_chunks",
    "aborted_chunks",
    "reset_chunks",
    "leases_expired",
    "reservations_expired",
)

_LOADS: SessionKey = ("", 0)
"""The session of the server's own loads: of no engine, never ended."""


class Index:
    """See the module. *new_id* gives unguessable ids; *lease_share* is of the arena's taken bytes; times are seconds."""

    def __init__(
        self,
        arena: Arena,
        *,
        new_id: Callable[[], bytes],
        lease_share: float = 0.5,
        lease_timeout: float = 30.0,
        reservation_timeout: float = 60.0,
        policy: EvictionPolicy | None = None,
    ) -> None:
        if not 0 < lease_share <= 1:
            raise Misuse(f"lease_share is {lease_share}: it must be above 0 and at most 1")
        for name, timeout in (("lease_timeout", lease_timeout), ("reservation_timeout", reservation_timeout)):
            if not timeout > 0:
                raise Misuse(f"{name} is {timeout}: it must be above 0")
        self._arena = arena
        self._chunks = Chunks(arena, LeastRecentlyUsed() if policy is None else policy)
        self._new_id = new_id
        self._lease_share = lease_share
        self._lease_timeout = lease_timeout
        self._reservation_timeout = reservation_timeout
        # Time runs one way and every timeout is one constant, so the order of making is the order of deadlines.
        self._leases: OrderedDict[bytes, Leased] = OrderedDict()
        self._live: OrderedDict[bytes, Reserved] = OrderedDict()
        self._ending: dict[bytes, Reserved] = {}
        self._pins: dict[bytes, Pinned] = {}
        self._holds: dict[int, int] = {}
        self._holds_made = 0
        self._sessions: Owners[SessionKey] = Owners()
        self._workers: Owners[int] = Owners()
        self._offered_leases = 0
        self._counted: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()

    def grow(self, taken: int) -> None:
        """Bytes up to *taken* are backed by memory now."""
        self._arena.grow(taken)

    def attach(self, namespace: bytes, shard_bytes: Sequence[int]) -> None:
        """Make *namespace* known, with the length of each shard's slot. Idempotent; Misuse if lengths differ."""
        self._chunks.attach(namespace, shard_bytes)

    # --- reading ----------------------------------------------------------------------------------------------------

    def match(self, namespace: bytes, digests: Sequence[bytes]) -> int:
        """How many leading chunks are READY. Changes nothing."""
        known = self._chunks.namespaces.get(namespace)
        return 0 if known is None else self._chunks.match(known, digests)

    def lease(self, session: SessionKey, namespace: bytes, digests: Sequence[bytes], now: float) -> Lease | None:
        """Lease and touch the leading READY run, cut where lease_share is reached; None when that is empty.

        A session has one lease: a new one, and an empty answer too, ends the former.
        """
        self._end_lease_of(session)
        known = self._chunks.namespaces.get(namespace)
        run = self._chunks.offer(known, digests, int(self._lease_share * self._arena.taken)) if known else []
        self._counted["chunks_hit"] += len(run)
        self._counted["chunks_missed"] += len(digests) - len(run)
        if known is None or not run:
            return None
        leased = Leased(self._new_id(), session, known, array("i", run), now + self._lease_timeout)
        self._leases[leased.id] = leased
        self._offered_leases += 1
        self._sessions.of(session).lease = leased.id
        return Lease(leased.id, session, namespace, len(run), leased.expires)

    def take(self, lease_id: bytes) -> None:
        """The engine allocated blocks for it: it leaves lease_share. Idempotent; an ended lease is let pass."""
        leased = self._leases.get(lease_id)
        if leased is not None:
            self._unoffer(leased)

    def release(self, lease_id: bytes) -> None:
        """End a lease, which touches its chunks. Idempotent; pins live on."""
        leased = self._leases.pop(lease_id, None)
        if leased is None:
            return
        self._unoffer(leased)
        self._sessions.of(leased.session).lease = b""
        self._sessions.tidy(leased.session)
        self._chunks.release(leased.rows, touch=True)

    def pin(self, lease_id: bytes, engine: str, worker: int, shard: int, start: int, count: int) -> Pin:
        """Turn *count* chunks of a lease, from *start*, into a read in progress of *worker*, for its *shard*.

        Gone: no such lease, another engine's, or its namespace was reset. Misuse: a shard or range it does not have.
        """
        leased = self._leases.get(lease_id)
        if leased is None or leased.session[0] != engine:
            raise Gone("no such lease")
        if leased.stale:
            raise Gone("the lease's namespace was reset")
        if not 0 <= shard < leased.namespace.shards:
            raise Misuse(f"shard is {shard}: the namespace has {leased.namespace.shards}")
        if start < 0 or count < 1 or start + count > len(leased.rows):
            raise Misuse(f"start {start}, count {count}: the lease has {len(leased.rows)} chunks")
        rows = leased.rows[start : start + count]
        self._chunks.retain(rows)
        pin_id = self._new_id()
        self._pins[pin_id] = Pinned(worker, leased.namespace, rows)
        self._workers.of(worker).pins.add(pin_id)
        first, offset = leased.namespace.starts[shard], self._chunks.rows.offset
        return Pin(pin_id, [offset[row] + first for row in rows])

    def unpin(self, pin_id: bytes, worker: int) -> bool:
        """The read ended. Was it valid to the end? False: unknown, another worker's, or its namespace was reset."""
        pinned = self._pins.get(pin_id)
        if pinned is None or pinned.worker != worker:
            return False
        del self._pins[pin_id]
        self._workers.of(worker).pins.remove(pin_id)
        self._workers.tidy(worker)
        self._chunks.release(pinned.rows, touch=False)
        return not pinned.stale

    def hold(self, key: ChunkKey) -> Hold | None:
        """Keep a READY chunk in place without a session, and without a touch; None when it is not READY."""
        known = self._chunks.namespaces.get(key.namespace)
        if known is None or not self._chunks.match(known, (key.digest,)):
            return None
        row, rows = known.find(key.digest), self._chunks.rows
        self._chunks.retain((row,))
        self._holds_made += 1
        self._holds[self._holds_made] = row
        above = rows.parent[row]
        parent = rows.digest(above) if above else b"" if rows.first[row] else None
        offsets = [rows.offset[row] + start for start in known.starts]
        return Hold(HoldNumber(self._holds_made), key, parent, offsets, known.lengths)

    def unhold(self, hold: Hold) -> None:
        """Let go of what `hold` kept. Idempotent."""
        row = self._holds.pop(hold.number, None)
        if row is not None:
            self._chunks.release((row,), touch=False)

    # --- writing ----------------------------------------------------------------------------------------------------

    def reserve(
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
        the first to reserve it allocates all its shards, the others claim theirs.
        """
        asking = self._ask(session, shard, namespace, parent, now)
        for position, digest in enumerate(digests):
            asking.step(position, digest)
        reservation = self._promise(asking, session, worker, 1)
        return Reservation(reservation, asking.slots, asking.dropped)

    def reserve_load(self, namespace: bytes, parent: bytes, digest: bytes, now: float) -> Reservation | None:
        """Promise all shards of one chunk to the server itself (worker `SERVER`); None when it gets no slots."""
        asking = self._ask(_LOADS, 0, namespace, parent, now)
        asking.step(0, digest)
        if asking.rows:
            asking.claim_others()
        reservation = self._promise(asking, _LOADS, SERVER, len(asking.slots))
        return Reservation(reservation, asking.slots, asking.dropped) if reservation else None

    def commit(self, reservation_id: bytes, worker: int) -> Sequence[ChunkKey]:
        """The copy ended, and all is written. Returns the keys of the chunks that became READY through it.

        Gone when it was aborted before, by whatever end: nothing is published, but the copy counts as ended.
        """
        reserved = self._live.get(reservation_id)
        if reserved is None or reserved.worker != worker:
            if self._copy_ended(reservation_id, worker):
                raise Gone("the reservation was aborted before this commit")
            raise Gone("no such reservation")
        del self._live[reservation_id]
        published = self._chunks.commit(reserved.rows, reserved.shards)
        self._forget(reserved)
        self._counted["stored_chunks" if worker != SERVER else "loaded_chunks"] += len(published)
        name, digest_of = reserved.namespace.name, self._chunks.rows.digest
        return [ChunkKey(name, digest_of(row)) for row in published]

    def abort(self, reservation_id: bytes, worker: int) -> None:
        """The copy ended and is to be forgotten, with all shards of its chunks. Idempotent."""
        reserved = self._live.get(reservation_id)
        if reserved is not None and reserved.worker == worker:
            self._abort(reserved)
        self._copy_ended(reservation_id, worker)

    # --- ends -------------------------------------------------------------------------------------------------------

    def end_session(self, session: SessionKey) -> None:
        """End its lease, and doom the WRITING chunks that were reserved under it. Pins live on. Idempotent."""
        owner = self._sessions.get(session)
        if owner is None:
            return
        self.release(owner.lease)
        for reservation in list(owner.reservations):
            self._abort(self._live[reservation])
        self._doom(list(owner.begun))
        self._sessions.tidy(session)

    def lose_worker(self, worker: int) -> None:
        """Its connection is gone: its pins end; its reservations are aborted, and their slots quarantined. Idempotent.

        The quarantine ends with `copies_ended`. A read of a lost worker is not waited for: what it reads from now on,
        nobody will believe.
        """
        owner = self._workers.get(worker)
        if owner is None:
            return
        for pin in list(owner.pins):
            self.unpin(pin, worker)
        for reservation in list(owner.reservations):
            if reservation in self._live:
                self._abort(self._live[reservation])

    def copies_ended(self, worker: int) -> None:
        """No copy of *worker* is in progress any more, by its own word or by its exit: its quarantine is freed."""
        owner = self._workers.get(worker)
        if owner is not None:
            for reservation in list(owner.reservations):
                self.abort(reservation, worker)

    def reset(self, namespace: bytes) -> None:
        """Drop every chunk of *namespace*: nothing of it is served, nor committed by what began before. Idempotent."""
        known = self._chunks.namespaces.get(namespace)
        if known is None:
            return
        for reserved in [r for r in self._live.values() if r.namespace is known]:
            self._abort(reserved)
        for reader in (*self._leases.values(), *self._pins.values()):
            reader.stale = reader.stale or reader.namespace is known
        self._counted["reset_chunks"] += self._chunks.clear(known)

    def expire(self, now: float) -> float:
        """End the leases and reservations that are overdue. Returns when to call next (inf: never, as things are)."""
        chunks = self._chunks
        while self._leases and (leased := next(iter(self._leases.values()))).expires <= now:
            self._counted["leases_expired"] += 1
            self.release(leased.id)
        while self._live and (reserved := next(iter(self._live.values()))).deadline <= now:
            self._counted["reservations_expired"] += 1
            self._abort(reserved)
        while chunks.writing and next(iter(chunks.writing.values())).deadline <= now:
            self._doom([next(iter(chunks.writing))])  # some shard was never claimed
        times = [leased.expires for leased in _first(self._leases)]
        times += [reserved.deadline for reserved in _first(self._live)]
        times += [writing.deadline for writing in _first(chunks.writing)]
        return min(times, default=inf)

    def statistics(self) -> dict[str, dict[str, Any]]:
        """Two parts: `held` goes up and down, `counted` only up. Costs the same whatever is held."""
        chunks, arena = self._chunks, self._arena
        held = {
            "leases": len(self._leases),
            "leases_offered": self._offered_leases,
            "pins": len(self._pins),
            "reservations": len(self._live),
            "reservations_ending": len(self._ending),
            "holds": len(self._holds),
            "namespaces": len(chunks.namespaces),
            "bytes_offered": chunks.bytes_offered,
            "bytes_retained": chunks.bytes_retained,
            "bytes_taken": arena.taken,
            "bytes_free": arena.free_bytes,
            "largest_hole": arena.largest_hole,
        }
        for state, name in ((State.READY, "ready"), (State.WRITING, "writing"), (State.DOOMED, "quarantined")):
            held[f"chunks_{name}"] = chunks.chunks[state]
            held[f"slots_{name}"] = chunks.slots[state]
            held[f"bytes_{name}"] = chunks.bytes[state]
        counted: dict[str, Any] = {name: self._counted[name] for name in _COUNTERS}
        counted["evictions"] = chunks.evictions
        counted["dropped"] = dict.fromkeys(REASONS, 0) | dict(self._dropped)
        return {"held": held, "counted": counted}

    # --- within -----------------------------------------------------------------------------------------------------

    def _ask(self, session: SessionKey, shard: int, namespace: bytes, parent: bytes, now: float) -> Asking:
        known = self._chunks.namespaces.get(namespace)
        if known is None:
            raise Misuse("the namespace is not attached")
        if not 0 <= shard < known.shards:
            raise Misuse(f"shard is {shard}: the namespace has {known.shards}")
        begun = self._sessions.of(session).begun
        asking = Asking(self._chunks, known, session, shard, now + self._reservation_timeout, begun)
        asking.follow(parent)
        return asking

    def _promise(self, asking: Asking, session: SessionKey, worker: int, shards: int) -> bytes:
        """Make the reservation of what *asking* was given; its id, empty when that is nothing."""
        self._dropped.update(asking.dropped)
        if not asking.rows:
            self._sessions.tidy(session)
            return b""
        reserved = Reserved(self._new_id(), session, worker, asking.namespace, asking.rows, shards, asking.deadline)
        self._live[reserved.id] = reserved
        self._sessions.of(session).reservations.add(reserved.id)
        self._workers.of(worker).reservations.add(reserved.id)
        return reserved.id

    def _abort(self, reserved: Reserved) -> None:
        """A live reservation is ending: nothing of it will be published; its slots wait for the copy's end."""
        del self._live[reserved.id]
        self._ending[reserved.id] = reserved
        self._sessions.of(reserved.session).reservations.remove(reserved.id)
        state = self._chunks.rows.state
        self._doom([row for row in reserved.rows if state[row] == State.WRITING])
        self._sessions.tidy(reserved.session)

    def _copy_ended(self, reservation_id: bytes, worker: int) -> bool:
        """The copy of an ending reservation ended. False when there is no such, or it is another worker's."""
        reserved = self._ending.get(reservation_id)
        if reserved is None or reserved.worker != worker:
            return False
        del self._ending[reservation_id]
        self._workers.of(worker).reservations.remove(reservation_id)
        self._workers.tidy(worker)
        for row in reserved.rows:
            self._chunks.let_go_doomed(row, reserved.shards)
        return True

    def _forget(self, reserved: Reserved) -> None:
        self._sessions.of(reserved.session).reservations.remove(reserved.id)
        self._sessions.tidy(reserved.session)
        self._workers.of(reserved.worker).reservations.remove(reserved.id)
        self._workers.tidy(reserved.worker)

    def _doom(self, rows: Iterable[int]) -> None:
        """Doom WRITING chunks."""
        for row in rows:
            self._chunks.doom(row)
            self._counted["aborted_chunks"] += 1

    def _unoffer(self, leased: Leased) -> None:
        if leased.offered:
            leased.offered = False
            self._offered_leases -= 1
            self._chunks.unoffer(leased.rows)

    def _end_lease_of(self, session: SessionKey) -> None:
        owner = self._sessions.get(session)
        if owner is not None:
            self.release(owner.lease)


def _first(records: OrderedDict[bytes, T] | OrderedDict[int, T]) -> Iterable[T]:
    return islice(records.values(), 1)
