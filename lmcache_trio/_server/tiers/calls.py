"""The calls into one tier, all of them: each is watched, and a failure, a bug or a hang fences the tier.

The fence's decisions stand in `_core.tiers.fence`; here is its clock. Nothing here starts a task. A request with a
deadline never waits for a call into a tier: it waits for an event, which a task of the tier sets.
"""

import logging
from collections.abc import Awaitable, Callable
from math import inf
from typing import TypeVar

import trio

from lmcache_trio._core.tiers.fence import Fence, FenceState
from lmcache_trio.errors import Unavailable

__all__ = ["GuardedCalls"]

log = logging.getLogger("lmcache_trio.server")

T = TypeVar("T")


class GuardedCalls:
    """The calls into the tier *name*, which end in an open or a fenced tier."""

    def __init__(self, name: str, fence: Fence) -> None:
        self.name = name
        self.fence = fence
        self.bugs = 0
        self.when_fenced: list[Callable[[], None]] = []
        """Called at once when the tier is fenced; none may wait. Each part that uses these calls adds its own."""
        self._stirred = trio.Event()
        self._next = inf
        self._fenced_since: float | None = None
        self._told = ""

    @property
    def open(self) -> bool:
        """Whether the tier may be asked."""
        return self.fence.state is FenceState.OPEN

    async def make(self, fn: Callable[..., Awaitable[T]], *args: object, patience: float | None = None) -> T:
        """``await fn(*args)``. Unavailable: it failed, and the tier is fenced; or it was already."""
        if not self.open:
            raise Unavailable(f"the tier {self.name} is fenced: {self.fence.reason}")
        call = self.fence.began(trio.current_time(), patience)
        if (due := self.fence.due()) < self._next:
            self._next = due
            self._stirred.set()
        try:
            return await fn(*args)
        except Exception as exc:
            raise self.failed(exc) from exc
        finally:
            self.fence.ended(call)

    def works(self) -> None:
        """The probe ended well: the tier may be asked."""
        now = trio.current_time()
        self.fence.works(now)
        if self._fenced_since is None:
            log.info("the tier %s is open", self.name)
        else:
            log.info("the tier %s is back, after %.1f s", self.name, now - self._fenced_since)
        self._fenced_since, self._told = None, ""

    def failed(self, exc: Exception) -> Unavailable:
        """A call into the tier raised *exc*: fence it. Returns the error for the task that waits for the call."""
        if isinstance(exc, Unavailable):
            reason = str(exc)
        else:
            self.bugs += 1
            reason = f"bug: {exc!r}"
            log.error("bug in the tier %s, which is fenced", self.name, exc_info=exc)
        if self.fence.failed(reason, trio.current_time()):
            self._fenced()
        return Unavailable(reason)

    async def watch(self) -> None:
        """Return once the tier is fenced; notice calls that hang."""
        while self.open:
            self._stirred = trio.Event()
            self._next = self.fence.due()
            with trio.move_on_at(self._next):
                await self._stirred.wait()
            if self.open and self.fence.check(trio.current_time()):
                self._fenced()

    def _fenced(self) -> None:
        now = trio.current_time()
        if self._fenced_since is None:
            self._fenced_since = now
        if self.fence.reason != self._told:  # else each probe would tell it anew
            self._told = self.fence.reason
            wait = self.fence.until - now
            log.warning("the tier %s is fenced: %s (tried again in %.1f s)", self.name, self.fence.reason, wait)
        self._stirred.set()
        for give_up in self.when_fenced:
            give_up()
