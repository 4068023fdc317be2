"""The clock branch: calls `Index.expire` when something is due, and `Index.sweep` while something was reset."""

import math
from collections.abc import Callable

import trio

__all__ = ["Clock"]

PIECE = 256
"""Chunks that are swept in one go, which takes about 1 ms; then all others get their turn."""


class Clock:
    """Sleeps until the next deadline. A part that makes an earlier one says so with `not_later_than`.

    *expire* is given the time, and returns when to call it again. *sweep* is told how much to do, and returns whether
    more is left: that is due at once.
    """

    def __init__(self, expire: Callable[[float], float], sweep: Callable[[int], bool]) -> None:
        self._expire = expire
        self._sweep = sweep
        self._next = -math.inf  # the first time, at once
        self._earlier = trio.Event()

    def not_later_than(self, when: float) -> None:
        """Something falls due at *when* (Trio's clock)."""
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
                continue  # an earlier deadline was made, and nothing is due yet
            self._next = self._expire(now)
            expired()
            if self._sweep(PIECE):
                self._next = now
