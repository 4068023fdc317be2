"""The engine of the disk tier: its calls, the room that they need, and its maintenance.

`chunk_table` makes each decision, and `io_threads` each wait for a thread. This module joins the two in the order that
survives a kill: bytes are written before their row, and a row is erased before its bytes are given to another chunk.
docs/reference/disk-tier.md says how the bytes lie, what each durability level promises, and what each kind of failure
does.

The tier never shares its directory, never grows beyond its size, and drops bytes that fail their checksum.
"""

import errno
import functools
import logging
import math
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar

import attrs
import trio

from lmcache_trio.abc import Arena, ByteIO, ChunkKey, Load, LocalTier, ObservedTier, Record
from lmcache_trio.errors import ConfigError, Unavailable
from lmcache_trio.threads import offload
from lmcache_trio_backends.disk.admission import make_admission
from lmcache_trio_backends.disk.chunk_table import ChunkTable, Refusal
from lmcache_trio_backends.disk.config import Budget, DiskConfig, failure_of, usable_size
from lmcache_trio_backends.disk.files import Files
from lmcache_trio_backends.disk.home import Home
from lmcache_trio_backends.disk.index_file import Full
from lmcache_trio_backends.disk.io_threads import DIRECT_PIECES, IOThreads, SlabTransfer
from lmcache_trio_backends.disk.records import Read, Write, extent_of, key_of, name_of
from lmcache_trio_backends.disk.recovery import Recovery
from lmcache_trio_backends.disk.slabs import NO_SPACE

__all__ = ["FLUSH_SECONDS", "DiskTier"]

log = logging.getLogger("lmcache_trio.disk")

FLUSH_SECONDS = 5.0
"""How long recency, and with `periodic` the chunks' bytes, may wait for the disk; ext4 commits as often."""
CONTAINS_KEYS = 2000
"""Keys looked up between two turns of the loop: about 1 ms."""
DELETE_BATCHES = 40
"""Batches erased inside `delete` itself, 10,000 chunks; the rest is erased in the background: it is durable already."""
GROUP_BYTES = 64 << 20
"""Bytes written before their rows are published: what a cancelled or killed store loses at most."""
CLOSE_SECONDS = 5.0
COUNTED = {
    "hits": ("chunks", "Chunks that were asked for and found."),
    "misses": ("chunks", "Chunks that were asked for and not found."),
    "stored": ("chunks", "Chunks that were written."),
    "evicted": ("chunks", "Chunks that were evicted."),
    "disk_full": ("times", "Times that the disk had no space for more."),
    "corrupt": ("chunks", "Chunks whose checksum was wrong. They were dropped."),
    "lost_slabs": ("chunks", "Chunks of slabs that were missing or too short."),
    "lost_index": ("times", "Times that the index was missing or damaged, and was begun anew."),
    "lost_changes": ("changes", "Changes of the index that were missing at a start."),
    "dropped_admission": ("chunks", "Chunks that were not taken, because `admission` asks for a second store."),
    "dropped_no_space": ("chunks", "Chunks without room: each chunk that could be evicted is being read or written."),
    "dropped_not_ready": ("chunks", "Chunks that came while the index was being read."),
    "dropped_size": ("chunks", "Chunks that are empty, larger than the tier, or of more than 256 shards."),
    "dropped_writing": ("chunks", "Chunks that another call was writing."),
}
COUNTS = tuple(COUNTED)


