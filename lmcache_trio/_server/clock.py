"""The clock branch: calls `Index.expire` when something is due, and only then."""

import math
from collections.abc import Callable

import trio

__all__ = ["Clock"]


class Clock:
    """Sleeps until the next deadline. Whoever makes an earlier one says so with `not_later_than`."""

    def __init__(self, expire: Callable[[float], float]) -> None:
        self._expire = expire
        self._next = math.inf
        self._earlier = trio.Event()

    def not_later_than(self, when: float) -> None:
        """Something falls due at *when* (Trio's clock)."""
        if when < self._next:
            self._next = when
            self._earlier.set()

    async def run(self) -> None:
        while True:
            self._next = self._expire(trio.current_time())
            self._earlier = trio.Event()
            with trio.move_on_at(self._next):
                await self._earlier.wait()
