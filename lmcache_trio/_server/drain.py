"""The end of a server: nothing new is given out, and copies that are under way may end."""

from collections.abc import Callable

import trio

__all__ = ["Drain"]


class Drain:
    """*stopping* is read wherever slots, leases or reads are given out."""

    def __init__(self) -> None:
        self.stopping = False
        self._progress = trio.Event()

    def begin(self) -> None:
        """Give out nothing more from now on."""
        self.stopping = True

    def note_progress(self) -> None:
        """A copy has ended, or the peer that made it was lost."""
        if self.stopping:
            self._progress.set()

    async def wait_until(self, idle: Callable[[], bool]) -> None:
        """Wait until *idle* is true; it is asked again after each progress."""
        while not idle():
            self._progress = trio.Event()
            await self._progress.wait()
