"""The index: which engine writes a chunk, which readers it has, and until when.

A reservation is one worker's right to write chunks:

    (none) --reserve--> LIVE --commit--> (none)
                         `--abort / time is up / worker lost / reset--> ENDING --copy ended--> (none)

A WRITING chunk belongs to the session that began it: its engine's workers claim the other shards for that session. The
shards of two sessions never make one chunk, because one of the two may have computed wrong KV. An ENDING reservation
publishes nothing: its chunks are doomed, and its slots stay in quarantine until the writer says that its copy ended (an
abort, or a commit that comes too late), or has exited. The end of a session ends no reservation: stores that were
submitted are finished.

A lease is a session's right to read, a pin is a worker's read in progress, a hold is the server's own read. Each is
one reader of each of its chunks, and keeps them in place.

`chunks` has the life of a chunk, its place in the order of eviction, and its bytes. No I/O, no clock, no waiting: times
are seconds on the caller's monotonic clock, and ids come from a function that is passed in. A method that raises has
changed nothing, except a late commit, which raises `Gone` and ends its copy.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from math import inf

import attrs

from lmcache_trio._core.departures import Cause
from lmcache_trio._core.groups import EVERY, Group
from lmcache_trio._core.index.arena import Arena
from lmcache_trio._core.index.chunks import Chunks, Writing
from lmcache_trio._core.index.generations import ALONE, READY, WRITING, Namespace, Whole
from lmcache_trio._core.index.grants import SERVER, Hold, HoldNumber, Lease, Pin, Reservation, SessionKey, Slot
from lmcache_trio._core.keys import DIGEST_BYTES, ChunkKey
from lmcache_trio._core.misses import InMemory, known_run
from lmcache_trio.errors import Gone, Misuse
from lmcache_trio.statistics import IndexCounted, IndexHeld, IndexStatistics, LayoutHeld

__all__ = ["SERVER", "Hold", "Index", "Lease", "Pin", "Reservation", "SessionKey", "Slot"]

EXPIRED_AT_ONCE = 4096
"""Chunks, about, whose leases are ended in one go when their time is up together. That takes about 1 ms."""
CLEARED_AT_ONCE = 256
"""Chunks that `clear` looks at in one go. That takes about 1 ms."""

_REASONS = ("present", "writing", "no_space", "orphan", "too_large", "share")
"""Why a chunk gets no slot; the numbered cases of `Index.reserve` say when."""

_PLACES = {READY: InMemory.READY, WRITING: InMemory.WRITING}
"""A chunk without a row is ABSENT."""

_LOADS: SessionKey = ("", 0)
"""The session of the server's own loads. It belongs to no engine and never ends."""


@attrs.define(eq=False)
class _ReservationRecord:
    """A copy in progress into *shards* shards of each of *rows*."""

    id: bytes
    worker: int
    namespace: Namespace
    rows: Sequence[int]
    shards: int
    deadline: float


@attrs.define(eq=False)
class _LeaseRecord:
    """A hit of *chunks* chunks: of each namespace the last rows before them, as many as its group needs.

    *offered*: the engine has not taken it yet. The rows of a namespace are stale once a reset has replaced it.
    """

    session: SessionKey
    chunks: int
    namespaces: Sequence[Namespace]
    rows: 'tuple["array[int]", ...]'
    expires: float
    offered: bool = True


@attrs.define(eq=False)
class _PinRecord:
    """A read in progress. A pin is stale once a reset has replaced its namespace."""

    worker: int
    namespace: Namespace
    rows: "array[int]"


