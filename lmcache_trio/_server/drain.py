"""The end of a server: it grants nothing more, and copies that are under way may end."""

from collections.abc import Callable

import attrs
import trio

__all__ = ["Drain"]


@attrs.define(eq=False)
class Drain:
    """Read by every part that grants slots, leases or reads."""

    stopping: bool = False
    """The server grants nothing more."""
    progress: trio.Event = attrs.field(factory=trio.Event)
    """Set when a copy has ended, or the peer that made it was lost."""

    async def wait_until(self, idle: Callable[[], bool]) -> None:
        """Wait until *idle* is true. It is asked again after each progress."""
        while not idle():
            self.progress = trio.Event()
            await self.progress.wait()
