"""A Trio run that a synchronous test carries out itself, call by call: for state machines, whose rules are no tasks.

It goes on while a call is under way, in the test's own thread, and stands still between two; its clock moves when the
test says so. So whatever happens in it happens in the same order each time.
"""

import math
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import trio
import trio.testing

__all__ = ["Loop"]

T = TypeVar("T")
R = TypeVar("R")
_HANG = 60
"""Seconds of real time after which a call that does not return is a failure."""


class Loop(Generic[T]):
    """*value* is what *context* gave; `stop` leaves that."""

    def __init__(self, context: AbstractAsyncContextManager[T]) -> None:
        self.clock = trio.testing.MockClock()
        self._todo: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._over: list[Any] = []
        self._jobs, jobs = trio.open_memory_channel[Callable[[], Awaitable[None]]](math.inf)
        entered: list[tuple[trio.lowlevel.TrioToken, T]] = []

        async def run() -> None:
            async with context as value:
                entered.append((trio.lowlevel.current_trio_token(), value))
                async for job in jobs:
                    await job()

        trio.lowlevel.start_guest_run(
            run, run_sync_soon_threadsafe=self._todo.put, done_callback=self._over.append, clock=self.clock
        )
        self._carry_on(entered)
        self._token, self.value = entered[0]

    def call(self, async_fn: Callable[..., Awaitable[R]], *args: Any) -> R:
        """``await async_fn(*args)``, and then all that follows from it: until every task waits."""
        ended: list[tuple[R | None, Exception | None]] = []

        async def job() -> None:
            try:
                found = await async_fn(*args)
                await trio.testing.wait_all_tasks_blocked()
                ended.append((found, None))
            except Exception as exc:  # noqa: BLE001  (the caller's)
                ended.append((None, exc))

        self._token.run_sync_soon(self._jobs.send_nowait, job)
        self._carry_on(ended)
        value, error = ended[0]
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def stop(self) -> None:
        """Leave the context, whose deadlines pass at once."""
        self.clock.autojump_threshold = 0
        self._token.run_sync_soon(self._jobs.close)
        self._carry_on(self._over)
        self._over[0].unwrap()

    def _carry_on(self, until: list[Any]) -> None:
        while not until:
            self._todo.get(timeout=_HANG)()
            if self._over and until is not self._over:
                self._over[0].unwrap()
                raise AssertionError("the run has ended")
