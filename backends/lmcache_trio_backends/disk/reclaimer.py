"""Where the disk tier finds room: growth slab by slab, eviction, and the end of what was evicted.

It does what `directory` decided, in the order that survives a kill: a row is gone before its bytes are free.
"""

import logging
import math
from collections import Counter
from collections.abc import Sequence

import trio

from lmcache_trio.abc import ChunkKey
from lmcache_trio_backends.disk.directory import Directory
from lmcache_trio_backends.disk.files import Files
from lmcache_trio_backends.disk.io_threads import Worker
from lmcache_trio_backends.disk.records import Write, extent_of

__all__ = ["Room"]

log = logging.getLogger("lmcache_trio.disk")


class Room:
    """Room in the slabs of one open tier. Evictions are counted in *counts*."""

    def __init__(self, directory: Directory, files: Files, worker: Worker, counts: "Counter[str]") -> None:
        self._directory = directory
        self._files = files
        self._worker = worker
        self._counts = counts
        self._is_full = False
        self._growing = trio.Lock()
        self._settling = trio.Lock()

    async def make(self, key: ChunkKey, parent: bytes, lengths: Sequence[int]) -> Write | str:
        """A range for *key*: in a hole, in a new slab, or in place of what was least recently used; else why not."""
        directory = self._directory
        while not directory.knows(key):
            if (write := directory.reserve(key, parent, lengths)) is not None:
                return write
            if directory.has_index_room(len(lengths)) and await self._grow():
                continue
            evicted = directory.evict(extent_of(lengths))
            if not evicted and directory.searching:
                await trio.lowlevel.checkpoint()
                continue
            if not evicted and not directory.has_doomed and not self._settling.locked():
                return "no_space"
            self._counts["evicted"] += evicted
            await self._settle_some()
        return "writing"

    async def _grow(self) -> bool:
        before = self._files.slabs.taken
        async with self._growing:
            if self._files.slabs.taken > before:
                return True  # another did
            if before >= self._files.slabs.capacity:
                return False
            with trio.CancelScope(shield=True):
                taken = await self._worker.run(self._files.grow)
                self._directory.grow(taken)
        self._tell(is_full=taken == before)
        return taken > before

    def note_full(self) -> None:
        """The disk had no space for a write, or for the index."""
        self._tell(is_full=True)

    def _tell(self, *, is_full: bool) -> None:
        """The file system has no room: that is capacity reached. One line when that begins, and one when it ends."""
        slabs = self._files.slabs
        self._counts["disk_full"] += is_full
        if is_full and not self._is_full:
            text = "the disk of %s has no space: %d of %d bytes are used, and chunks evict each other within them"
            log.warning(text, self._files.index.path.parent, slabs.taken, slabs.capacity)
        elif self._is_full and not is_full:
            log.info("the disk of %s has space again: %d bytes are used", self._files.index.path.parent, slabs.taken)
        self._is_full = is_full

    async def settle(self, batches: float = math.inf) -> None:
        """Erase what is doomed and held by nobody, at most *batches* of it, so that its bytes are free."""
        while batches > 0 and await self._settle_some():
            batches -= 1

    async def _settle_some(self) -> bool:
        """One batch, so that who needs room for one chunk does not wait for the end of a whole namespace."""
        async with self._settling:
            doomed = self._directory.take_doomed(self._files.index.batch)
            if doomed:
                with trio.CancelScope(shield=True):
                    await self._worker.ask(self._files.index.erase, doomed)
                    self._directory.erased(doomed)
            return bool(doomed)
