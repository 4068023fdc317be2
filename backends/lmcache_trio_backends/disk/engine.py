"""The engine of the disk tier: its calls, the room that they need, and the task that keeps house.

`chunk_table` makes each decision, and `io_threads` each wait for a thread. This module joins the two in the order that
survives a kill: bytes are written before their row, and a row is erased before its bytes are given to another chunk.
docs/reference/disk-tier.md says how the bytes lie, what each durability level promises, and what each kind of failure
does.

It refuses to share its directory, to grow beyond its size, and to guess: bytes that fail their checksum are dropped.
"""

import errno
import functools
import logging
import math
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio

from lmcache_trio.abc import Arena, ByteIO, ChunkKey, Load, LocalTier, Record
from lmcache_trio.errors import ConfigError, Unavailable
from lmcache_trio.threads import offload
from lmcache_trio_backends.disk.admission import make_admission
from lmcache_trio_backends.disk.chunk_table import ChunkTable, Refusal
from lmcache_trio_backends.disk.config import Budget, DiskConfig, failure_of, usable_size
from lmcache_trio_backends.disk.files import Files
from lmcache_trio_backends.disk.home import Home
from lmcache_trio_backends.disk.index_file import Full
from lmcache_trio_backends.disk.io_threads import DIRECT_PIECES, IOThreads, SlabTransfer
from lmcache_trio_backends.disk.records import Read, Write, extent_of, name_of
from lmcache_trio_backends.disk.recovery import Recovery
from lmcache_trio_backends.disk.slabs import NO_SPACE

__all__ = ["FLUSH_SECONDS", "DiskTier"]

log = logging.getLogger("lmcache_trio.disk")

FLUSH_SECONDS = 5.0
"""How long recency, and with `periodic` the bytes themselves, may wait for the disk; ext4 commits as often."""
CONTAINS_KEYS = 2000
"""Keys looked up between two turns of the loop: about 1 ms."""
DELETE_BATCHES = 40
"""Batches erased inside `delete` itself, 10,000 chunks; the rest is erased in the background: it is durable already."""
GROUP_BYTES = 64 << 20
"""Bytes written before their rows are published: what a cancelled or killed store loses at most."""
CLOSE_SECONDS = 5.0
COUNTS = (
    *("hits", "misses", "stored", "evicted", "disk_full"),
    *("corrupt", "lost_slabs", "lost_index", "lost_changes"),
    *("dropped_admission", "dropped_no_space", "dropped_not_ready", "dropped_size", "dropped_writing"),
)


