"""The recovery of a disk tier: reads its index file into the chunk table when the tier is opened.

A million rows take a while, so most of them are read in the background. The chunk table answers for the rows that were
read, a query to the index file for the others. A query waits for one page of the recovery at most. Until its end the
tier stores, evicts and deletes nothing.
"""

import logging
from collections import Counter
from collections.abc import Sequence

import trio

from lmcache_trio.abc import ChunkKey
from lmcache_trio.errors import Unavailable
from lmcache_trio_backends.disk.chunk_table import ChunkTable
from lmcache_trio_backends.disk.files import Files
from lmcache_trio_backends.disk.io_threads import IOThreads
from lmcache_trio_backends.disk.records import Read, Row, name_of

__all__ = ["PAGE_ROWS", "SMALL", "Recovery"]

log = logging.getLogger("lmcache_trio.disk")

PAGE_ROWS = 400
"""Rows read at a time: some 2 ms, which is the longest that a query waits."""
SMALL = 1 << 20
"""The largest index, in bytes, that is read before the tier is open: some 5,000 rows, 80 ms."""


class Recovery:
    """Sets `under_way` when the tier may be used, and `ready` at its end or when the index file failed.

    It drops damaged rows, and counts them in *counts* as `corrupt`.
    """

    def __init__(self, table: ChunkTable, files: Files, threads: IOThreads, counts: "Counter[str]") -> None:
        self._table = table
        self._files = files
        self._threads = threads
        self._counts = counts
        self._read_to = b""  # names up to this one are in the table
        self._all_read = False
        self.ready = trio.Event()
        self.under_way = trio.Event()
        self.suspects: list[Read] = []
        """Chunks that failed verification before the end of the recovery."""

    async def run(self) -> None:
        """Read the index file in small steps."""
        try:
            await self._read()
            await self._threads.ask(self._files.index.check)
            order = await self._threads.run(self._table.order)
            slabs = self._files.slabs
            for _ in self._table.rebuild(slabs.taken, order, slabs.lost):
                await trio.lowlevel.checkpoint()
            for namespace in self._table.take_erased():
                await self._threads.ask(self._files.index.all_erased, namespace)
            for read in self.suspects:
                self._table.quarantine(read)
        except Unavailable as exc:
            log.warning("%s", exc)  # each call of the tier raises the same
        if damaged := self._files.index.damaged + self._table.overlaid:
            log.warning("%s: %d rows were damaged and are dropped", self._files.index.path, damaged)
            self._counts["corrupt"] += damaged
        self._log_lost()
        self.ready.set()
        self.under_way.set()

    def _log_lost(self) -> None:
        lost, damage = self._table.lost, self._files.slabs.damage
        self._counts["lost_slabs"] += lost
        if lost or damage:
            shown = "; ".join(damage[:5]) + ("; …" if len(damage) > 5 else "")
            log.warning(
                "%s: %d chunks are lost with their slabs (%s), %d are still there",
                self._files.index.path.parent,
                lost,
                shown or f"they have {self._files.slabs.taken} bytes now",
                self._table.statistics()["chunks"],
            )

    async def query(self, keys: Sequence[ChunkKey]) -> dict[bytes, Row]:
        """The index file's rows, by name, for those of *keys* that were not read into the table yet."""
        names = [] if self._all_read else [name for name in map(name_of, keys) if name > self._read_to]
        if not names:
            await trio.lowlevel.checkpoint()
            return {}
        rows = await self._threads.ask(self._files.index.find, names)
        return {row.name: row for row in rows if not self._table.is_dead(row)}

    async def _read(self) -> None:
        index = self._files.index
        for namespace, generation in await self._threads.ask(index.forgotten):
            self._table.bury(namespace, generation)
        if await self._threads.ask(index.size) > SMALL:
            self.under_way.set()
        while page := await self._threads.ask(index.page, self._read_to, PAGE_ROWS):
            self._table.restore(page)
            self._read_to = page[-1].name
        self._all_read = True
