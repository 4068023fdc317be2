"""The threads of the disk tier, one for the index file and a few for the slabs, and the transfers of the latter.

A cancelled call ends when the threads that use its buffers have returned, and not before. If the index file cannot be
written, or the slabs not flushed, the tier fails until it is opened again and reads what is really on the disk.

The checksum of a shard is the xxh3 of its 1 MiB pieces' xxh3s. A piece that was just read is still in the core's cache,
so its checksum costs next to nothing (measured 53 GB/s, against 13 for 32 MiB at once). Several threads can take the
pieces of one shard in any order.
"""

import functools
import itertools
import sqlite3
import struct
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import attrs
import trio
import xxhash

from lmcache_trio.errors import ConfigError, Unavailable
from lmcache_trio.threads import DedicatedThread, offload
from lmcache_trio_backends.disk.index_file import is_corrupt
from lmcache_trio_backends.disk.records import ALIGNMENT

__all__ = ["DIRECT_PIECES", "PIECE", "IOThreads", "SlabTransfer"]

PIECE = 1 << 20
DIRECT_PIECES = 8
"""Pieces that one O_DIRECT call moves: the kernel does not read ahead for it, so each call must ask for more."""

T = TypeVar("T")


@attrs.frozen
class _Span:
    """Bytes that one call moves."""

    offset: int
    view: memoryview
    first_sum: int
    chunk: int


class SlabTransfer:
    """Chunks that one thread or several move between buffers and the slabs.

    *chunks* are (offset in the slabs, one buffer per shard). *move* is a `ByteIO`'s `read` or `write`, called for
    *pieces* pieces at a time. The threads use the buffers until `IOThreads.carry` has returned.
    """

    def __init__(
        self,
        chunks: Sequence[tuple[int, Sequence[memoryview]]],
        move: Callable[[int, memoryview], int | None],
        pieces: int = 1,
    ) -> None:
        self._move = move
        self._shards: list[list[tuple[int, int]]] = []  # of each chunk: (its first checksum, how many)
        self.spans: list[_Span] = []
        count, unit = 0, pieces * PIECE
        for chunk, (offset, views) in enumerate(chunks):
            shards = []
            for view in views:
                size, flat = view.nbytes, view.cast("B")
                for at in range(0, size, unit):
                    self.spans.append(_Span(offset + at, flat[at : at + unit], count + at // PIECE, chunk))
                shards.append((count, -(-size // PIECE)))
                count += shards[-1][1]
                offset += -(-size // ALIGNMENT) * ALIGNMENT  # each shard begins on a page
            self._shards.append(shards)
        self._sums = array("Q", bytes(8 * count))
        self._moved = bytearray(count)
        self._next = itertools.count()
        self.stopped = False
        self.error: OSError | None = None
        self.failed_chunks: set[int] = set()

    def run(self, check: Callable[[], None]) -> None:
        """In a thread: call *check*, then move spans until none is left, one fails, or the transfer is stopped."""
        chunk = -1
        try:
            check()
            while not self.stopped and (i := next(self._next)) < len(self.spans):
                span = self.spans[i]
                chunk = span.chunk
                moved = self._move(span.offset, span.view)
                if moved is None or moved == len(span.view):
                    for number, at in enumerate(range(0, len(span.view), PIECE), span.first_sum):
                        self._sums[number] = xxhash.xxh3_64_intdigest(span.view[at : at + PIECE])
                        self._moved[number] = 1
        except OSError as exc:
            self.stopped = True
            self.error = self.error or exc
            if chunk >= 0:
                self.failed_chunks.add(chunk)

    def sums_of(self, chunk: int) -> tuple[int, ...] | None:
        """The checksums of a chunk's shards; None unless all its bytes were moved."""
        sums = []
        for first, count in self._shards[chunk]:
            if not all(self._moved[first : first + count]):
                return None
            sums.append(xxhash.xxh3_64_intdigest(struct.pack(f"<{count}Q", *self._sums[first : first + count])))
        return tuple(sums)


class IOThreads:
    """The threads of one open tier. *count*: reads and writes in flight at one time.

    *check* raises OSError if the tier's directory is gone or replaced. A thread calls it before it moves bytes, and
    after a failed call: a lost directory is then the reason.
    """

    def __init__(self, path: Path, count: int, check: Callable[[], None]) -> None:
        self._path = path
        self._check = check
        self._count = count
        self._limiter = trio.CapacityLimiter(count)
        self.index_thread = DedicatedThread("disk index")
        self.failed: Unavailable | None = None
        self.corrupt = False
        """The index file is not a sound database: the next opening begins empty."""

    def unavailable(self, exc: BaseException) -> Unavailable:
        """*exc* as a tier's callers know it."""
        return Unavailable(f"the disk tier in {str(self._path)!r}: {exc}")

    def fail(self, exc: BaseException) -> Unavailable:
        """Fail every call from now on. Returns the reason."""
        if self.failed is None:
            self.failed = exc if isinstance(exc, Unavailable) else self.unavailable(exc)
        return self.failed

    async def ask(self, fn: Callable[..., T], *args: object) -> T:
        """Run *fn* in the index file's thread. A failure fails the tier."""
        if self.failed is not None:
            raise Unavailable(str(self.failed))
        try:
            return await self.index_thread.run(fn, *args)
        except (OSError, sqlite3.Error) as exc:
            with trio.CancelScope(shield=True):
                reason = await self.index_thread.run(self._reason_of, exc)
            self.corrupt = self.corrupt or is_corrupt(reason)
            raise self.fail(reason) from exc

    def _reason_of(self, exc: OSError | sqlite3.Error) -> OSError | sqlite3.Error:
        try:
            self._check()
        except OSError as gone:
            return gone
        return exc

    async def flush(self, fn: Callable[[], None]) -> None:
        """Run *fn* in a thread for slabs. A failure fails the tier.

        The kernel reports lost bytes only once, to the first flush after the loss; the next flush succeeds.
        """
        try:
            await offload(fn, limiter=self._limiter)
        except OSError as exc:
            raise self.fail(exc) from exc

    async def run(self, fn: Callable[..., T]) -> T:
        """Run *fn* in a thread for slabs."""
        try:
            return await offload(fn, limiter=self._limiter)
        except (OSError, ConfigError) as exc:
            raise self.unavailable(exc) from exc

    async def carry(self, transfer: SlabTransfer) -> None:
        """Carry out *transfer*. After a cancellation each thread finishes its span.

        Below 4 spans per thread the start of another thread costs more than it saves.
        """
        count = max(1, min(self._count, len(transfer.spans) // 4))
        move = functools.partial(offload, transfer.run, self._check, limiter=self._limiter)
        try:
            if count == 1:
                await move()
                return
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_stop_when_cancelled, transfer)
                async with trio.open_nursery() as threads:
                    for _ in range(count):
                        threads.start_soon(move)
                nursery.cancel_scope.cancel()
        finally:
            for span in transfer.spans:
                span.view.release()  # though a traceback may keep the transfer
            transfer.spans.clear()


async def _stop_when_cancelled(transfer: SlabTransfer) -> None:
    try:
        await trio.sleep_forever()
    finally:
        transfer.stopped = True
