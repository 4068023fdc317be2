"""Who may read chunks, and until when: leases, pins and holds.

A lease is a session's, a pin is a worker's, a hold is the server's own; each is one reader of each of its chunks, and
keeps them where they are. What a chunk does about that stands in `chunks`; what ends a reader stands here.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from math import inf

import attrs

from lmcache_trio._core.index.chunks import Chunks
from lmcache_trio._core.index.generations import Namespace
from lmcache_trio._core.index.grants import Hold, HoldNumber, Lease, Pin, SessionKey
from lmcache_trio._core.keys import ChunkKey
from lmcache_trio.errors import Gone, Misuse

__all__ = ["Readers"]


EXPIRED_AT_ONCE = 4096
"""Chunks, about: leases of more are not ended in one go, which takes some 1 ms, when their time is up together."""


@attrs.define(eq=False)
class _Leased:
    """*offered*: not taken yet. A lease is stale when its namespace was replaced, by a reset; so is a pin."""

    id: bytes
    session: SessionKey
    namespace: Namespace
    rows: "array[int]"
    expires: float
    offered: bool = True


@attrs.define(eq=False)
class _PinRecord:
    worker: int
    namespace: Namespace
    rows: "array[int]"


class Readers:
    """All leases, pins and holds. Time runs one way and the timeout is one constant: leases expire in order."""

    def __init__(self, chunks: Chunks, new_id: Callable[[], bytes], timeout: float, counted: Counter[str]) -> None:
        self._chunks = chunks
        self._new_id = new_id
        self._timeout = timeout
        self._counted = counted
        self._leases: OrderedDict[bytes, _Leased] = OrderedDict()
        self._pins: dict[bytes, _PinRecord] = {}
        self._holds: dict[int, int] = {}
        self._holds_made = 0
        self._lease_of: dict[SessionKey, bytes] = {}
        self._pins_of: dict[int, set[bytes]] = {}
        self._offered = 0

    def lease(
        self, session: SessionKey, namespace: Namespace | None, digests: Sequence[bytes], limit: int, now: float
    ) -> Lease | None:
        former = self._lease_of.get(session)
        if former is not None:
            self.release(former)
        run = self._chunks.offer(namespace, digests, limit) if namespace is not None else []
        self._counted["chunks_hit"] += len(run)
        self._counted["chunks_missed"] += len(digests) - len(run)
        if namespace is None or not run:
            return None
        leased = _Leased(self._new_id(), session, namespace, array("i", run), now + self._timeout)
        self._leases[leased.id] = leased
        self._lease_of[session] = leased.id
        self._offered += 1
        return Lease(leased.id, session, namespace.name, len(run), leased.expires)

    def take(self, lease_id: bytes) -> None:
        leased = self._leases.get(lease_id)
        if leased is not None:
            self._unoffer(leased)

    def release(self, lease_id: bytes) -> None:
        leased = self._leases.pop(lease_id, None)
        if leased is not None:
            del self._lease_of[leased.session]
            self._unoffer(leased)
            self._chunks.release(leased.rows, touch=True)

    def pin(  # noqa: PLR0913
        self, lease_id: bytes, engine: str, namespace: bytes, worker: int, shard: int, start: int, count: int
    ) -> Pin:
        leased = self._leases.get(lease_id)
        if leased is None or leased.session[0] != engine:
            raise Gone("no such lease")
        if leased.namespace.replaced:
            raise Gone("the lease's namespace was reset")
        if leased.namespace.name != namespace:
            raise Gone("the engine's layout is not the one that was leased")
        if not 0 <= shard < leased.namespace.shards:
            raise Misuse(f"shard is {shard}: the namespace has {leased.namespace.shards}")
        if start < 0 or count < 1 or start + count > len(leased.rows):
            raise Misuse(f"start is {start} and count is {count}: the lease has {len(leased.rows)} chunks")
        rows = leased.rows[start : start + count]
        self._chunks.retain(rows)
        pin_id = self._new_id()
        self._pins[pin_id] = _PinRecord(worker, leased.namespace, rows)
        self._pins_of.setdefault(worker, set()).add(pin_id)
        first, offset = leased.namespace.starts[shard], self._chunks.rows.offset
        return Pin(pin_id, tuple([offset[row] + first for row in rows]), leased.namespace.lengths[shard])

    def unpin(self, pin_id: bytes, worker: int) -> bool:
        pinned = self._pins.get(pin_id)
        if pinned is None or pinned.worker != worker:
            return False
        del self._pins[pin_id]
        mine = self._pins_of[worker]
        mine.remove(pin_id)
        if not mine:
            del self._pins_of[worker]
        self._chunks.release(pinned.rows, touch=False)
        return not pinned.namespace.replaced

    def is_valid(self, pin_id: bytes) -> bool:
        pinned = self._pins.get(pin_id)
        return pinned is not None and not pinned.namespace.replaced

    def hold(self, key: ChunkKey) -> Hold | None:
        chunks, namespace = self._chunks, self._chunks.namespaces.get(key.namespace)
        if namespace is None or not chunks.match(namespace, (key.digest,)):
            return None
        row = namespace.find(key.digest)
        chunks.retain((row,))
        self._holds_made += 1
        self._holds[self._holds_made] = row
        above, offset = chunks.rows.parent[row], chunks.rows.offset[row]
        parent = chunks.rows.digest(above) if above else b"" if chunks.rows.first[row] else None
        offsets = tuple(offset + start for start in namespace.starts)
        return Hold(HoldNumber(self._holds_made), key, parent, offsets, namespace.lengths)

    def unhold(self, number: int) -> None:
        row = self._holds.pop(number, None)
        if row is not None:
            self._chunks.release((row,), touch=False)

    # --- ends -------------------------------------------------------------------------------------------------------

    def end_session(self, session: SessionKey) -> None:
        """End the session's lease, if it has one."""
        lease_id = self._lease_of.get(session)
        if lease_id is not None:
            self.release(lease_id)

    def lose_worker(self, worker: int) -> None:
        for pin_id in list(self._pins_of.get(worker, ())):
            self.unpin(pin_id, worker)

    def expire(self, now: float) -> float:
        room = EXPIRED_AT_ONCE
        while self._leases:
            leased = next(iter(self._leases.values()))
            if leased.expires > now or room <= 0:
                return leased.expires  # that has passed, if there are more to be ended now
            room -= len(leased.rows)
            self._counted["leases_expired"] += 1
            self.release(leased.id)
        return inf

    def held(self) -> dict[str, int]:
        return {
            "leases": len(self._leases),
            "leases_offered": self._offered,
            "pins": len(self._pins),
            "holds": len(self._holds),
        }

    def _unoffer(self, leased: _Leased) -> None:
        if leased.offered:
            leased.offered = False
            self._offered -= 1
            self._chunks.unoffer(leased.rows)
