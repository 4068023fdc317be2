"""One `reserve`, digest by digest: which chunk gets a slot, and for what reason another gets none.

Reasons: `present` (READY already), `writing` (by another engine, or this shard is claimed), `no_space` (nothing more
can be evicted), `orphan` (the parent is not there, or another engine is still writing it), `too_large` (for the arena),
`share` (the engine is writing as much as one engine may at one time).
Present and claimed chunks are passed over; once any other gets no slot, those behind it get none either, for the
same reason.
"""

from lmcache_trio._core.index.chunks import Chunks, Writing
from lmcache_trio._core.index.generations import Namespace, State
from lmcache_trio._core.index.grants import Slot

__all__ = ["REASONS", "Asking"]

REASONS = ("present", "writing", "no_space", "orphan", "too_large", "share")

_READY = int(State.READY)


class Asking:
    """What was given so far (*rows*, *slots*) and what was not (*dropped*, by reason)."""

    __slots__ = (
        "_above",
        "_chunks",
        "_shard",
        "_stopped",
        "deadline",
        "dropped",
        "engine",
        "namespace",
        "rows",
        "slots",
    )

    def __init__(self, chunks: Chunks, namespace: Namespace, engine: str, shard: int, deadline: float) -> None:
        self._chunks = chunks
        self.namespace = namespace
        self.engine = engine
        self._shard = shard
        self.deadline = deadline
        self._above = 0
        self._stopped = ""
        self.rows: list[int] = []
        self.slots: list[Slot] = []
        self.dropped: dict[str, int] = {}

    def follow(self, parent: bytes) -> None:
        """The first digest's parent; empty: it is a chain's first."""
        if not parent:
            return
        row = self.namespace.find(parent)
        if row and (self._chunks.rows.state[row] == _READY or self._is_ours(row)):
            self._above = row
        else:
            self._stopped = "orphan"

    def step(self, position: int, digest: bytes) -> None:
        """A slot for *digest*, or a reason."""
        chunks, row = self._chunks, self.namespace.find(digest)
        if row:
            if chunks.rows.state[row] == _READY:
                reason = "present"
            elif not self._is_ours(row):
                reason = "writing"
                self._stopped = self._stopped or "orphan"
            elif self._stopped:
                reason = self._stopped
            elif chunks.writing[row].claimed >> self._shard & 1:
                reason = "writing"
            else:
                self._give(position, row)
                return
            self._above = row
        elif self._stopped:
            reason = self._stopped
        elif self.namespace.extent > chunks.arena.capacity:
            reason = self._stopped = "too_large"
        elif not chunks.may_write(self.engine, self.namespace.extent):
            reason = self._stopped = "share"
        else:
            writing = Writing(self.engine, self.namespace.shards, self.deadline)
            row = chunks.begin(self.namespace, digest, self._above, writing)
            if row:
                self._give(position, row)
                return
            reason = self._stopped = "no_space"
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def claim_others(self) -> None:
        """The only chunk's other shards too: its slots then go by shard."""
        row = self.rows[0]
        for shard in range(1, self.namespace.shards):
            self.slots.append(Slot(shard, self._chunks.claim(row, self.namespace, shard, self.deadline)))

    def _give(self, position: int, row: int) -> None:
        self._above = row
        self.rows.append(row)
        self.slots.append(Slot(position, self._chunks.claim(row, self.namespace, self._shard, self.deadline)))

    def _is_ours(self, row: int) -> bool:
        return self._chunks.writing[row].engine == self.engine
