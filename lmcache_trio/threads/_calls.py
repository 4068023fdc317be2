"""Calls between a loop and threads: work that a thread does for a task, and values that the loop hands to host threads.

A call never abandons a buffer: the wait for it may be left, and the call keeps what it uses until it returns.
"""

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import attrs
import trio

from lmcache_trio.errors import Unavailable
from lmcache_trio.threads._forks import inherited

__all__ = ["DedicatedThread", "Handoff", "Lock", "bounded", "offload", "offload_owned"]

T = TypeVar("T")

Lock = threading.Lock
"""A mutex for state that threads share. Not reentrant; hold it for a few lines and never wait under it."""


async def offload(fn: Callable[..., T], *args: Any, limiter: trio.CapacityLimiter | None = None) -> T:
    """Run ``fn(*args)`` in a thread. A cancellation takes effect before the call begins or after it returned."""
    return await trio.to_thread.run_sync(fn, *args, limiter=limiter, abandon_on_cancel=False)


async def offload_owned(
    fn: Callable[..., T], *args: Any, limiter: trio.CapacityLimiter | None = None, on_return: Callable[[], None]
) -> T:
    """Run ``fn(*args)`` in a thread. The wait may be cancelled; the call runs on.

    The call owns what *fn* uses, and *on_return* hands it back. *on_return* must not raise. It runs in the loop exactly
    once: when the call has returned or raised, or when the wait was cancelled before the call began. It does not run if
    the loop ended first. The call holds the limiter's token until then too, so a hung call counts.
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
    """One call of a thread: WAITING --work--> RUNNING --returned--> ENDED. Only a WAITING call can be withdrawn.

    A call with *on_return* owns what it uses, so a task may stop waiting for it while it runs.
    """

    _fn: Callable[..., T]
    _args: tuple[Any, ...]
    _on_return: Callable[[], None] | None = None
    _limiter: trio.CapacityLimiter | None = None
    """The call holds one of its tokens."""
    _token: trio.lowlevel.TrioToken = attrs.field(init=False, factory=trio.lowlevel.current_trio_token)
    _guard: Any = attrs.field(init=False, factory=threading.Lock)
    _task: trio.lowlevel.Task | None = attrs.field(init=False, default=None)
    _begun: bool = attrs.field(init=False, default=False)
    _withdrawn: bool = attrs.field(init=False, default=False)
    _value: T | None = attrs.field(init=False, default=None)
    _error: BaseException | None = attrs.field(init=False, default=None)

    def work(self) -> None:
        """Make the call. Runs in the thread."""
        with self._guard:
            if self._withdrawn:
                return
            self._begun = True
        try:
            self._value = self._fn(*self._args)
        except BaseException as exc:  # noqa: BLE001 - raised again in the task that waits
            self._error = exc
        with contextlib.suppress(trio.RunFinishedError):  # the loop has ended, and no task waits
            self._token.run_sync_soon(self._returned)

    async def wait(self) -> T:
        """The call's value. Runs in the loop. A cancellation waits for a call that has begun, unless it is owned."""
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._abort)
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # no reference cycle through the traceback
        return self._value  # type: ignore[return-value]

    def withdraw(self) -> None:
        """The call will never begin: hand back what it holds. Runs in the loop."""
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


class DedicatedThread:
    """One named thread with a first-in, first-out queue, for calls that must stay in one thread (SQLite) or in order
    (copies).

    The thread starts with the first call. A call takes 36 us, where a thread pool takes 121.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._queue: queue.SimpleQueue[Call[Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        inherited.add(self)

    async def run(self, fn: Callable[..., T], *args: Any) -> T:
        """Run ``fn(*args)`` in the thread. A cancellation withdraws a call that has not begun, and waits for one that
        has.
        """
        call = Call(fn, args)
        self._put(call)
        return await call.wait()

    async def run_owned(self, fn: Callable[..., T], *args: Any, on_return: Callable[[], None]) -> T:
        """As `offload_owned`: the wait may be cancelled, and *on_return* runs in the loop when the call has ended."""
        call = Call(fn, args, on_return)
        try:
            self._put(call)
        except Unavailable:
            on_return()
            raise
        return await call.wait()

    def post(self, fn: Callable[..., object], *args: Any, on_return: Callable[[], None]) -> None:
        """Have the thread call ``fn(*args)``, in order, and return at once. *on_return* is as in `run_owned`.

        No task waits for the call, so *fn* must not raise: the error is dropped.
        """
        self._put(Call(fn, args, on_return))

    def close(self) -> None:
        """Take no more calls. Those in the queue are still made. Does not wait. Idempotent."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)

    def _put(self, call: Call[Any]) -> None:
        if self._closed:
            raise Unavailable(f"the thread {self.name} is closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
            self._thread.start()
        self._queue.put(call)

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            call.work()
            del call  # a waiting thread keeps no buffer alive

    def forked(self) -> None:
        self._closed = True


class Handoff(Generic[T]):
    """One value, from the loop to the host threads that wait for it. They sleep on a lock; nothing is polled."""

    __slots__ = ("_gate", "_value", "done")

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._gate.acquire()
        self._value: T | None = None
        self.done = False

    def set(self, value: T) -> bool:
        """Hand *value* over. False: a value was handed over before. Only one thread may call this."""
        if self.done:
            return False
        self._value = value
        self.done = True
        self._gate.release()
        return True

    def wait(self, timeout: float) -> T | None:
        """The value, or None if it has not come within *timeout* seconds. Later calls return the value again."""
        if not self.done and self._gate.acquire(timeout=bounded(timeout)):
            self._gate.release()
        return self._value


def bounded(timeout: float) -> float:
    """*timeout* as a lock takes it: not negative, not above what the platform can wait."""
    return min(max(timeout, 0.0), threading.TIMEOUT_MAX)