class DiskTier(LocalTier, ObservedTier):
    """Chunks on one disk. Every call but `statistics` is made inside `open()`, and ends there."""

    Config = DiskConfig
    figures: ClassVar[Mapping[str, tuple[str, str]]] = {
        **LocalTier.figures,
        "bytes_index_planned": ("bytes", "Bytes of the index that its records take."),
        "bytes_taken": ("bytes", "Bytes of the slabs that were made."),
        "ready": ("state", "1 once the index has been read, 0 before."),
        **COUNTED,
    }

    def __init__(self, config: DiskConfig) -> None:
        super().__init__(config)
        self.wrap_io: Callable[[ByteIO], ByteIO] = lambda io: io
        """Wraps the slabs at the next `open()`: for fault injection below the checksums."""
        self._home = Home(config.path)
        self._admit = make_admission(config.admission)
        self._pieces = DIRECT_PIECES if config.direct else 1
        self._counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
        self._was_open = self._is_open = self._anew = False
        self._begin(config)

    def _begin(self, config: DiskConfig) -> None:
        """Forget the last opening and make all parts again; nothing is open yet."""
        budget = Budget.of(config.size)
        self._table = ChunkTable(Arena(), capacity=budget.slabs, index_room=budget.index, left=self._tell_left)
        self._files = Files(config, budget, self._home)
        self._index, self._slabs = self._files.index, self._files.slabs
        self._threads = IOThreads(Path(config.path), config.threads, self._home.check)
        self._recovery = Recovery(self._table, self._files, self._threads, self._counts)
        self._ready = self._recovery.ready
        self._io: ByteIO = self._slabs
        self._wake = trio.Event()
        self._due = math.inf
        self._unflushed = False
        self._failed = 0  # chunks that failed verification since the last flush
        self._is_full = False
        self._growing, self._erasing = trio.Lock(), trio.Lock()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Lock the directory and read its index; a large one is read on in the background, while stores are dropped.

        ConfigError for a setting that does not fit this machine. Once the tier was open, each failure is `Unavailable`,
        because it may pass.
        """
        self._anew = self._anew or self._threads.corrupt
        try:
            size = await offload(usable_size, self.config)
            self._begin(attrs.evolve(self.config, size=size))
            await self._open_files()
        except (OSError, ConfigError, sqlite3.Error) as exc:
            failure = exc if isinstance(exc, ConfigError) else failure_of(self.config.path, exc)
            if isinstance(failure, ConfigError) and self._was_open:
                failure = self._threads.unavailable(failure)
            raise failure from exc
        self._was_open, self._anew = True, False
        raised: Exception | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._recovery.run)
                nursery.start_soon(self._maintain)
                await self._recovery.under_way.wait()
                self._is_open = True
                try:
                    yield
                except Exception as exc:  # noqa: BLE001 - raised again below: the nursery would wrap it in a group
                    raised = exc
                nursery.cancel_scope.cancel()
        finally:
            self._is_open = False
            await self._close()
        if raised is not None:
            raise raised

    async def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """Which of *keys* are published."""
        self._check()
        there: list[bool] = []
        for i in range(0, len(keys), CONTAINS_KEYS):
            some = keys[i : i + CONTAINS_KEYS]
            found = await self._recovery.query(some)
            in_table = [self._table.contains(key) for key in some]
            self._tell_came([key for key, is_there in zip(some, in_table, strict=True) if is_there])
            there += [is_there or name_of(key) in found for key, is_there in zip(some, in_table, strict=True)]
        return there

    async def load(self, loads: Sequence[Load]) -> list[bool]:
        """Read and verify; a chunk that fails is dropped from the disk and counted (`corrupt`)."""
        self._check()
        reads = await self._begin_reads(loads)
        held = [(i, read) for i, read in enumerate(reads) if read is not None]
        try:
            transfer = SlabTransfer([(read.offset, loads[i].shards) for i, read in held], self._io.read, self._pieces)
            await self._threads.carry(transfer)
        finally:
            alive = [self._table.end_read(read) or not self._ready.is_set() for _, read in held]
            if self._table.has_doomed:
                self._wake.set()
        if transfer.error is not None:
            if transfer.error.errno == errno.EIO:  # else a bad sector fences the tier at each load
                for n in transfer.failed_chunks:
                    self._suspect(held[n][1])
            raise self._threads.unavailable(transfer.error) from transfer.error
        hits = [False] * len(loads)
        for n, (i, read) in enumerate(held):
            if alive[n]:
                hits[i] = transfer.sums_of(n) == read.sums
                if hits[i]:
                    self._table.touch(read.key)
                else:
                    self._suspect(read)
        self._counts["hits"] += sum(hits)
        self._counts["misses"] += len(hits) - sum(hits)
        if any(hits):
            self._expect_flush()
        return hits

    async def store(self, records: Sequence[Record]) -> list[bool]:
        """Write, and evict the least recently used chunks for it; True once a restart would find the chunk."""
        self._check()
        if not self._ready.is_set():
            self._counts["dropped_not_ready"] += len(records)
            await trio.lowlevel.checkpoint()
            return [False] * len(records)
        taken: list[bool] = []
        group: list[Record] = []
        size = 0
        for record in records:
            group.append(record)
            size += sum(view.nbytes for view in record.shards)
            if size >= GROUP_BYTES or len(group) == self._index.batch or len(taken) + len(group) == len(records):
                taken += await self._store_group(group)
                group, size = [], 0
        return taken

    async def delete(self, namespace: bytes) -> None:
        """Forget every chunk of *namespace*; when it returns, for good."""
        self._check()
        await self._ready.wait()
        self._check()
        generation = self._table.forget(namespace)
        with trio.CancelScope(shield=True):
            await self._threads.ask(self._index.forget, namespace, generation)
        self._wake.set()  # `_maintain` goes on with the rest, also when this call is cancelled
        for _ in range(DELETE_BATCHES):
            if not await self._erase_batch():
                break

    def statistics(self) -> dict[str, int | str]:
        """Held: `chunks`, `bytes_used`, `bytes_taken` by slabs, `ready` (0: reading the index). Counted: `COUNTS`."""
        held: dict[str, int | str] = {"chunks": 0, "bytes_used": 0, "bytes_capacity": Budget.of(self.config.size).slabs}
        if self._is_open:
            held |= {
                **self._table.statistics(),
                "bytes_capacity": self._slabs.capacity,
                "bytes_taken": self._slabs.taken,
                "ready": int(self._ready.is_set()),
            }
        return held | {name: self._counts[name] for name in COUNTS}

    def _check(self) -> None:
        """Unavailable unless the tier is open, and once its index file or a flush has failed."""
        if not self._is_open:
            raise Unavailable(f"the disk tier in {self.config.path!r} is not open")
        if self._threads.failed is not None:
            raise Unavailable(str(self._threads.failed))

    def _tell_came(self, keys: Sequence[ChunkKey]) -> None:
        if keys and self.observer is not None:
            self.observer.came(keys)

    def _tell_left(self, key: ChunkKey) -> None:
        if self.observer is not None:
            self.observer.left([key])

    # ---- loading

    async def _begin_reads(self, loads: Sequence[Load]) -> list[Read | None]:
        """Where each chunk lies, held in place; None for one that is absent or of other lengths."""
        lengths = [tuple(view.nbytes for view in load.shards) for load in loads]
        rows = {} if self._ready.is_set() else await self._recovery.query([load.key for load in loads])
        reads: list[Read | None] = []
        for load, shards in zip(loads, lengths, strict=True):
            row = rows.get(name_of(load.key))
            if row is None or self._ready.is_set():
                reads.append(self._table.begin_read(load.key, shards))
            elif row.lengths == shards:
                reads.append(Read(load.key, -1, row.offset, row.generation, shards, row.sums))
            else:
                reads.append(None)
        return reads

    def _suspect(self, read: Read) -> None:
        """Drop a chunk that failed verification."""
        self._counts["corrupt"] += 1
        if not self._failed:
            what = read.key.digest.hex()[:16]
            log.warning("chunk %s of %s failed verification and is dropped", what, self.config.path)
            self._expect_flush()
        self._failed += 1
        if not self._ready.is_set():
            self._recovery.suspects.append(read)
        elif self._table.quarantine(read):
            self._wake.set()

    # ---- storing

    async def _store_group(self, records: Sequence[Record]) -> list[bool]:
        """Store *records*: bytes first, then all rows at once."""
        taken = [False] * len(records)
        writes: dict[int, Write] = {}
        try:
            for i, record in enumerate(records):
                found = await self._make_room(record)
                if isinstance(found, Write):
                    writes[i] = found
                elif found is Refusal.PUBLISHED:
                    taken[i] = True
                    self._tell_came([record.key])
                else:
                    self._counts[f"dropped_{found.value}"] += 1
            if not writes:
                await trio.lowlevel.checkpoint()
                return taken
            chunks = [(write.row.offset, records[i].shards) for i, write in writes.items()]
            transfer = SlabTransfer(chunks, self._io.write, self._pieces)
            await self._threads.carry(transfer)
            if transfer.error is not None and transfer.error.errno in NO_SPACE:
                self._note_full(len(writes))  # a disk that writes elsewhere each time, in spite of fallocate
            elif transfer.error is not None:
                raise self._threads.unavailable(transfer.error) from transfer.error
            else:
                with trio.CancelScope(shield=True):
                    await self._publish(writes, transfer, taken)
            return taken
        finally:
            for write in writes.values():
                self._table.abort(write)
            if self._table.has_doomed:
                self._wake.set()

    async def _publish(self, writes: dict[int, Write], transfer: SlabTransfer, taken: list[bool]) -> None:
        """Rows into the index file, then into the table. A write that is published, or may be, leaves *writes*."""
        if self.config.durability == "power":
            await self._threads.flush(self._slabs.flush)
        sums = {i: transfer.sums_of(n) for n, i in enumerate(writes)}
        whole = [(i, writes.pop(i), found) for i, found in sums.items() if found is not None]
        try:
            await self._threads.ask(self._index.publish, [write.row._replace(sums=found) for _, write, found in whole])
        except Full:
            writes.update((i, write) for i, write, _ in whole)
            self._note_full(len(whole))
            freed = self._table.evict(sum(extent_of(write.row.lengths) for _, write, _ in whole))
            self._counts["evicted"] += freed  # the next stores take their pages
            return
        for i, write, found in whole:
            taken[i] = self._table.publish(write, found)
            self._counts["stored"] += taken[i]
        self._tell_came([key_of(write.row.name) for i, write, _ in whole if taken[i]])
        self._unflushed = True
        self._expect_flush()

    async def _make_room(self, record: Record) -> Write | Refusal:
        """An extent for *record*: in a hole, in a new slab, or in place of the least recently used; or why not."""
        table = self._table
        lengths = tuple(view.nbytes for view in record.shards)
        found = table.reserve(record.key, record.parent, lengths, self._admit)
        while found is Refusal.NO_HOLE or found is Refusal.NO_INDEX_ROOM:
            if found is Refusal.NO_INDEX_ROOM or not await self._grow():
                evicted = table.evict(extent_of(lengths))
                self._counts["evicted"] += evicted
                if not evicted and table.searching:
                    await trio.lowlevel.checkpoint()
                elif evicted or table.has_doomed or self._erasing.locked():
                    await self._erase_batch()
                else:
                    return Refusal.NO_SPACE
            found = table.reserve(record.key, record.parent, lengths)
        return found

    async def _grow(self) -> bool:
        """Take another slab, or a part of one. False: the disk or the tier has no more room."""
        before = self._slabs.taken
        async with self._growing:
            if self._slabs.taken > before:
                return True  # another call did
            if before >= self._slabs.capacity:
                return False
            with trio.CancelScope(shield=True):
                taken = await self._threads.run(self._files.grow)
                self._table.grow(taken)
        if taken == before:
            self._note_full()
        elif self._is_full:
            self._is_full = False
            log.info("the disk of %s has space again: %d bytes are used", self._index.path.parent, taken)
        return taken > before

    def _note_full(self, dropped: int = 0) -> None:
        """The file system is full, so capacity is reached. The log says so when that begins, and when it ends."""
        self._counts["dropped_no_space"] += dropped
        self._counts["disk_full"] += 1
        if not self._is_full:
            self._is_full = True
            text = "the disk of %s has no space: %d of %d bytes are used, and chunks evict each other within them"
            log.warning(text, self._index.path.parent, self._slabs.taken, self._slabs.capacity)

    # ---- maintenance

    async def _maintain(self) -> None:
        """Erase doomed rows; write recency, and flush, when a flush is due. A failure fails the tier."""
        await self._ready.wait()
        try:
            while True:
                with trio.move_on_at(self._due):
                    await self._wake.wait()
                self._wake = trio.Event()
                while await self._erase_batch():
                    pass
                if trio.current_time() >= self._due:
                    self._due = math.inf
                    await self._flush()
        except Unavailable as exc:
            log.warning("%s", self._threads.fail(exc))  # the next call raises it

    async def _erase_batch(self) -> bool:
        """Erase a batch of doomed rows without holders, so that their bytes are free. False if there were none.

        One batch, because a store that needs room for one chunk must not wait for a whole namespace.
        """
        async with self._erasing:
            doomed = self._table.take_doomed(self._index.batch)
            if doomed:
                with trio.CancelScope(shield=True):
                    await self._threads.ask(self._index.erase, doomed)
                    self._table.erased(doomed)
            return bool(doomed)

    def _expect_flush(self) -> None:
        if self._due == math.inf:
            self._due = trio.current_time() + FLUSH_SECONDS
            self._wake.set()

    async def _flush(self) -> None:
        self._log_failed()
        while touched := self._table.take_touched(self._index.batch):
            await self._threads.ask(self._index.touch, touched)
        if self.config.durability == "periodic" and self._unflushed:
            self._unflushed = False
            await self._threads.flush(self._slabs.flush)
            await self._threads.ask(self._index.checkpoint)

    def _log_failed(self) -> None:
        """Log one line for all chunks that failed since the first one, which had a line of its own."""
        if self._failed > 1:
            log.warning("%d more chunks of %s failed verification and are dropped", self._failed - 1, self.config.path)
        self._failed = 0

    # ---- opening and closing

    async def _open_files(self) -> None:
        """Open all files; begin empty if the index was found corrupt."""
        try:
            await self._threads.index_thread.run(self._files.open, self._anew)
        except BaseException:
            await self._close()
            raise
        self._io = self.wrap_io(self._slabs)
        self._counts["lost_index"] += self._files.index_lost
        self._counts["lost_changes"] += self._files.lost_changes

    async def _close(self) -> None:
        """Write to the index what is due, and close. After 5 s a disk that hangs is left, locked by this process."""
        self._log_failed()
        owed: list[Callable[[], None]] = []
        if self._threads.failed is None and self._ready.is_set():
            while len(owed) < DELETE_BATCHES and (doomed := self._table.take_doomed(self._index.batch)):
                owed.append(functools.partial(self._index.erase, doomed))
            while touched := self._table.take_touched(self._index.batch):
                owed.append(functools.partial(self._index.touch, touched))
        flush = self._unflushed and self.config.durability == "periodic"
        close = functools.partial(self._files.close, owed, flush=flush)
        with trio.move_on_after(CLOSE_SECONDS, shield=True) as scope:
            try:
                await self._threads.index_thread.run_owned(close, on_return=lambda: None)
            except (OSError, sqlite3.Error) as exc:
                log.warning("closing %s: %s", self.config.path, exc)
        if scope.cancelled_caught:
            log.warning("closing %s has not ended after %g s: its disk hangs", self.config.path, CLOSE_SECONDS)
        self._threads.index_thread.close()
