"""The file of records: a JSON line per lookup, written in a thread, and rotated by size.

A lookup only puts its record into a queue, which is bounded: a disk that is slow or full costs records, which are
counted, and delays no lookup.
"""

import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import trio

from lmcache_trio._server.counts import Counts
from lmcache_trio.config import Records
from lmcache_trio.errors import ConfigError
from lmcache_trio.threads import offload_owned

__all__ = ["MOST_QUEUED", "RecordFile", "RecordQueue", "open_records"]

log = logging.getLogger("lmcache_trio.server")

MOST_QUEUED = 16_384
"""Records that wait to be written, some 10 MB; one more is dropped."""
AT_ONCE = 1024
"""Records that are written in one go, some 600 KB."""


class RecordFile:
    """The file at *path*, and the former ones: path.1 is the latest of them. Used by one thread at a time."""

    def __init__(self, path: str, most_bytes: int, former: int) -> None:
        self._path = path
        self._most_bytes = most_bytes
        self._former = former

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Append a line for each record. A file that is full becomes path.1 before. `OSError`: none is written."""
        lines = b"".join(json.dumps(record, separators=(",", ":")).encode() + b"\n" for record in records)
        descriptor = self._open()
        try:
            before = os.fstat(descriptor).st_size
            if before and before + len(lines) > self._most_bytes:
                self._rotate()
                os.close(descriptor)
                descriptor, before = self._open(), 0
            try:
                while lines:
                    lines = lines[os.write(descriptor, lines) :]
            except OSError:
                with suppress(OSError):
                    os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)

    def check(self) -> None:
        """`OSError`: the file cannot be written."""
        os.close(self._open())

    def _open(self) -> int:
        """Anew each time: a file that was moved away is not written on."""
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def _rotate(self) -> None:
        names = [self._path, *(f"{self._path}.{number}" for number in range(1, self._former + 1))]
        if len(names) == 1:
            os.unlink(self._path)
        for name, older in reversed(list(pairwise(names))):
            with suppress(FileNotFoundError):
                os.replace(name, older)


class RecordQueue:
    """The queue of records, and the task that writes them."""

    def __init__(self, file: RecordFile, counts: Counts) -> None:
        self._file = file
        self._counts = counts
        self._queue: list[dict[str, Any]] = []
        self._is_writing = False
        self._stirred = trio.Event()
        self._idle = trio.Event()
        self._warned = False

    def write(self, record: dict[str, Any]) -> None:
        """Queue *record*. Never waits: with too many in the queue it is dropped and counted."""
        if len(self._queue) >= MOST_QUEUED:
            self._counts.events["records_dropped"] += 1
            return
        self._queue.append(record)
        self._stirred.set()

    async def wait_idle(self) -> None:
        """Wait until all records that are queued are written."""
        while self._queue or self._is_writing:
            self._idle = trio.Event()
            await self._idle.wait()

    async def run(self) -> None:
        """Write until cancelled. A call that hangs in its thread keeps the others waiting, and no end of the server."""
        limiter = trio.CapacityLimiter(1)
        while True:
            await self._stirred.wait()
            self._stirred = trio.Event()
            while self._queue:
                taken = self._queue[:AT_ONCE]
                del self._queue[:AT_ONCE]
                self._is_writing = True
                try:
                    await offload_owned(self._file.write, taken, limiter=limiter, on_return=lambda: None)
                    self._counts.events["records_written"] += len(taken)
                    self._warned = False
                except OSError as exc:
                    self._counts.events["records_dropped"] += len(taken)
                    if not self._warned:
                        self._warned = True
                        log.warning("records cannot be written and are dropped: %s", exc)
                finally:
                    self._is_writing = False
            self._idle.set()


def open_records(settings: Records, counts: Counts) -> RecordQueue | None:
    """The records as *settings* say; None if they name no file. `ConfigError`: it cannot be written."""
    if not settings.path:
        return None
    file = RecordFile(settings.path, settings.size, settings.former)
    try:
        file.check()
    except OSError as exc:
        raise ConfigError("records.path", f"cannot write {settings.path}: {exc.strerror}; give another") from exc
    return RecordQueue(file, counts)
