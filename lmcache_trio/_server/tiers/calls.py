"""The calls into one tier, all of them: each is watched, and a failure, a bug or a hang fences the tier.

`_core.tiers.fence` decides when a fenced tier is tried again; here is the clock. This starts no task. A request with a
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
    """The calls into the tier *name*. A call that has not returned after *patience* seconds is overdue."""

    def __init__(self, name: str, fence: Fence, patience: float) -> None:
        self.name = name
        self.fence = fence
        self.under_way: dict[int, float] = {}
        """When each call becomes overdue, by the call's number. The calls of a fenced tier are not watched."""
        self.bugs = 0
        self.when_fenced: list[Callable[[], None]] = []
        """Called at once when the tier is fenced. None may wait. Each part that makes these calls adds its own."""
        self._patience = patience
        self._made = 0
        self._stirred = trio.Event()
        self._next = inf  # when `watch` looks for an overdue call
        self._fenced_since: float | None = None
        self._told = ""

    @property
    def open(self) -> bool:
        """Whether the tier may be called."""
        return self.fence.state is FenceState.OPEN

    async def make(self, fn: Callable[..., Awaitable[T]], *args: object, patience: float | None = None) -> T:
        """``await fn(*args)``. Unavailable: the call failed, which fences the tier, or the tier was fenced before."""
        if not self.open:
            raise Unavailable(f"the tier {self.name} is fenced: {self.fence.reason}")
        self._made += 1
        number, due = self._made, trio.current_time() + (self._patience if patience is None else patience)
        self.under_way[number] = due
        if due < self._next:
            self._next = due
            self._stirred.set()
        try:
            return await fn(*args)
        except Exception as exc:
            raise self.failed(exc) from exc
        finally:
            self.under_way.pop(number, None)

    def works(self) -> None:
        """The probe ended well: the tier may be called."""
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
        self._fence(reason)
        return Unavailable(reason)

    async def watch(self) -> None:
        """Return once the tier is fenced. An overdue call fences it."""
        while self.open:
            self._stirred = trio.Event()
            self._next = min(self.under_way.values(), default=inf)
            with trio.move_on_at(self._next):
                await self._stirred.wait()
            if min(self.under_way.values(), default=inf) <= trio.current_time():
                self._fence("a call has not returned in time")

    def _fence(self, reason: str) -> None:
        now = trio.current_time()
        if not self.fence.failed(reason, now):
            return  # it was fenced before
        self.under_way.clear()
        if self._fenced_since is None:
            self._fenced_since = now
        if reason != self._told:  # else each probe would tell it anew
            self._told = reason
            log.warning("the tier %s is fenced: %s (tried again in %.1f s)", self.name, reason, self.fence.until - now)
        self._stirred.set()
        for give_up in self.when_fenced:
            give_up()
