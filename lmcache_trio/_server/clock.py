"""The clock branch: calls `Index.expire` when a grant is due, and `Index.sweep` while stale chunks are left."""

import math
from collections.abc import Callable

import trio

__all__ = ["Clock"]

PIECE = 256
"""Chunks that are swept in one go, which takes about 1 ms. Then the other tasks of the loop run."""


class Clock:
    """Sleeps until the next deadline. A part that makes an earlier one says so with `not_later_than`.

    *expire* is given the time, and returns when to call it again. *sweep* is given a number of chunks, and returns
    whether more are left: then it is called again at once.
    """

    def __init__(self, expire: Callable[[float], float], sweep: Callable[[int], bool]) -> None:
        self._expire = expire
        self._sweep = sweep
        self._next = -math.inf  # so `expire` is called at once
        self._earlier = trio.Event()

    def not_later_than(self, when: float) -> None:
        """A deadline was made: *when*, on Trio's clock."""
        if when < self._next:
            self._next = when
            self._earlier.set()

    async def run(self, expired: Callable[[], None]) -> None:
        """Run until cancelled; *expired* is called after each `expire`."""
        while True:
            self._earlier = trio.Event()
            with trio.move_on_at(self._next):
                await self._earlier.wait()
            now = trio.current_time()
            if now < self._next:
                continue  # an earlier deadline was made, and is not due yet
            self._next = self._expire(now)
            expired()
            if self._sweep(PIECE):
                self._next = now