class Index:
    """Chunks, leases, pins, reservations and holds over one arena.

    *new_id* gives unguessable ids; *lease_share* is the part of the arena's taken bytes that leases may hold before
    they are taken; *write_share* is the part that one engine may be writing, of the bytes that no other is writing;
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
    ) -> None:
        for name, share in (("lease_share", lease_share), ("write_share", write_share)):
            if not 0 < share <= 1:
                raise Misuse(f"{name} is {share}: it must be above 0 and at most 1")
        for name, timeout in (("lease_timeout", lease_timeout), ("reservation_timeout", reservation_timeout)):
            if not timeout > 0:
                raise Misuse(f"{name} is {timeout}: it must be above 0")
        self.arena = arena
        self._new_id = new_id
        self._lease_share = lease_share
        self._write_share = write_share
        self._lease_timeout = lease_timeout
        self._reservation_timeout = reservation_timeout
        self._most_unused = most_unused
        self._lease_limit = int(lease_share * arena.taken)
        self._chunks = Chunks(arena)
        self.changes = self._chunks.changes
        """What has become READY and what has left, for those who watch."""
        self.departures = self._chunks.departures
        """What has left, and what got no slot, for lookups that miss it."""
        # Time runs one way and each timeout is a constant, so the overdue ones come first.
        self._live: OrderedDict[bytes, _ReservationRecord] = OrderedDict()
        self._ending: dict[bytes, _ReservationRecord] = {}
        self._reservations_of: dict[int, set[bytes]] = {}  # live and ending, by worker
        self._overdue: dict[int, None] = {}  # workers
        self._leases: OrderedDict[bytes, _LeaseRecord] = OrderedDict()
        self._lease_of: dict[SessionKey, bytes] = {}
        self._leases_offered = 0
        self._pins: dict[bytes, _PinRecord] = {}
        self._pins_of: dict[int, set[bytes]] = {}  # by worker
        self._holds: dict[int, tuple[Namespace, int]] = {}  # rows
        self._holds_made = 0
        self._counted: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()  # by reason

    def grow(self, taken: int) -> None:
        """Bytes up to *taken* are backed by memory now, and leases may have their share of them."""
        self.arena.grow(taken)
        self._lease_limit = int(self._lease_share * taken)

    # --- namespaces -------------------------------------------------------------------------------------------------

    def attach(
        self,
        namespace: bytes,
        shard_bytes: Sequence[int],
        group: Group = EVERY,
        chunk_tokens: int = 0,
        whole: Whole = ALONE,
    ) -> None:
        """An engine uses *namespace*, a part of *whole*, with the bytes of each shard's slot. Misuse if they differ
        from another's.

        Its chunks are the parts of *group* in the engine's chunks of *chunk_tokens*. If a hit does not need EVERY
        part, the parts are not *chained*: each may be stored, and stay, without the one before it.
        """
        self._chunks.generations.attach(namespace, shard_bytes, self.arena.rounded, group, chunk_tokens, whole)

    def check_lengths(self, namespace: bytes, shard_bytes: Sequence[int]) -> None:
        """Misuse, exactly if `attach` would refuse the same."""
        self._chunks.generations.check_lengths(namespace, shard_bytes)

    def detach(self, namespace: bytes) -> None:
        """An engine that attached *namespace* uses it no more.

        A namespace that no engine uses is forgotten with its last chunk. If more than *most_unused* such namespaces
        hold chunks, the one that was left longest ago is dropped, as by a `reset`: `sweep` then.
        """
        generations = self._chunks.generations
        generations.detach(generations.present[namespace])
        if len(generations.unused) > self._most_unused:
            oldest = next(iter(generations.unused.values()))
            self._counted["namespaces_dropped"] += 1
            self._stop_writing(oldest)
            if generations.present.get(oldest.name) is oldest:  # its last rows were not being written
                generations.retire(oldest)

    def layouts(self) -> list[LayoutHeld]:
        """What is held of each layout, of those that an engine uses and of those that hold chunks."""
        return self._chunks.generations.layouts()

    def shard_bytes(self, namespace: bytes) -> Sequence[int]:
        """The bytes of each shard's slot, as attached; empty for a namespace that is not attached."""
        known = self._chunks.generations.present.get(namespace)
        return () if known is None else known.lengths

    def chunk_bytes(self, namespace: bytes) -> int:
        """A chunk's extent: its bytes in the arena, over all shards; 0 for a namespace that is not attached."""
        known = self._chunks.generations.present.get(namespace)
        return 0 if known is None else known.extent

    # --- writing ----------------------------------------------------------------------------------------------------

    def reserve(  # noqa: PLR0913, PLR0915 the message has as many fields, and all cases stand in one sight
        self,
        session: SessionKey,
        worker: int,
        shard: int,
        namespace: bytes,
        parent: bytes,
        digests: bytes,
        now: float,
        live: Container[int] = (),
    ) -> Reservation:
        """Promise slots for *shard* of the leading absent run of *digests* that fits now; drop and count the rest.

        *digests* come packed. *parent* is the digest before the first one (empty: a chain's first chunk). *live* are
        the engine's sessions that have not ended. Workers of one session share a chunk: the first
        worker to reserve it allocates all its shards, the others claim theirs. A reserve never waits for space: idle
        chunks are evicted, the least recently used leaf first. In a namespace that is not chained no chunk needs its
        parent, so no chunk is an orphan.
        """
        known = self._chunks.generations.present.get(namespace)
        if known is None:
            raise Misuse("the namespace is not attached")
        if not 0 <= shard < known.shards:
            raise Misuse(f"shard is {shard}: the namespace has {known.shards}")
        if len(digests) % DIGEST_BYTES or len(parent) not in (0, DIGEST_BYTES):
            raise Misuse(f"digests and parent must have {DIGEST_BYTES} bytes each")
        engine, deadline, bit = session[0], now + self._reservation_timeout, 1 << shard
        chunks, table_of, writing = self._chunks, known.table_of, self._chunks.writing
        rows: list[int] = []
        slots: list[Slot] = []
        dropped: dict[str, int] = {}
        above = 0  # the row of the chunk before
        chunks.mark(now)
        stopped = ""  # why a chunk could not be stored: no chunk behind it gets a slot
        if parent and known.chained:
            above = table_of[parent[0]].get(parent, 0)
            # 1. The parent is absent, or another engine is writing it: its children could not be found.
            if not above or (above in writing and writing[above].session[0] != engine):
                above, stopped = 0, "orphan"
        for position in range(len(digests) // DIGEST_BYTES):
            digest = digests[position * DIGEST_BYTES : (position + 1) * DIGEST_BYTES]
            row, reason = table_of[digest[0]].get(digest, 0), ""
            other = writing.get(row)
            # 2. Another session of this engine, which has ended, has stored other shards of it. Workers ask in order,
            # so this one will not store its shard for that session any more: the chunk is doomed, and absent.
            if (
                other is not None
                and not stopped
                and other.session != session
                and other.session[0] == engine
                and other.session[1] not in live
                and not other.claimed & bit
                and not other.is_copied(known.shards)
            ):
                chunks.doom([row])
                above = 0 if above == row else above  # a client may name a chunk as its own parent
                row, other = 0, None
            if row:
                above = row
                # 3. It is READY: passed over.
                if other is None:
                    reason = "present"
                # 4. Another engine is writing it: a reserve does not wait, and the chunks behind it could not be found.
                elif other.session[0] != engine:
                    reason, stopped = "writing", stopped or ("orphan" if known.chained else "")
                # 5. This engine is writing it, and a chunk before it got no slot.
                elif stopped:
                    reason = stopped
                # 6. This engine is writing it for another session, or a worker has claimed this shard: passed over.
                elif other.session != session or other.claimed & bit:
                    reason = "writing"
                # 7. This session is storing it, and no worker has claimed this shard: its slot is given below.
            # 8. It is absent, and a chunk before it got no slot.
            elif stopped:
                reason = stopped
            # 9. It is absent, and larger than the whole arena.
            elif known.extent > self.arena.capacity:
                reason = stopped = "too_large"
            # 10. It is absent, and its engine is writing as much as one engine may.
            elif not self._may_write(engine, known.extent):
                reason = stopped = "share"
                self.departures.note(namespace, digest, Cause.SHARE, now)
            # 11. It is absent, and begins to be written; idle chunks are evicted for it.
            else:
                above = above if known.chained else 0
                above = row = chunks.begin(known, digest, above, Writing(session, known.shards, deadline), now)
                # 12. No more can be evicted, or too much would be.
                if not row:
                    reason = stopped = "no_space"
                    if engine:  # else a tier has it
                        self.departures.note(namespace, digest, Cause.NO_SPACE, now)
            if reason:
                dropped[reason] = dropped.get(reason, 0) + 1
                continue
            rows.append(row)
            slots.append(Slot(position, chunks.claim(row, known, shard, deadline)))
        self._dropped.update(dropped)
        if not rows:
            return Reservation(b"", slots, dropped)
        made = _ReservationRecord(self._new_id(), worker, known, rows, 1, deadline)
        self._live[made.id] = made
        self._reservations_of.setdefault(worker, set()).add(made.id)
        return Reservation(made.id, slots, dropped, known.lengths)

    def reserve_load(self, namespace: bytes, parent: bytes, digest: bytes, now: float) -> Reservation | None:
        """Promise all shards of one chunk to the server itself; None when it gets no slots, or no engine wants it.

        The server commits and aborts it as worker `SERVER`; a slot's position is its shard.
        """
        known = self._chunks.generations.present.get(namespace)
        if known is None or not known.users:
            return None
        first = self.reserve(_LOADS, SERVER, 0, namespace, parent, digest, now)
        if not first.id:
            return None
        made = self._live[first.id]
        row, made.shards = made.rows[0], known.shards
        others = [Slot(i, self._chunks.claim(row, known, i, made.deadline)) for i in range(1, known.shards)]
        return Reservation(made.id, [*first.slots, *others], first.dropped, known.lengths)

    def commit(self, reservation_id: bytes, worker: int) -> Sequence[ChunkKey]:
        """The copy ended, and all is written. Returns the keys of the chunks that became READY by it.

        Gone: the reservation was aborted before. No chunk is published, but the copy counts as ended.
        """
        reserved = self._live.get(reservation_id)
        if reserved is None or reserved.worker != worker:
            if self._copy_ended(reservation_id, worker):
                raise Gone("the reservation was aborted before this commit")
            raise Gone("no such reservation")
        del self._live[reservation_id]
        _discard(self._reservations_of, worker, reservation_id)
        published = self._chunks.publish(reserved.rows, reserved.namespace, reserved.shards)
        self._counted["loaded_chunks" if worker == SERVER else "stored_chunks"] += len(published)
        keys = [ChunkKey(reserved.namespace.name, self._chunks.digest(row)) for row in published]
        if self.changes.watched:
            for key in keys:
                self.changes.note(key.namespace, key.digest, is_there=True)
        return keys

    def abort(self, reservation_id: bytes, worker: int) -> None:
        """The copy ended and is to be forgotten, with all shards of its chunks. Idempotent."""
        reserved = self._live.get(reservation_id)
        if reserved is not None and reserved.worker == worker:
            self._abort(reserved)
        self._copy_ended(reservation_id, worker)

    def may_publish(self, reservation_id: bytes) -> bool:
        """Whether a `commit` would still publish chunks. False: the reservation was aborted."""
        return reservation_id in self._live

    def would_keep(self, reservation_id: bytes) -> int:
        """How many chunks a `commit` would keep, without those that were doomed, as by another shard's abort."""
        reserved, state = self._live.get(reservation_id), self._chunks.state
        return 0 if reserved is None else sum(state[row] == WRITING for row in reserved.rows)

    def bytes_written_by(self, engine: str) -> int:
        """Bytes of the chunks that *engine* began and has not committed, those in quarantine among them."""
        return self._chunks.written_by[engine]

    def _may_write(self, engine: str, extent: int) -> bool:
        """Whether *engine* may write *extent* bytes more: its share is of the arena less the bytes that others write.

        So engines that never commit leave a part of the arena: n engines with a share s leave (1 - s)^n of it or more.
        One chunk is always within the share. The server's own loads are not bounded here.
        """
        mine = self._chunks.written_by[engine]
        if not mine or not engine or self._write_share == 1:
            return True
        others = self._chunks.bytes_written - mine
        return mine + extent <= self._write_share * (self.arena.taken - others)

    def overdue_writers(self) -> Sequence[int]:
        """Workers whose reservations became overdue since the last call, each once."""
        overdue = list(self._overdue)
        self._overdue.clear()
        return overdue

    # --- reading ----------------------------------------------------------------------------------------------------

    def match(self, namespaces: tuple[bytes, ...], digests: Sequence[bytes]) -> int:
        """The chunks of the longest hit that READY parts of all *namespaces* serve. They are not touched."""
        generations = self._chunks.generations
        known = generations.together.get(namespaces) or generations.find_together(namespaces)
        return self._chunks.longest_hit(known, digests) if known else 0

    def missed_part(self, namespaces: tuple[bytes, ...], digests: Sequence[bytes], hit: int) -> ChunkKey:
        """The part for which a lookup of *digests* is no longer than *hit*, which is less than all.

        Of several groups: the first part that is missing from the longest hit that the chained ones would serve. That
        takes O(log n) steps. With all parts READY, the lease was cut.
        """
        generations, state = self._chunks.generations, self._chunks.state
        known = generations.together.get(namespaces) or generations.find_together(namespaces)
        chained = [namespace for namespace in known if namespace.chained]
        others = [namespace for namespace in known if not namespace.chained]

        def is_ready(namespace: Namespace, position: int) -> bool:
            digest = digests[position]
            return state[namespace.table_of[digest[0]].get(digest, 0)] == READY

        for namespace in chained:
            if not is_ready(namespace, hit):
                return ChunkKey(namespace.name, digests[hit])
        end = len(digests)
        for namespace in chained if others else ():
            end = known_run(partial(is_ready, namespace), hit, end)
        for namespace in others:
            layout = namespace.layout
            for position in range(layout.group.first(end, layout.chunk_tokens), end):
                if not is_ready(namespace, position):
                    return ChunkKey(namespace.name, digests[position])
        return ChunkKey(namespaces[0], digests[hit])

    def place_of(self, key: ChunkKey) -> InMemory:
        """Where memory has the chunk."""
        known = self._chunks.generations.present.get(key.namespace)
        row = 0 if known is None else known.table_of[key.digest[0]].get(key.digest, 0)
        return _PLACES.get(self._chunks.state[row], InMemory.ABSENT)

    @property
    def room_to_offer(self) -> int:
        """Bytes that leases may still have: a lookup is offered no chunk beyond."""
        return self._lease_limit - self._chunks.bytes_offered

    def lease(
        self, session: SessionKey, namespaces: tuple[bytes, ...], digests: Sequence[bytes], now: float
    ) -> Lease | None:
        """Lease and touch what the longest hit needs, cut where lease_share is reached; None when that is empty.

        *namespaces* are those of the engine's groups. One chained namespace has the longest hit with its leading READY
        run. A session has one lease: to ask for a new one ends the former.
        """
        former = self._lease_of.get(session)
        if former is not None:
            self.release(former)
        generations, chunks = self._chunks.generations, 0
        known = generations.together.get(namespaces) or generations.find_together(namespaces)
        parts: list[list[int]] = []
        if len(known) == 1 and known[0].chained:
            parts = [self._chunks.offer(known[0], digests, self._lease_limit)]
            chunks = len(parts[0])
        elif known:
            chunks, parts = self._chunks.offer_parts(known, digests, self._lease_limit)
        self._counted["chunks_hit"] += chunks
        self._counted["chunks_missed"] += len(digests) - chunks
        if not chunks:
            return None
        rows = tuple([array("i", part) for part in parts])
        lease_id, expires = self._new_id(), now + self._lease_timeout
        self._leases[lease_id] = _LeaseRecord(session, chunks, known, rows, expires)
        self._lease_of[session] = lease_id
        self._leases_offered += 1
        return Lease(lease_id, session, namespaces, chunks, expires)

    def take(self, lease_id: bytes) -> None:
        """The engine allocated blocks: the lease leaves lease_share. Idempotent; an ended lease is not an error."""
        leased = self._leases.get(lease_id)
        if leased is None or not leased.offered:
            return
        leased.offered = False
        self._leases_offered -= 1
        for namespace, rows in zip(leased.namespaces, leased.rows, strict=True):
            self._chunks.unoffer(rows, namespace)

    def release(self, lease_id: bytes) -> None:
        """End a lease, which touches its chunks. Idempotent; pins live on."""
        self.take(lease_id)
        leased = self._leases.pop(lease_id, None)
        if leased is not None:
            del self._lease_of[leased.session]
            # The chained ones come last, at the recent end: other hits need them as well.
            for namespace, rows in zip(leased.namespaces, leased.rows, strict=True):
                self._chunks.let_go(rows, namespace, touch=True)

    def pin(  # noqa: PLR0913
        self, lease_id: bytes, engine: str, namespace: bytes, worker: int, shard: int, start: int, count: int
    ) -> Pin:
        """Turn *count* chunks of a lease, from *start*, into a read in progress of *worker*, for its *shard*.

        *namespace* is the present one of the engine's group. Gone: there is no such lease, it belongs to another engine
        or other namespaces, or was reset. Misuse: a shard or a range that the lease does not have in this group.
        """
        leased = self._leases.get(lease_id)
        if leased is None or leased.session[0] != engine:
            raise Gone("no such lease")
        names = [known.name for known in leased.namespaces]
        if namespace not in names:
            raise Gone("the engine's layout is not the one that was leased")
        group = names.index(namespace)
        known, rows = leased.namespaces[group], leased.rows[group]
        if known.replaced:
            raise Gone("the lease's namespace was reset")
        if not 0 <= shard < known.shards:
            raise Misuse(f"shard is {shard}: the namespace has {known.shards}")
        first = leased.chunks - len(rows)
        if start < first or count < 1 or start + count > leased.chunks:
            raise Misuse(f"start is {start} and count is {count}: the lease has chunks {first} to {leased.chunks}")
        read, offset = rows[start - first : start - first + count], self._chunks.offset
        self._chunks.retain(read, known)
        pin_id = self._new_id()
        self._pins[pin_id] = _PinRecord(worker, known, read)
        self._pins_of.setdefault(worker, set()).add(pin_id)
        begin = known.starts[shard]
        return Pin(pin_id, tuple([offset[row] + begin for row in read]), known.lengths[shard])

    def unpin(self, pin_id: bytes, worker: int) -> bool:
        """The read ended. False, not valid: it is unknown, belongs to another worker, or its namespace was reset."""
        pinned = self._pins.get(pin_id)
        if pinned is None or pinned.worker != worker:
            return False
        del self._pins[pin_id]
        _discard(self._pins_of, worker, pin_id)
        self._chunks.let_go(pinned.rows, pinned.namespace, touch=False)
        return not pinned.namespace.replaced

    def is_valid(self, pin_id: bytes) -> bool:
        """Whether an `unpin` now would find the read valid."""
        pinned = self._pins.get(pin_id)
        return pinned is not None and not pinned.namespace.replaced

    def hold(self, key: ChunkKey) -> Hold | None:
        """Keep a READY chunk in place for the server's own read, without a touch. None: it is not READY."""
        chunks, known = self._chunks, self._chunks.generations.present.get(key.namespace)
        row = 0 if known is None else known.table_of[key.digest[0]].get(key.digest, 0)
        if known is None or chunks.state[row] != READY:
            return None
        chunks.retain((row,), known)
        self._holds_made += 1
        self._holds[self._holds_made] = (known, row)
        above, offset = chunks.parent[row], chunks.offset[row]
        parent = chunks.digest(above) if above else b"" if chunks.first[row] else None
        offsets = tuple([offset + start for start in known.starts])
        return Hold(HoldNumber(self._holds_made), key, parent, offsets, known.lengths)

    def unhold(self, hold: Hold) -> None:
        """The server's read is over. Idempotent."""
        held = self._holds.pop(hold.number, None)
        if held is not None:
            namespace, row = held
            self._chunks.let_go((row,), namespace, touch=False)

    # --- ends -------------------------------------------------------------------------------------------------------

    def end_session(self, session: SessionKey) -> None:
        """End the session's lease. Its pins and reservations live on. Idempotent."""
        lease_id = self._lease_of.get(session)
        if lease_id is not None:
            self.release(lease_id)

    def lose_worker(self, worker: int) -> None:
        """The worker's connection is gone: its pins end, its reservations are aborted. Idempotent.

        The reservations' slots stay in quarantine until `copies_ended`. The worker's reads may go on, but the index
        does not wait for their end, because no engine will use their bytes.
        """
        for pin_id in list(self._pins_of.get(worker, ())):
            self.unpin(pin_id, worker)
        for reservation_id in list(self._reservations_of.get(worker, ())):
            if reservation_id in self._live:
                self._abort(self._live[reservation_id])

    def copies_ended(self, worker: int) -> None:
        """No copy of *worker* is in progress any more, as it said or because it exited: its quarantine is freed."""
        for reservation_id in list(self._reservations_of.get(worker, ())):
            self.abort(reservation_id, worker)

    def reset(self, namespace: bytes) -> int:
        """Drop every chunk of *namespace*; no reservation from before commits anything. Idempotent.

        Returns how many chunks were dropped that could be read.

        The cost depends on the copies in progress and not on the chunks, which `sweep` gives back.
        """
        known = self._chunks.generations.present.get(namespace)
        if known is None:
            return 0
        self._stop_writing(known)
        dropped = known.counts[READY]
        if dropped:
            self._counted["reset_chunks"] += dropped
            if self.changes.watched:
                self.changes.clear(namespace)
            self._chunks.generations.replace(known)
        return dropped

    @property
    def filled(self) -> int:
        """Chunks that came into memory ever."""
        return self._counted["stored_chunks"] + self._counted["loaded_chunks"]

    def find_layouts(self, namespace: str, model: str) -> dict[bytes, list[bytes]]:
        """The namespaces of the layouts whose name in hexadecimal begins with *namespace*, and whose model is *model*.

        Empty: any.
        """
        found: dict[bytes, list[bytes]] = {}
        for known in self._chunks.generations.present.values():
            whole = known.layout.whole.name or known.name
            if whole.hex().startswith(namespace) and model in ("", known.layout.whole.model):
                found.setdefault(whole, []).append(known.name)
        return found

    def clear(self, namespace: bytes) -> Iterator[int]:
        """Drop each chunk of *namespace* that nobody uses. Yields how many went, after each `CLEARED_AT_ONCE` that it
        has looked at: other work may go on between.
        """
        known = self._chunks.generations.present.get(namespace)
        if known is not None:
            for dropped in self._chunks.clear(known, CLEARED_AT_ONCE):
                self._counted["cleared_chunks"] += dropped
                yield dropped

    def chunks_of(self, namespace: bytes) -> int:
        """Chunks of *namespace* that are in memory, or are being written."""
        known = self._chunks.generations.present.get(namespace)
        return 0 if known is None else sum(known.counts)

    def sweep(self, limit: int) -> bool:
        """Give back up to *limit* chunks that a `reset` dropped. True: there are more, so call again.

        Without a call, stale chunks stay until a reserve needs room, which takes them before it evicts any other.
        """
        outdated = self._chunks.generations.outdated
        while outdated and limit > 0:
            self._chunks.sweep_one()
            limit -= 1
        return bool(outdated)

    def expire(self, now: float) -> float:
        """End leases and reservations that are overdue. Returns when to call next (inf: there are none left).

        That time is in the past if more leases are overdue than are ended in one go.
        """
        due, room = inf, EXPIRED_AT_ONCE
        while self._leases:
            lease_id, leased = next(iter(self._leases.items()))
            if leased.expires > now or room <= 0:
                due = leased.expires
                break
            room -= sum(len(rows) for rows in leased.rows)
            self._counted["leases_expired"] += 1
            self.release(lease_id)
        while self._live:
            reserved = next(iter(self._live.values()))
            if reserved.deadline > now:
                due = min(due, reserved.deadline)
                break
            self._counted["reservations_expired"] += 1
            self._overdue[reserved.worker] = None
            self._abort(reserved)
        writing = self._chunks.writing
        while writing:  # those that are left have a shard that no worker claimed in time
            row, details = next(iter(writing.items()))
            if details.deadline > now:
                due = min(due, details.deadline)
                break
            self._chunks.doom((row,))
        return due

    def _abort(self, reserved: _ReservationRecord) -> None:
        """LIVE to ENDING: its chunks are never published, in any shard, and its slots wait for the copy's end."""
        del self._live[reserved.id]
        self._ending[reserved.id] = reserved
        self._chunks.doom([row for row in reserved.rows if self._chunks.state[row] == WRITING])

    def _copy_ended(self, reservation_id: bytes, worker: int) -> bool:
        """The copy of an ENDING reservation ended. False: *worker* has no such reservation."""
        reserved = self._ending.get(reservation_id)
        if reserved is None or reserved.worker != worker:
            return False
        del self._ending[reservation_id]
        _discard(self._reservations_of, worker, reservation_id)
        for row in reserved.rows:
            self._chunks.let_go_doomed(row, reserved.shards)
        return True

    def _stop_writing(self, namespace: Namespace) -> None:
        """No chunk of *namespace* is WRITING from now on."""
        for reserved in [reserved for reserved in self._live.values() if reserved.namespace is namespace]:
            self._abort(reserved)
        if namespace.counts[WRITING]:  # the chunks that are left have a shard that no worker claimed
            self._chunks.doom([row for row in self._chunks.writing if self._chunks.namespace_of(row) is namespace])

    # --- status -----------------------------------------------------------------------------------------------------

    def statistics(self) -> IndexStatistics:
        """The cost does not depend on how much is held."""
        generations, counted = self._chunks.generations, self._counted
        held = IndexHeld(
            leases=len(self._leases),
            leases_offered=self._leases_offered,
            pins=len(self._pins),
            holds=len(self._holds),
            reservations=len(self._live),
            reservations_ending=len(self._ending),
            chunks=generations.held(),
            bytes_offered=self._chunks.bytes_offered,
            namespaces=len(generations.present),
            bytes_taken=self.arena.taken,
            bytes_free=self.arena.free_bytes,
            largest_hole=self.arena.largest_hole,
        )
        return IndexStatistics(
            held,
            IndexCounted(
                stored_chunks=counted["stored_chunks"],
                loaded_chunks=counted["loaded_chunks"],
                reset_chunks=counted["reset_chunks"],
                cleared_chunks=counted["cleared_chunks"],
                leases_expired=counted["leases_expired"],
                reservations_expired=counted["reservations_expired"],
                aborted_chunks=self._chunks.aborted,
                evictions=self._chunks.evictions,
            ),
            evicted_idle=round(self._chunks.evicted_idle, 3),
            chunks_hit=counted["chunks_hit"],
            chunks_missed=counted["chunks_missed"],
            namespaces_dropped=counted["namespaces_dropped"],
            dropped={reason: self._dropped[reason] for reason in _REASONS},
        )


def _discard(held: dict[int, set[bytes]], worker: int, ident: bytes) -> None:
    """*worker* does not have *ident* any more."""
    held[worker].remove(ident)
    if not held[worker]:
        del held[worker]
