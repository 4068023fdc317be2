"""Calls that block, in a thread of Trio's, each bound to the task that waits for it or to what it owns.

It never abandons a buffer: the wait may be left, the call keeps what it uses until it returns.
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import trio

__all__ = ["Call", "offload", "offload_owned"]

T = TypeVar("T")


async def offload(fn: Callable[..., T], *args: Any, limiter: trio.CapacityLimiter | None = None) -> T:
    """Run ``fn(*args)`` in a thread. Cancelled before it begins or after it returned, never between."""
    return await trio.to_thread.run_sync(fn, *args, limiter=limiter, abandon_on_cancel=False)


async def offload_owned(
    fn: Callable[..., T], *args: Any, limiter: trio.CapacityLimiter | None = None, on_return: Callable[[], None]
) -> T:
    """Run ``fn(*args)`` in a thread; the wait may be cancelled, the call may not.

    What *fn* uses belongs to the call. *on_return* hands it back: it runs in the loop exactly once, when the call has
    returned or raised, cancelled or not, or when the wait was cancelled before the call began; and not at all when the
    loop ended first. It must not raise. The limiter's token is held until then too, so that a hung call counts.
    """
    held = limiter if limiter is not None else trio.to_thread.current_default_thread_limiter()
    call = Call(fn, args, on_return)
    try:
        await held.acquire_on_behalf_of(call)
    except BaseException:
        on_return()
        raise
    call.release = lambda: held.release_on_behalf_of(call)
    try:
        trio.lowlevel.start_thread_soon(call.work, lambda _: None, name=getattr(fn, "__name__", "offload"))
    except BaseException:
        call.release()
        on_return()
        raise
    return await call.wait()


class Call(Generic[T]):
    """One call on its way through a thread: WAITING --work--> RUNNING --returned--> ENDED; withdrawn if WAITING."""

    def __init__(self, fn: Callable[..., T], args: tuple[Any, ...], on_return: Callable[[], None] | None) -> None:
        self._fn = fn
        self._args = args
        self._on_return = on_return
        self._token = trio.lowlevel.current_trio_token()
        self._task: trio.lowlevel.Task | None = None
        self._guard = threading.Lock()
        self._begun = False
        self._withdrawn = False
        self._value: T | None = None
        self._error: BaseException | None = None
        self.release: Callable[[], None] = lambda: None

    def work(self) -> None:
        """In the thread."""
        with self._guard:
            if self._withdrawn:
                return
            self._begun = True
        try:
            self._value = self._fn(*self._args)
        except BaseException as exc:  # noqa: BLE001 - raised again in the task that waits
            self._error = exc
        with contextlib.suppress(trio.RunFinishedError):  # nobody is left to tell
            self._token.run_sync_soon(self._returned)

    async def wait(self) -> T:
        """In the loop. Only a call that is owned, or has not begun, may be left."""
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._abort)
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # no reference cycle through the traceback
        return self._value  # type: ignore[return-value]

    def withdraw(self) -> None:
        """In the loop: hand back what a call holds that will never begin."""
        self._task = None
        self.release()
        if self._on_return is not None:
            self._on_return()

    def _returned(self) -> None:
        del self._fn, self._args  # no buffer outlives its call here
        task, self._task = self._task, None
        self.release()
        try:
            if self._on_return is not None:
                self._on_return()
        finally:
            if task is not None:
                trio.lowlevel.reschedule(task)

    def _abort(self, raise_cancel: Any) -> trio.lowlevel.Abort:
        with self._guard:
            if not self._begun:
                self._withdrawn = True
        if self._withdrawn:
            self.withdraw()
            return trio.lowlevel.Abort.SUCCEEDED
        if self._on_return is None:
            return trio.lowlevel.Abort.FAILED
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED
