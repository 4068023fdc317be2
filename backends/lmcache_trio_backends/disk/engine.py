"""The disk tier between one `open()` and its end: its calls, and the tasks that keep house.

Every decision is `directory`'s, every wait for a thread `io_threads`'s; this module joins the two in the order
that survives a kill: bytes before their row, a row's end before its bytes are given to another.
"""

import errno
import functools
import logging
import math
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from lmcache_trio.abc import Arena, ChunkKey, Load, Record
from lmcache_trio.errors import Unavailable
from lmcache_trio_backends.disk.admission import Admission
from lmcache_trio_backends.disk.config import Budget, DiskConfig, failure_of
from lmcache_trio_backends.disk.directory import Directory
from lmcache_trio_backends.disk.files import Files
from lmcache_trio_backends.disk.home import Home
from lmcache_trio_backends.disk.index_file import Full
from lmcache_trio_backends.disk.io_threads import Worker
from lmcache_trio_backends.disk.reclaimer import Room
from lmcache_trio_backends.disk.records import MAX_SHARDS, Read, Write, extent_of, name_of
from lmcache_trio_backends.disk.recovery import Reading
from lmcache_trio_backends.disk.slabs import NO_SPACE, ByteIO
from lmcache_trio_backends.disk.transfer import Transfer, flat

__all__ = ["FLUSH_SECONDS", "DiskLife"]

log = logging.getLogger("lmcache_trio.disk")

FLUSH_SECONDS = 5.0
"""How long recency, and with `periodic` the bytes themselves, may wait for the disk; ext4 commits as often."""
CONTAINS_KEYS = 2000
"""Keys looked up between two turns of the loop: about 1 ms."""
DELETE_BATCHES = 40
"""Batches of rows that a deletion erases itself, 10,000 chunks: it is for good before, and should not take long."""
GROUP_BYTES = 64 << 20
"""Bytes written before their rows are published: what a cancelled or killed store loses at most."""
CLOSE_SECONDS = 5.0


