"""Where calls of a `FaultyTier` hang: tasks at an event, threads in a pipe. It decides nothing."""

import os
from contextlib import suppress
from pathlib import Path

import trio

from lmcache_trio.threads import Lock

__all__ = ["Gate"]


class Gate:
    """Shut from `open` on, until `release`, which is for good, or `close`. *fifo*: the pipe's name, if it has one."""

    def __init__(self, fifo: str) -> None:
        self._fifo = Path(fifo) if fifo else None
        self._barrier: _Barrier | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._released = False
        self._event = trio.Event()
        self._waiters: list[tuple[int, trio.Event]] = []
        self.hanging = 0

    def open(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        if self._fifo is not None:
            with suppress(FileExistsError):
                os.mkfifo(self._fifo, 0o600)
        if not self._released and self._barrier is None:
            self._barrier = _Barrier(self._fifo)

    def release(self) -> None:
        self._released = True
        self._let_go()

    def close(self) -> None:
        if not self._released:
            self._let_go()
            self._event = trio.Event()

    def _let_go(self) -> None:
        self._event.set()
        barrier, self._barrier = self._barrier, None
        if barrier is not None:
            barrier.release()

    async def wait_hanging(self, count: int) -> None:
        if self.hanging < count:
            event = trio.Event()
            self._waiters.append((count, event))
            await event.wait()

    async def hang(self) -> None:
        self._note(1)
        try:
            await self._event.wait()
        finally:
            self._note(-1)

    def block(self) -> None:
        """In a thread."""
        barrier, token = self._barrier, self._token
        if barrier is None or token is None:
            return
        token.run_sync_soon(self._note, 1)
        try:
            barrier.block()
        finally:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(self._note, -1)

    def _note(self, change: int) -> None:
        self.hanging += change
        for count, event in self._waiters:
            if self.hanging >= count:
                event.set()
        self._waiters = [(count, event) for count, event in self._waiters if not event.is_set()]


class _Barrier:
    """Blocks threads, once, until its release. Its files are closed when the last thread is out."""

    def __init__(self, fifo: Path | None) -> None:
        self._fifo = fifo
        self._ends = list(os.pipe()) if fifo is None else []
        self._guard = Lock()
        self._released = False
        self._inside = 0

    def block(self) -> None:
        with self._guard:
            if self._released:
                return
            self._inside += 1
        try:
            if self._fifo is None:
                os.read(self._ends[0], 1)
            else:
                os.close(os.open(self._fifo, os.O_RDONLY))
        finally:
            with self._guard:
                self._inside -= 1
                self._close_when_idle()

    def release(self) -> None:
        with self._guard:
            self._released = True
            if self._fifo is None:
                os.close(self._ends.pop())  # who reads at the other end wakes
            else:
                with suppress(FileNotFoundError):
                    self._ends.append(os.open(self._fifo, os.O_RDWR))  # as long as it has a writer nobody waits for one
            self._close_when_idle()

    def _close_when_idle(self) -> None:
        if self._released and not self._inside:
            while self._ends:
                os.close(self._ends.pop())
