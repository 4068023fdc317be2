"""Writes to one tier: chunks are written back, and namespaces deleted, one call at a time.

A deletion comes after every write that began before it, and before every chunk that is offered after it. A deletion
that a fenced tier cannot carry out is remembered, and carried out before the tier is opened again.

A chunk that was not written, because the tier refused it or could not keep up, is offered again when it is used.
"""

from collections.abc import Sequence

import attrs
import trio

from lmcache_trio._core.index.index import Hold, Index
from lmcache_trio._core.keys import ChunkKey
from lmcache_trio._core.tiers.writeback import Writeback
from lmcache_trio._server.tiers.calls import GuardedCalls
from lmcache_trio.abc import Memory, Record, Tier
from lmcache_trio.config import Config
from lmcache_trio.errors import Unavailable

__all__ = ["Deletion", "TierWriter"]

BATCH_BYTES = 32 << 20
"""Bytes in one call. A disk that writes 6 MB/s takes 5 s for them, so a slow disk does not count as hung."""
WRITEBACK_SHARE = 0.5
"""The largest share of the arena that is queued for a tier: a small arena must keep room for the next stores."""
MOST_UNWRITTEN = 50_000
"""Chunks remembered as not written, at 8 bytes each; the oldest are forgotten, and not offered again."""
DELETE_PATIENCE = 10
"""A deletion may take this many times as long as another call: it may concern a million chunks."""


@attrs.define(eq=False)
class Deletion:
    """*known* is set when the tier has deleted (*done*), or is fenced: then the deletion is only remembered."""

    namespace: bytes
    done: bool = False
    known: trio.Event = attrs.field(factory=trio.Event)


class TierWriter:
    """Writes to *tier*, and remembers the deletions that *tier* still owes."""

    def __init__(self, calls: GuardedCalls, tier: Tier, index: Index, memory: Memory, config: Config) -> None:
        self._calls = calls
        self._tier = tier
        self._index = index
        self._memory = memory
        self._delete_patience = config.tier_timeout * DELETE_PATIENCE
        self._most_bytes = config.writeback_bytes
        self.queue = Writeback()
        self.deletions: list[Deletion] = []
        self.unwritten: dict[int, None] = {}
        """Chunks that were offered and not written, by the hash of their names."""
        self._stirred = trio.Event()
        self._idle = trio.Event()
        self.stored = 0
        self.refused = 0
        self.dropped_fenced = 0
        self.bytes_stored = 0
        calls.when_fenced.append(self.give_up)

    def offer(self, keys: Sequence[ChunkKey]) -> None:
        """Queue the chunks *keys* to be written back. Never waits: chunks beyond the limit are dropped."""
        if not self._calls.open:
            self.dropped_fenced += len(keys)
            for key in keys:
                self._remember(key)
            return
        most = min(self._most_bytes, int(self._index.arena.taken * WRITEBACK_SHARE))
        for key in keys:
            hold = self._index.hold(key)
            if hold is None:
                continue  # it was evicted or reset meanwhile
            for dropped in self.queue.offer(hold, most):
                self._index.unhold(dropped)
                if dropped.key != key or not self.queue.has(key):
                    self._remember(dropped.key)
        self._stirred.set()

    def used(self, namespace: bytes, digests: Sequence[bytes]) -> None:
        """Offer again those of *digests* that are `unwritten`."""
        if self._calls.open:
            for digest in digests:
                mark = hash((namespace, digest))
                if mark in self.unwritten:
                    del self.unwritten[mark]
                    self.offer([ChunkKey(namespace, digest)])

    def forget(self, namespace: bytes) -> Deletion:
        """Delete *namespace* from the tier. Its chunks that are queued are not written."""
        waiting = () if self._calls.open else self.deletions  # of a tier that stores nothing meanwhile
        deletion = next((each for each in waiting if each.namespace == namespace), None)
        if deletion is None:
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
        """The tier is fenced: release the queued chunks, and remember the deletions."""
        for hold in self.queue.clear():
            self._index.unhold(hold)
            self._remember(hold.key)
        for deletion in self.deletions:
            deletion.known.set()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until every chunk that was offered is written, or the tier is fenced."""
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
        """Carry out the oldest deletion, and with it the others of its namespace that came before it began."""
        namespace = self.deletions[0].namespace
        mine = [deletion for deletion in self.deletions if deletion.namespace == namespace]
        await self._tier.delete(namespace)
        self.deletions = [deletion for deletion in self.deletions if deletion not in mine]
        for deletion in mine:
            deletion.done = True
            deletion.known.set()

    async def _store(self, holds: Sequence[Hold]) -> None:
        records = []
        for hold in holds:
            views = [self._memory.view(*place) for place in zip(hold.offsets, hold.lengths, strict=True)]
            # A parent that the index has forgotten is written as none: it is only a hint for the order of eviction.
            records.append(Record(hold.key, hold.parent or b"", views))
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

    def _remember(self, key: ChunkKey) -> None:
        self.unwritten[hash((key.namespace, key.digest))] = None
        if len(self.unwritten) > MOST_UNWRITTEN:
            del self.unwritten[next(iter(self.unwritten))]