class DiskLife:
    """*home* and *counts* outlive this life; *wrap* stands between the tier and its slabs."""

    def __init__(
        self,
        config: DiskConfig,
        home: Home,
        admit: Admission,
        counts: "Counter[str]",
        wrap: Callable[[ByteIO], ByteIO],
    ) -> None:
        self._config = config
        self._admit = admit
        self._counts = counts
        self._wrap = wrap
        self.budget = Budget.of(config.size)
        self._directory = Directory(Arena(), self.budget.index)
        self._files = Files(config, self.budget, home)
        self._io: ByteIO = self._files.slabs
        self._worker = Worker(Path(config.path), config.threads, self._files.check)
        self._room = Room(self._directory, self._files, self._worker, counts)
        self._wake = trio.Event()
        self._due = math.inf
        self._unflushed = False
        self._failed = 0  # chunks that failed verification since the last flush
        self.reading = Reading(self._directory, self._files, self._worker, counts)
        self.ready = self.reading.ready

    @property
    def corrupt(self) -> bool:
        """The index file is no sound database: the next life is to begin empty."""
        return self._worker.corrupt

    # ---- the calls

    async def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        self._worker.check()
        there: list[bool] = []
        for i in range(0, len(keys), CONTAINS_KEYS):
            some = keys[i : i + CONTAINS_KEYS]
            found = await self.reading.query(some)
            there += [self._directory.contains(key) or name_of(key) in found for key in some]
        return there

    async def load(self, loads: Sequence[Load]) -> list[bool]:
        self._worker.check()
        views = [[flat(view) for view in load.shards] for load in loads]
        lengths = [tuple(len(view) for view in some) for some in views]
        reads = await self._begin(loads, lengths)
        held = [(i, read) for i, read in enumerate(reads) if read is not None]
        transfer = self._transfer([(read.offset, views[i]) for i, read in held])
        try:
            await self._worker.carry(transfer, transfer.read)
        finally:
            transfer.release()
            alive = [self._directory.end_read(read) if self.ready.is_set() else True for _, read in held]
            if self._directory.has_doomed:
                self._wake.set()
        if transfer.error is not None:
            self._after_failed_read(transfer, [read for _, read in held])
        hits = [False] * len(loads)
        for n, (i, read) in enumerate(held):
            if alive[n]:
                hits[i] = transfer.sums_of(n) == list(read.sums)
                if hits[i]:
                    self._directory.touch(read.key)
                else:
                    self._suspect(read)
        self._counts["hits"] += sum(hits)
        self._counts["misses"] += len(hits) - sum(hits)
        if any(hits):
            self._expect_flush()
        return hits

    async def store(self, records: Sequence[Record]) -> list[bool]:
        self._worker.check()
        taken = [False] * len(records)
        if not self.ready.is_set():
            self._counts["dropped_not_ready"] += len(records)
            await trio.lowlevel.checkpoint()
            return taken
        group: list[int] = []
        size = 0
        for i, record in enumerate(records):
            group.append(i)
            size += sum(view.nbytes for view in record.shards)
            if size >= GROUP_BYTES or len(group) == self._files.index.batch or i == len(records) - 1:
                await self._store_group(records, group, taken)
                group, size = [], 0
        return taken

    async def delete(self, namespace: bytes) -> None:
        self._worker.check()
        await self.ready.wait()
        self._worker.check()
        generation = self._directory.forget(namespace)
        with trio.CancelScope(shield=True):
            await self._worker.ask(self._files.index.forget, namespace, generation)
        self._wake.set()  # the housekeeper goes on with what is more, or when this call is cancelled
        await self._room.settle(DELETE_BATCHES)

    def statistics(self) -> dict[str, int | str]:
        return {
            **self._directory.statistics(),
            "bytes_capacity": self.budget.slabs,
            "bytes_taken": self._files.slabs.taken,
            "ready": int(self.ready.is_set()),
        }

    # ---- loading

    async def _begin(self, loads: Sequence[Load], lengths: Sequence[tuple[int, ...]]) -> list[Read | None]:
        rows = {} if self.ready.is_set() else await self.reading.query([load.key for load in loads])
        reads: list[Read | None] = []
        for load, n in zip(loads, lengths, strict=True):
            row = rows.get(name_of(load.key))
            if self.ready.is_set():
                reads.append(self._directory.begin_read(load.key, n))
            elif row is None:
                reads.append(self._directory.glance(load.key, n))
            else:
                read = Read.of_row(row)
                reads.append(read if read.lengths == n else None)
        return reads

    def _transfer(self, chunks: Sequence[tuple[int, Sequence[memoryview]]]) -> Transfer:
        return Transfer(self._io, chunks, direct=self._config.direct, check=self._files.check)

    def _suspect(self, read: Read) -> None:
        self._counts["corrupt"] += 1
        if not self._failed:
            what = read.key.digest.hex()[:16]
            log.warning("chunk %s of %s failed verification and is dropped", what, self._config.path)
            self._expect_flush()
        self._failed += 1
        if not self.ready.is_set():
            self.reading.suspects.append(read)
        elif self._directory.quarantine(read):
            self._wake.set()

    def _after_failed_read(self, transfer: Transfer, reads: Sequence[Read]) -> None:
        assert transfer.error is not None
        if transfer.error.errno == errno.EIO:  # a bad sector must not fence the tier again each time it is back
            for n, read in enumerate(reads):
                if n in transfer.failed_chunks:
                    self._suspect(read)
        raise self._worker.unavailable(transfer.error) from transfer.error

    # ---- storing

    async def _store_group(self, records: Sequence[Record], group: Sequence[int], taken: list[bool]) -> None:
        writes: dict[int, Write] = {}
        views = {i: [flat(view) for view in records[i].shards] for i in group}
        try:
            for i in group:
                if self._directory.contains(records[i].key):
                    taken[i] = True
                elif (write := await self._reserve(records[i], [len(view) for view in views[i]])) is not None:
                    writes[i] = write
            if writes:
                chunks = [(write.offset, views[i]) for i, write in writes.items()]
                transfer = self._transfer(chunks)
                try:
                    await self._worker.carry(transfer, transfer.write)
                finally:
                    transfer.release()
                if transfer.error is not None and transfer.error.errno in NO_SPACE:
                    self._drop_full(len(writes))  # a disk that writes elsewhere each time, in spite of fallocate
                    return
                if transfer.error is not None:
                    raise self._worker.unavailable(transfer.error) from transfer.error
                with trio.CancelScope(shield=True):
                    await self._publish(writes, transfer, taken)
            else:
                await trio.lowlevel.checkpoint()
        finally:
            for write in writes.values():
                self._directory.abort(write)
            if self._directory.has_doomed:
                self._wake.set()

    async def _publish(self, writes: dict[int, Write], transfer: Transfer, taken: list[bool]) -> None:
        """Rows into the index file, then into the directory. What is published, or may be, leaves *writes*."""
        if self._config.durability == "power":
            await self._worker.flush(self._files.slabs.flush)
        done = [(i, write, transfer.sums_of(n)) for n, (i, write) in enumerate(writes.items())]
        whole = [(i, write, sums) for i, write, sums in done if sums is not None]
        for i, _, _ in whole:
            del writes[i]
        try:
            await self._worker.ask(self._files.index.publish, [write.as_row(sums) for _, write, sums in whole])
        except Full:
            writes.update((i, write) for i, write, _ in whole)
            self._drop_full(len(whole))
            freed = self._directory.evict(sum(extent_of(write.lengths) for _, write, _ in whole))
            self._counts["evicted"] += freed  # their pages are for those that come next
            return
        for i, write, sums in whole:
            taken[i] = self._directory.publish(write, sums)
            self._counts["stored"] += taken[i]
        self._unflushed = True
        self._expect_flush()

    def _drop_full(self, count: int) -> None:
        self._counts["dropped_no_space"] += count
        self._room.note_full()

    async def _reserve(self, record: Record, lengths: Sequence[int]) -> Write | None:
        """Room for *record*: in a hole, in a new slab, or in place of what was least recently used."""
        if (reason := self._refusal(record.key, lengths)) is None:
            found = await self._room.make(record.key, record.parent, lengths)
            if isinstance(found, Write):
                return found
            reason = found
        self._counts[f"dropped_{reason}"] += 1
        return None

    def _refusal(self, key: ChunkKey, lengths: Sequence[int]) -> str | None:
        if len(lengths) > MAX_SHARDS or not 0 < extent_of(lengths) <= self.budget.slabs:
            return "size"
        if self._directory.knows(key):
            return "writing"
        return None if self._admit(key) else "admission"

    # ---- keeping house

    async def keep_house(self) -> None:
        """Erase what is doomed as it comes; write recency, and flush, when it is due. A failure fails the tier."""
        await self.ready.wait()
        try:
            while True:
                with trio.move_on_at(self._due):
                    await self._wake.wait()
                self._wake = trio.Event()
                await self._room.settle()
                if trio.current_time() >= self._due:
                    self._due = math.inf
                    await self._flush()
        except Unavailable as exc:
            log.warning("%s", self._worker.fail(exc))  # nobody waits for this task: the next call is told

    def _expect_flush(self) -> None:
        if self._due == math.inf:
            self._due = trio.current_time() + FLUSH_SECONDS
            self._wake.set()

    async def _flush(self) -> None:
        self._tell_failed()
        while touched := self._directory.take_touched(self._files.index.batch):
            await self._worker.ask(self._files.index.touch, touched)
        if self._config.durability == "periodic" and self._unflushed:
            self._unflushed = False
            await self._worker.flush(self._files.slabs.flush)
            await self._worker.ask(self._files.index.checkpoint)

    def _tell_failed(self) -> None:
        """One line for all that failed since the first of them, which had its own."""
        if self._failed > 1:
            log.warning("%d more chunks of %s failed verification and are dropped", self._failed - 1, self._config.path)
        self._failed = 0

    # ---- files

    async def start(self, *, anew: bool) -> None:
        """Open everything. *anew*: the index was found corrupt, begin empty."""
        try:
            await self._worker.index_thread.run(self._files.open, anew)
        except (OSError, sqlite3.Error) as exc:
            raise failure_of(self._config.path, exc) from exc
        self._io = self._wrap(self._files.slabs)
        self._counts["lost_index"] += self._files.index_lost
        self._counts["lost_changes"] += self._files.lost_changes

    async def end(self) -> None:
        """Write what is owed and close; a disk that hangs is left behind after 5 s, still locked by this process."""
        self._tell_failed()
        owed: list[Callable[[], None]] = []
        index = self._files.index
        if self._worker.failed is None and self.ready.is_set():
            while len(owed) < DELETE_BATCHES and (doomed := self._directory.take_doomed(index.batch)):
                owed.append(functools.partial(index.erase, doomed))
            while touched := self._directory.take_touched(index.batch):
                owed.append(functools.partial(index.touch, touched))
        close = functools.partial(
            self._files.close, owed, flush=self._unflushed and self._config.durability == "periodic"
        )
        with trio.move_on_after(CLOSE_SECONDS, shield=True) as scope:
            try:
                await self._worker.index_thread.run_owned(close, on_return=lambda: None)
            except (OSError, sqlite3.Error) as exc:
                log.warning("closing %s: %s", self._config.path, exc)
        if scope.cancelled_caught:
            log.warning("closing %s has not ended after %g s: its disk hangs", self._config.path, CLOSE_SECONDS)
        self._worker.index_thread.close()