class DiskTier(LocalTier):
    """Chunks on one disk. Every call but `statistics` is made inside `open()`, and ends there."""

    Config = DiskConfig

    def __init__(self, config: DiskConfig) -> None:
        super().__init__(config)
        self.wrap_io: Callable[[ByteIO], ByteIO] = lambda io: io
        """Stands between the tier and its slabs from the next `open()` on: for fault injection below the checksums."""
        self._home = Home(config.path)
        self._admit = make_admission(config.admission)
        self._pieces = DIRECT_PIECES if config.direct else 1
        self._counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
        self._was_open = self._is_open = self._anew = False
        self._begin(config)

    def _begin(self, config: DiskConfig) -> None:
        """Forget the last opening: all parts are made again, and nothing is open yet."""
        budget = Budget.of(config.size)
        self._table = ChunkTable(Arena(), capacity=budget.slabs, index_room=budget.index)
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

        ConfigError for a setting that does not fit this machine, at the first time; after that, whatever is wrong is
        `Unavailable`, because it may pass.
        """
        self._anew = self._anew or self._threads.corrupt
        try:
            size = await offload(usable_size, self.config)
            self._begin(attrs.evolve(self.config, size=size))
            await self._open_files()
        except (OSError, ConfigError) as exc:
            raise self._refused(exc) from exc
        self._was_open, self._anew = True, False
        failure: Exception | None = None
        try:
            async with trio.open_nursery() as house:
                house.start_soon(self._recovery.run)
                house.start_soon(self._keep_house)
                await self._recovery.under_way.wait()
                self._is_open = True
                try:
                    yield
                except Exception as exc:  # noqa: BLE001 - raised again below: the nursery would wrap it in a group
                    failure = exc
                house.cancel_scope.cancel()
        finally:
            self._is_open = False
            await self._close()
        if failure is not None:
            raise failure

    async def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """Which of *keys* are published."""
        self._check()
        there: list[bool] = []
        for i in range(0, len(keys), CONTAINS_KEYS):
            some = keys[i : i + CONTAINS_KEYS]
            found = await self._recovery.query(some)
            there += [self._table.contains(key) or name_of(key) in found for key in some]
        return there

    async def load(self, loads: Sequence[Load]) -> list[bool]:
        """Read and verify; what fails is dropped from the disk and counted (`corrupt`)."""
        self._check()
        views = [[_flat(view) for view in load.shards] for load in loads]
        reads = await self._begin_reads(loads, [tuple(len(view) for view in some) for some in views])
        held = [(i, read) for i, read in enumerate(reads) if read is not None]
        transfer = SlabTransfer([(read.offset, views[i]) for i, read in held], self._io.read, self._pieces)
        try:
            await self._threads.carry(transfer)
        finally:
            alive = [self._table.end_read(read) or not self._ready.is_set() for _, read in held]
            if self._table.has_doomed:
                self._wake.set()
        if transfer.error is not None:
            if transfer.error.errno == errno.EIO:  # a bad sector must not fence the tier again each time it is back
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
        """Write, evicting what was least recently used; True once a restart would find it."""
        self._check()
        taken = [False] * len(records)
        if not self._ready.is_set():
            self._counts["dropped_not_ready"] += len(records)
            await trio.lowlevel.checkpoint()
            return taken
        group: dict[int, list[memoryview]] = {}
        size = 0
        for i, record in enumerate(records):
            group[i] = [_flat(view) for view in record.shards]
            size += sum(map(len, group[i]))
            if size >= GROUP_BYTES or len(group) == self._index.batch or i == len(records) - 1:
                await self._store_group(records, group, taken)
                group, size = {}, 0
        return taken

    async def delete(self, namespace: bytes) -> None:
        """Forget every chunk of *namespace*; when it returns, for good."""
        self._check()
        await self._ready.wait()
        self._check()
        generation = self._table.forget(namespace)
        with trio.CancelScope(shield=True):
            await self._threads.ask(self._index.forget, namespace, generation)
        self._wake.set()  # `_keep_house` goes on with the rest, also when this call is cancelled
        for _ in range(DELETE_BATCHES):
            if not await self._erase_batch():
                break

    def statistics(self) -> dict[str, int | str]:
        """Held: `chunks`, `bytes_used`, `bytes_taken` by slabs, `ready` (0: the index is read). The rest is counted."""
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
        """Unavailable while it is not open, and once its index file or a flush has failed."""
        if not self._is_open:
            raise Unavailable(f"the disk tier in {self.config.path!r} is not open")
        if self._threads.failed is not None:
            raise Unavailable(str(self._threads.failed))

    # ---- loading

    async def _begin_reads(self, loads: Sequence[Load], lengths: Sequence[tuple[int, ...]]) -> list[Read | None]:
        rows = {} if self._ready.is_set() else await self._recovery.query([load.key for load in loads])
        reads: list[Read | None] = []
        for load, n in zip(loads, lengths, strict=True):
            row = rows.get(name_of(load.key))
            if row is None or self._ready.is_set():
                reads.append(self._table.begin_read(load.key, n))
            elif row.lengths == n:
                reads.append(Read(load.key, -1, row.offset, row.generation, n, row.sums))
            else:
                reads.append(None)
        return reads

    def _suspect(self, read: Read) -> None:
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

    async def _store_group(
        self, records: Sequence[Record], group: dict[int, list[memoryview]], taken: list[bool]
    ) -> None:
        """Store those of *records* that stand in *group*, with their buffers: bytes first, then all rows at once."""
        writes: dict[int, Write] = {}
        try:
            for i, views in group.items():
                found = await self._make_room(records[i], tuple(map(len, views)))
                if isinstance(found, Write):
                    writes[i] = found
                elif found is Refusal.PUBLISHED:
                    taken[i] = True
                else:
                    self._counts[f"dropped_{found.value}"] += 1
            if not writes:
                await trio.lowlevel.checkpoint()
                return
            chunks = [(write.row.offset, group[i]) for i, write in writes.items()]
            transfer = SlabTransfer(chunks, self._io.write, self._pieces)
            await self._threads.carry(transfer)
            if transfer.error is not None and transfer.error.errno in NO_SPACE:
                self._drop_full(len(writes))  # a disk that writes elsewhere each time, in spite of fallocate
                return
            if transfer.error is not None:
                raise self._threads.unavailable(transfer.error) from transfer.error
            with trio.CancelScope(shield=True):
                await self._publish(writes, transfer, taken)
        finally:
            for write in writes.values():
                self._table.abort(write)
            if self._table.has_doomed:
                self._wake.set()

    async def _publish(self, writes: dict[int, Write], transfer: SlabTransfer, taken: list[bool]) -> None:
        """Rows into the index file, then into the table. What is published, or may be, leaves *writes*."""
        if self.config.durability == "power":
            await self._threads.flush(self._slabs.flush)
        sums = {i: transfer.sums_of(n) for n, i in enumerate(writes)}
        whole = [(i, writes.pop(i), found) for i, found in sums.items() if found is not None]
        try:
            await self._threads.ask(self._index.publish, [write.row._replace(sums=found) for _, write, found in whole])
        except Full:
            writes.update((i, write) for i, write, _ in whole)
            self._drop_full(len(whole))
            freed = self._table.evict(sum(extent_of(write.row.lengths) for _, write, _ in whole))
            self._counts["evicted"] += freed  # the next stores take their pages
            return
        for i, write, found in whole:
            taken[i] = self._table.publish(write, found)
            self._counts["stored"] += taken[i]
        self._unflushed = True
        self._expect_flush()

    async def _make_room(self, record: Record, lengths: tuple[int, ...]) -> Write | Refusal:
        """An extent for *record*: in a hole, in a new slab, or in place of what was least recently used; or why not."""
        table = self._table
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
        """Take another slab, or a part of one. Whether there is one."""
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

    def _drop_full(self, count: int) -> None:
        self._counts["dropped_no_space"] += count
        self._note_full()

    def _note_full(self) -> None:
        """The file system has no room, which is capacity reached. One line tells when it begins, one when it ends."""
        self._counts["disk_full"] += 1
        if not self._is_full:
            self._is_full = True
            text = "the disk of %s has no space: %d of %d bytes are used, and chunks evict each other within them"
            log.warning(text, self._index.path.parent, self._slabs.taken, self._slabs.capacity)

    # ---- keeping house

    async def _keep_house(self) -> None:
        """Erase what is doomed as it comes; write recency, and flush, when it is due. A failure fails the tier."""
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
            log.warning("%s", self._threads.fail(exc))  # nobody awaits this task: the next call raises it

    async def _erase_batch(self) -> bool:
        """Erase a batch of the doomed rows that nobody holds, so that their bytes are free. Whether there were any.

        One batch: a store that needs room for one chunk does not wait for the end of a whole namespace.
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
        self._tell_failed()
        while touched := self._table.take_touched(self._index.batch):
            await self._threads.ask(self._index.touch, touched)
        if self.config.durability == "periodic" and self._unflushed:
            self._unflushed = False
            await self._threads.flush(self._slabs.flush)
            await self._threads.ask(self._index.checkpoint)

    def _tell_failed(self) -> None:
        """One line for all that failed since the first of them, which had its own."""
        if self._failed > 1:
            log.warning("%d more chunks of %s failed verification and are dropped", self._failed - 1, self.config.path)
        self._failed = 0

    # ---- opening and closing

    async def _open_files(self) -> None:
        """Open everything; where the index was found corrupt, begin empty."""
        try:
            await self._threads.index_thread.run(self._files.open, self._anew)
        except sqlite3.Error as exc:
            await self._close()
            raise failure_of(self.config.path, exc) from exc
        except BaseException:
            await self._close()
            raise
        self._io = self.wrap_io(self._slabs)
        self._counts["lost_index"] += self._files.index_lost
        self._counts["lost_changes"] += self._files.lost_changes

    async def _close(self) -> None:
        """Write what is owed and close; a disk that hangs is left behind after 5 s, still locked by this process."""
        self._tell_failed()
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

    def _refused(self, exc: OSError | ConfigError) -> ConfigError | Unavailable:
        """Why it can't be opened, or, once it was open, can't be now."""
        failure = exc if isinstance(exc, ConfigError) else failure_of(self.config.path, exc)
        if isinstance(failure, ConfigError) and self._was_open:
            return Unavailable(f"the disk tier in {self.config.path!r}: {failure}")
        return failure


def _flat(view: memoryview) -> memoryview:
    """*view* as bytes."""
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")
