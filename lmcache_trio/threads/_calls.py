"""Calls that block, in a thread of Trio's, each bound to the task that waits for it or to what it owns.

It never abandons a buffer: the wait may be left, the call keeps what it uses until it returns.
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import attrs
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
    call = Call(fn, args, on_return, held)
    try:
        await held.acquire_on_behalf_of(call)
    except BaseException:
        on_return()
        raise
    try:
        trio.lowlevel.start_thread_soon(call.work, lambda _: None, name=getattr(fn, "__name__", "offload"))
    except BaseException:
        call.withdraw()
        raise
    return await call.wait()


@attrs.define(eq=False)
class Call(Generic[T]):
    """One call on its way through a thread: WAITING --work--> RUNNING --returned--> ENDED; withdrawn if WAITING.

    With *on_return* it is owned: what it uses belongs to it, and its wait may be left while it runs.
    """

    _fn: Callable[..., T]
    _args: tuple[Any, ...]
    _on_return: Callable[[], None] | None = None
    _limiter: trio.CapacityLimiter | None = None
    """It holds a token of this one, on its own behalf."""
    _token: trio.lowlevel.TrioToken = attrs.field(init=False, factory=trio.lowlevel.current_trio_token)
    _guard: Any = attrs.field(init=False, factory=threading.Lock)
    _task: trio.lowlevel.Task | None = attrs.field(init=False, default=None)
    _begun: bool = attrs.field(init=False, default=False)
    _withdrawn: bool = attrs.field(init=False, default=False)
    _value: T | None = attrs.field(init=False, default=None)
    _error: BaseException | None = attrs.field(init=False, default=None)

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
        if self._limiter is not None:
            self._limiter.release_on_behalf_of(self)
        if self._on_return is not None:
            self._on_return()

    def _returned(self) -> None:
        del self._fn, self._args  # no buffer outlives its call here
        task, self._task = self._task, None
        if self._limiter is not None:
            self._limiter.release_on_behalf_of(self)
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
