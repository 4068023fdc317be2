"""How the disk tier waits for its threads: one for the index file, a few for bytes.

A call that is cancelled ends when the threads that use its buffers have returned, and not before. An index file that
could not be written, or slabs that could not be flushed, fail the tier for good, until it is opened again and reads
what is really there.
"""

import functools
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import trio

from lmcache_trio.errors import ConfigError, Unavailable
from lmcache_trio.threads import DedicatedThread, offload
from lmcache_trio_backends.disk.index_file import is_corrupt
from lmcache_trio_backends.disk.transfer import Transfer

__all__ = ["Worker"]

T = TypeVar("T")


class Worker:
    """The threads of one open tier. *threads*: reads and writes in flight at one time.

    *check* raises OSError when the directory is another now. It is asked, in the thread, after a call has failed: a
    file that is not found any more is not the reason, then.
    """

    def __init__(self, path: Path, threads: int, check: Callable[[], None]) -> None:
        self._path = path
        self._check = check
        self._threads = threads
        self.index_thread = DedicatedThread("disk index")
        self._limiter = trio.CapacityLimiter(threads)
        self.failed: Unavailable | None = None
        self.corrupt = False

    def check(self) -> None:
        """Unavailable once the tier has failed."""
        if self.failed is not None:
            raise Unavailable(str(self.failed))

    def unavailable(self, exc: BaseException) -> Unavailable:
        """*exc* as callers know it."""
        return Unavailable(f"the disk tier in {str(self._path)!r}: {exc}")

    def fail(self, exc: BaseException) -> Unavailable:
        """Every call fails from now on; returns why."""
        if self.failed is None:
            self.failed = exc if isinstance(exc, Unavailable) else self.unavailable(exc)
        return self.failed

    async def ask(self, fn: Callable[..., T], *args: object) -> T:
        """Run it in the index file's thread. A failure is for good."""
        self.check()
        try:
            return await self.index_thread.run(self._checked, fn, *args)
        except (OSError, sqlite3.Error) as exc:
            self.corrupt = self.corrupt or is_corrupt(exc)
            raise self.fail(exc) from exc

    def _checked(self, fn: Callable[..., T], *args: object) -> T:
        try:
            return fn(*args)
        except (OSError, sqlite3.Error):
            self._check()
            raise

    async def flush(self, fn: Callable[[], None]) -> None:
        """Run it in one of the threads for bytes. A failure is for good.

        The kernel tells of bytes that it lost only once, to whoever flushes first; the next flush succeeds.
        """
        try:
            await offload(fn, limiter=self._limiter)
        except OSError as exc:
            raise self.fail(exc) from exc

    async def run(self, fn: Callable[..., T]) -> T:
        """Run it in one of the threads for bytes."""
        try:
            return await offload(fn, limiter=self._limiter)
        except (OSError, ConfigError) as exc:
            raise self.unavailable(exc) from exc

    async def carry(self, transfer: Transfer, move: Callable[[], None]) -> None:
        """Run *move* of *transfer* in as many threads as are worth it. A cancellation lets each finish its piece."""
        count = transfer.threads(self._threads)
        if count == 1:
            await offload(move, limiter=self._limiter)
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_when_cancelled, transfer)
            async with trio.open_nursery() as threads:
                for _ in range(count):
                    threads.start_soon(functools.partial(offload, move, limiter=self._limiter))
            nursery.cancel_scope.cancel()


async def _stop_when_cancelled(transfer: Transfer) -> None:
    try:
        await trio.sleep_forever()
    finally:
        transfer.stop()
