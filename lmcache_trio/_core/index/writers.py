"""Who is writing chunks, and until when: reservations.

    (none) --promise--> LIVE --commit--> (none)
                         `--owner lost / time is up / reset / abort--> ENDING --copy ended--> (none)

A LIVE reservation may publish. An ENDING one may not: its chunks are doomed, and its slots stay in quarantine until
the writer says that its copy ended (an abort, or a commit that comes too late), or has exited. A WRITING chunk belongs
to the engine that began it, whose workers may claim its other shards. The end of a session ends none of it: what was
submitted is finished.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from math import inf

import attrs

from lmcache_trio._core.index.asking import Asking
from lmcache_trio._core.index.chunks import Chunks
from lmcache_trio._core.index.generations import Namespace, State
from lmcache_trio._core.index.grants import SERVER, SessionKey
from lmcache_trio._core.keys import ChunkKey
from lmcache_trio.errors import Gone

__all__ = ["Writers"]


@attrs.define(eq=False)
class _ReservationRecord:
    """A copy in progress into *shards* shards of each of *rows*."""

    id: bytes
    worker: int
    namespace: Namespace
    rows: Sequence[int]
    shards: int
    deadline: float


class Writers:
    """All reservations. Time runs one way and the timeout is one constant: they are overdue in order."""

    def __init__(self, chunks: Chunks, new_id: Callable[[], bytes], timeout: float, counted: Counter[str]) -> None:
        self._chunks = chunks
        self._new_id = new_id
        self._timeout = timeout
        self._counted = counted
        self.dropped: Counter[str] = Counter()
        self._overdue: dict[int, None] = {}  # workers
        self._live: OrderedDict[bytes, _ReservationRecord] = OrderedDict()
        self._ending: dict[bytes, _ReservationRecord] = {}
        self._reservations_of: dict[int, set[bytes]] = {}  # live and ending, by worker

    def ask(self, session: SessionKey, shard: int, namespace: Namespace, parent: bytes, now: float) -> Asking:
        """Begin to ask for slots; `promise` follows in the same breath."""
        asking = Asking(self._chunks, namespace, session[0], shard, now + self._timeout)
        asking.follow(parent)
        return asking

    def promise(self, asking: Asking, worker: int, shards: int) -> bytes:
        """Make the reservation of what *asking* was given (*shards* slots a chunk): its id, empty if it is nothing."""
        self.dropped.update(asking.dropped)
        if not asking.rows:
            return b""
        made = _ReservationRecord(self._new_id(), worker, asking.namespace, asking.rows, shards, asking.deadline)
        self._live[made.id] = made
        self._reservations_of.setdefault(worker, set()).add(made.id)
        return made.id

    def commit(self, reservation_id: bytes, worker: int) -> list[ChunkKey]:
        reserved = self._live.get(reservation_id)
        if reserved is None or reserved.worker != worker:
            if self._copy_ended(reservation_id, worker):
                raise Gone("the reservation was aborted before this commit")
            raise Gone("no such reservation")
        del self._live[reservation_id]
        namespace = reserved.namespace
        published = self._chunks.commit(namespace, reserved.rows, reserved.shards)
        self._leave_worker(reserved)
        self._counted["loaded_chunks" if worker == SERVER else "stored_chunks"] += len(published)
        name, digest_of = namespace.name, self._chunks.rows.digest
        return [ChunkKey(name, digest_of(row)) for row in published]

    def abort(self, reservation_id: bytes, worker: int) -> None:
        reserved = self._live.get(reservation_id)
        if reserved is not None and reserved.worker == worker:
            self._abort(reserved)
        self._copy_ended(reservation_id, worker)

    def is_live(self, reservation_id: bytes) -> bool:
        return reservation_id in self._live

    def would_keep(self, reservation_id: bytes) -> int:
        reserved, state = self._live.get(reservation_id), self._chunks.rows.state
        return 0 if reserved is None else sum(state[row] == State.WRITING for row in reserved.rows)

    # --- ends -------------------------------------------------------------------------------------------------------

    def lose_worker(self, worker: int) -> None:
        for reservation_id in list(self._reservations_of.get(worker, ())):
            if reservation_id in self._live:
                self._abort(self._live[reservation_id])

    def copies_ended(self, worker: int) -> None:
        for reservation_id in list(self._reservations_of.get(worker, ())):
            self.abort(reservation_id, worker)

    def reset(self, namespace: Namespace) -> None:
        """Abort what is being written in *namespace*: nothing of it is WRITING any more."""
        for reserved in [reserved for reserved in self._live.values() if reserved.namespace is namespace]:
            self._abort(reserved)
        if namespace.counts[State.WRITING]:  # what is left has a shard that nobody claimed
            self._doom([row for row in self._chunks.writing if self._chunks.namespace_of(row) is namespace])

    def expire(self, now: float) -> float:
        due, writing = inf, self._chunks.writing
        while self._live:
            reserved = next(iter(self._live.values()))
            if reserved.deadline > now:
                due = reserved.deadline
                break
            self._counted["reservations_expired"] += 1
            self._overdue[reserved.worker] = None
            self._abort(reserved)
        while writing:  # what is left has a shard that nobody claimed in time
            row, details = next(iter(writing.items()))
            if details.deadline > now:
                return min(due, details.deadline)
            self._doom([row])
        return due

    def take_overdue(self) -> list[int]:
        """Workers of which a reservation was overdue since the last call, once each."""
        overdue = list(self._overdue)
        self._overdue.clear()
        return overdue

    def held(self) -> dict[str, int]:
        return {"reservations": len(self._live), "reservations_ending": len(self._ending)}

    # --- within -----------------------------------------------------------------------------------------------------

    def _abort(self, reserved: _ReservationRecord) -> None:
        """LIVE to ENDING: nothing of it will be published, in any shard; its slots wait for the copy's end."""
        del self._live[reserved.id]
        self._ending[reserved.id] = reserved
        state = self._chunks.rows.state
        self._doom([row for row in reserved.rows if state[row] == State.WRITING])

    def _copy_ended(self, reservation_id: bytes, worker: int) -> bool:
        """The copy of an ENDING reservation ended. False when there is no such, or it is another worker's."""
        reserved = self._ending.get(reservation_id)
        if reserved is None or reserved.worker != worker:
            return False
        del self._ending[reservation_id]
        self._leave_worker(reserved)
        for row in reserved.rows:
            self._chunks.let_go_doomed(row, reserved.shards)
        return True

    def _doom(self, rows: Iterable[int]) -> None:
        for row in rows:
            self._chunks.doom(row)
            self._counted["aborted_chunks"] += 1

    def _leave_worker(self, reserved: _ReservationRecord) -> None:
        mine = self._reservations_of[reserved.worker]
        mine.remove(reserved.id)
        if not mine:
            del self._reservations_of[reserved.worker]
