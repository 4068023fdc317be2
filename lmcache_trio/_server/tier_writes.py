"""What is changed in one tier: chunks written back to it, and namespaces deleted. One call at a time, in this order.

A deletion therefore comes after every write that began before it, and before every one that was offered after it. One
that could not be done, because the tier is fenced, is remembered and done before the tier is opened again.

A chunk that was not written, because the tier refused it or there was no time, is offered again when it is used.
"""

from collections.abc import Callable, Sequence

import attrs
import trio

from lmcache_trio._core.index import Hold, Index
from lmcache_trio._core.keys import ChunkKey
from lmcache_trio._core.writeback import Writeback
from lmcache_trio._server.tier_calls import Calls
from lmcache_trio.abc import Memory, Record, Tier
from lmcache_trio.errors import Unavailable

__all__ = ["Deletion", "Writing"]

BATCH_BYTES = 32 << 20
"""Written by one call: 5 s of a disk that writes 6 MB/s, so that a slow one is not taken for one that hangs."""
MOST_UNWRITTEN = 50_000
"""Chunks remembered as not written, by 8 bytes each; the oldest are forgotten, and then offered no more."""
DELETE_PATIENCE = 10
"""A deletion may take so many times as long as another call: it may concern a million chunks."""


@attrs.define(eq=False)
class Deletion:
    """*known* is set when it is *done*, or when the tier is fenced and it is only remembered."""

    namespace: bytes
    done: bool = False
    known: trio.Event = attrs.field(factory=trio.Event)


class Writing:
    """One tier's. *limit* says how many bytes may be queued and being written."""

    def __init__(self, calls: Calls, tier: Tier, index: Index, memory: Memory, patience: float) -> None:
        self._calls = calls
        self._tier = tier
        self._index = index
        self._memory = memory
        self._delete_patience = patience * DELETE_PATIENCE
        self.limit: Callable[[], int] = lambda: 0
        self.queue = Writeback()
        self.deletions: list[Deletion] = []
        self._unwritten: dict[int, None] = {}
        self._stirred = trio.Event()
        self._idle = trio.Event()
        self.stored = 0
        self.refused = 0
        self.dropped_fenced = 0
        self.bytes_stored = 0

    def offer(self, key: ChunkKey) -> None:
        """Write the chunk back when its turn comes. Never waits; what is too much is dropped."""
        if not self._calls.open:
            self.dropped_fenced += 1
            self._remember(key)
            return
        hold = self._index.hold(key)
        if hold is not None:
            for dropped in self.queue.offer(hold, self.limit()):
                self._index.unhold(dropped)
                if dropped.key != key or not self.queue.has(key):
                    self._remember(dropped.key)
            self._stirred.set()

    def used(self, namespace: bytes, digests: Sequence[bytes]) -> None:
        """Offer those of them again that were not written. Costs nothing where all were."""
        if self._unwritten and self._calls.open:
            for digest in digests:
                mark = hash((namespace, digest))
                if mark in self._unwritten:
                    del self._unwritten[mark]
                    self.offer(ChunkKey(namespace, digest))

    def forget(self, namespace: bytes) -> Deletion:
        """Delete *namespace* from the tier, and write nothing of it that was offered before."""
        deletion = Deletion(namespace)
        self.deletions.append(deletion)
        for hold in self.queue.forget(namespace):
            self._index.unhold(hold)
        if not self._calls.open:
            deletion.known.set()
        self._stirred.set()
        return deletion

    def is_deleting(self, namespace: bytes) -> bool:
        """Whether the tier may still have chunks of *namespace* that are not to be served."""
        return any(deletion.namespace == namespace for deletion in self.deletions)

    def give_up(self) -> None:
        """The tier takes nothing now: let go of what is queued; deletions are remembered."""
        for hold in self.queue.clear():
            self._index.unhold(hold)
            self._remember(hold.key)
        for deletion in self.deletions:
            deletion.known.set()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Until all is written that was offered, or the tier is fenced."""
        while self._calls.open and not (self.queue.idle and not self.deletions):
            self._idle = trio.Event()
            await self._idle.wait()

    async def run(self) -> None:
        """Write and delete, until the tier is fenced."""
        try:
            while True:
                self._stirred = trio.Event()
                while self.deletions:
                    await self._calls.make(self.delete_one, patience=self._delete_patience)
                holds = self.queue.take(BATCH_BYTES)
                if holds:
                    await self._store(holds)
                else:
                    self._idle.set()
                    await self._stirred.wait()
        except Unavailable:
            return

    async def delete_one(self) -> None:
        """Carry out the oldest deletion, and those of the same namespace that were asked for before it began."""
        namespace = self.deletions[0].namespace
        mine = [deletion for deletion in self.deletions if deletion.namespace == namespace]
        await self._tier.delete(namespace)
        self.deletions = [deletion for deletion in self.deletions if deletion not in mine]
        for deletion in mine:
            deletion.done = True
            deletion.known.set()

    async def _store(self, holds: Sequence[Hold]) -> None:
        records = [self._record(hold) for hold in holds]
        try:
            taken = await self._calls.make(self._tier.store, records)
            for hold, is_taken in zip(holds, taken, strict=True):
                self.stored += bool(is_taken)
                self.refused += not is_taken
                if not is_taken:
                    self._remember(hold.key)
                self.bytes_stored += sum(hold.lengths) if is_taken else 0
        finally:
            for hold in holds:
                self.queue.written(hold)
                self._index.unhold(hold)

    def _record(self, hold: Hold) -> Record:
        """A parent that is not known any more is written as none: it is a hint for the order of eviction alone."""
        places = zip(hold.offsets, hold.lengths, strict=True)
        return Record(hold.key, hold.parent or b"", [self._memory.view(*place) for place in places])

    def _remember(self, key: ChunkKey) -> None:
        self._unwritten[hash((key.namespace, key.digest))] = None
        if len(self._unwritten) > MOST_UNWRITTEN:
            del self._unwritten[next(iter(self._unwritten))]
