"""The one door to threads: calls that block, a thread with a queue, a Trio loop for hosts that have none.

Nothing else in this package imports `threading`. Every thread made here is a daemon: a call that hangs never keeps a
process from ending. A wait may be given up; a call that runs cannot, so whoever gives up a wait leaves its buffers to
the call until that returns. A forked child inherits no thread: portals and dedicated threads are not alive there.
"""

import atexit
import contextlib
import math
import os
import queue
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import trio

from lmcache_trio.errors import Misuse, Unavailable

__all__ = ["DedicatedThread", "Handoff", "Latch", "Portal", "offload", "offload_owned"]

T = TypeVar("T")
_EXIT_GRACE = 2.0
"""Seconds that a portal whose host forgot `stop` may take at interpreter exit."""


class Latch:
    """A mutex for state that host threads share. Not reentrant; hold it for a few lines and never wait under it."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exc: object) -> None:
        self._lock.release()


class Handoff(Generic[T]):
    """One value, from the loop to host threads that wait for it. A waiter sleeps on one lock: nothing is polled."""

    __slots__ = ("_gate", "_value", "done")

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._gate.acquire()
        self._value: T | None = None
        self.done = False

    def set(self, value: T) -> bool:
        """Hand *value* over. Only the first call counts; False: there was one already. Call it in one thread only."""
        if self.done:
            return False
        self._value = value
        self.done = True
        self._gate.release()
        return True

    def wait(self, timeout: float) -> T | None:
        """The value, waiting at most *timeout* seconds; None when it did not come. Every later call gives it again."""
        if not self.done and self._gate.acquire(timeout=_bounded(timeout)):
            self._gate.release()
        return self._value


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
    call = _Call(fn, args, on_return)
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


class _Call(Generic[T]):
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


class DedicatedThread:
    """One named thread with a first-in, first-out queue; a third of the cost of a thread pool's hop (36 us to 121).

    It starts with the first call. For what must stay in one thread (SQLite) or in order (copies).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._queue: queue.SimpleQueue[_Call[Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        _inherited.add(self)

    async def run(self, fn: Callable[..., T], *args: Any) -> T:
        """Run ``fn(*args)`` there. A cancellation withdraws a call that has not begun and waits for one that has."""
        return await self._submit(_Call(fn, args, None))

    async def run_owned(self, fn: Callable[..., T], *args: Any, on_return: Callable[[], None]) -> T:
        """As `offload_owned`: the wait may be cancelled, and *on_return* runs in the loop when the call truly ended."""
        return await self._submit(_Call(fn, args, on_return))

    def close(self) -> None:
        """Take no more calls; those in the queue are still done. Does not wait. Idempotent."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)

    async def _submit(self, call: _Call[T]) -> T:
        if self._closed:
            call.withdraw()
            raise Unavailable(f"the thread {self.name} is closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
            self._thread.start()
        self._queue.put(call)
        return await call.wait()

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            call.work()
            del call  # a waiting thread keeps no buffer alive

    def _forked(self) -> None:
        self._closed = True


class Portal:
    """A Trio loop in a thread of its own, for a synchronous host. Every wait of the host's is bounded."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._thread: threading.Thread | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope: trio.CancelScope | None = None
        self._ended = True
        self._stopping = False
        self._guard = threading.Lock()
        self._pending: set[_HostCall[Any]] = set()
        self._jobs: trio.MemorySendChannel[_HostCall[Any]] | None = None
        _inherited.add(self)

    @property
    def alive(self) -> bool:
        """Whether the loop runs, in this very process."""
        return not self._ended and self._token is not None

    def start(self, main: Callable[..., Awaitable[None]], *args: Any, timeout: float) -> Any:
        """Run ``await main(*args, task_status=…)`` in the thread; return what it passed to ``task_status.started()``.

        Raises what *main* raised before that; `Unavailable` when it took longer than *timeout* seconds (it is then
        cancelled); `Misuse` for a second start. What *main* raises later ends the portal and goes to
        `threading.excepthook`.
        """
        if self._thread is not None:
            raise Misuse(f"the portal {self.name} was started already: make another one")
        started: Handoff[_Outcome] = Handoff()
        self._ended = False
        self._thread = threading.Thread(target=self._work, args=(main, args, started), name=self.name, daemon=True)
        self._thread.start()
        try:
            outcome = started.wait(timeout)
        except BaseException:
            self.stop(0)
            raise
        if outcome is None:
            self.stop(0)
            raise Unavailable(f"{self.name} was not ready after {timeout:g} s")
        # Registered behind what main imported: exit hooks run last in, first out; the loop ends before its libraries.
        atexit.register(self._at_exit)
        return outcome.unwrap()

    def post(self, fn: Callable[..., object], *args: Any) -> bool:
        """Have the loop call ``fn(*args)`` soon, in order of posting; False when it has ended. *fn* must not raise."""
        token = self._token
        if token is None or self._ended:
            return False
        try:
            token.run_sync_soon(fn, *args)
        except trio.RunFinishedError:
            return False
        return True

    def call(self, async_fn: Callable[..., Awaitable[T]], *args: Any, timeout: float) -> T:
        """Run ``await async_fn(*args)`` in the loop and wait for it, *timeout* seconds at most.

        Raises what it raised; `Unavailable` when it is late (it is then cancelled) or the loop has ended.
        """
        self._refuse_loop_thread("call")
        call: _HostCall[T] = _HostCall(async_fn, args)
        with self._guard:
            self._pending.add(call)
        try:
            if not self.post(self._enqueue, call):
                raise Unavailable(f"{self.name} has ended")
            outcome = call.result.wait(timeout)
            if outcome is None:
                raise Unavailable(f"{self.name} did not answer within {timeout:g} s")
        except BaseException:
            self.post(call.scope.cancel)
            raise
        finally:
            with self._guard:
                self._pending.discard(call)
        value: T = outcome.unwrap()
        return value

    def stop(self, timeout: float) -> bool:
        """Cancel *main* and wait for the thread, *timeout* seconds at most; False if it has not ended. Idempotent."""
        thread = self._thread
        if thread is None or (self._ended and not thread.is_alive()):
            return True
        self._refuse_loop_thread("stop")
        self._stopping = True
        self.post(self._cancel)
        thread.join(_bounded(timeout))
        ended = not thread.is_alive()
        if ended:
            atexit.unregister(self._at_exit)
        return ended

    def _work(self, main: Callable[..., Awaitable[None]], args: tuple[Any, ...], started: "Handoff[_Outcome]") -> None:
        try:
            trio.run(self._run, main, args, started)
        except BaseException as exc:
            if not started.set(_Outcome(error=exc)):
                raise
        finally:
            self._ended = True
            started.set(_Outcome(error=Unavailable(f"{self.name} ended before it was ready")))
            gone = _Outcome(error=Unavailable(f"{self.name} has ended"))
            with self._guard:
                pending, self._pending = self._pending, set()
            for call in pending:
                call.result.set(gone)

    async def _run(
        self, main: Callable[..., Awaitable[None]], args: tuple[Any, ...], started: "Handoff[_Outcome]"
    ) -> None:
        self._jobs, jobs = trio.open_memory_channel[_HostCall[Any]](math.inf)
        error: BaseException | None = None
        async with trio.open_nursery() as calls:
            self._scope = calls.cancel_scope
            self._token = trio.lowlevel.current_trio_token()
            calls.start_soon(_serve_calls, calls, jobs)
            if self._stopping:  # the host gave up before there was a loop to tell
                calls.cancel_scope.cancel()
            try:
                await main(*args, task_status=_Started(started))
            except trio.Cancelled:
                raise
            except BaseException as exc:  # noqa: BLE001
                error = exc  # past the nursery, which would wrap it in a group
            calls.cancel_scope.cancel()
        if error is not None:
            raise error

    def _enqueue(self, call: "_HostCall[Any]") -> None:
        assert self._jobs is not None
        with contextlib.suppress(trio.BrokenResourceError):  # the loop is ending; `_work` answers
            self._jobs.send_nowait(call)

    def _cancel(self) -> None:
        if self._scope is not None:
            self._scope.cancel()

    def _refuse_loop_thread(self, verb: str) -> None:
        if threading.current_thread() is self._thread:
            raise Misuse(f"{verb}() of the portal {self.name} in its own loop would wait for itself")

    def _at_exit(self) -> None:
        self.stop(_EXIT_GRACE)

    def _forked(self) -> None:
        self._ended = True
        self._token = None
        self._thread = None
        self._guard = threading.Lock()


class _Outcome:
    """What a call came to."""

    __slots__ = ("error", "value")

    def __init__(self, value: Any = None, error: BaseException | None = None) -> None:
        self.value = value
        self.error = error

    def unwrap(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


class _Started(trio.TaskStatus[Any]):
    """The `task_status` of a portal's main."""

    def __init__(self, handoff: Handoff[_Outcome]) -> None:
        self._handoff = handoff

    def started(self, value: Any = None) -> None:
        if not self._handoff.set(_Outcome(value)):
            raise Misuse("task_status.started() was called twice")


class _HostCall(Generic[T]):
    """A host's call on its way through the loop."""

    def __init__(self, async_fn: Callable[..., Awaitable[T]], args: tuple[Any, ...]) -> None:
        self._async_fn = async_fn
        self._args = args
        self.result: Handoff[_Outcome] = Handoff()
        self.scope = trio.CancelScope()

    async def run(self) -> None:
        try:
            with self.scope:
                self.result.set(_Outcome(await self._async_fn(*self._args)))
        except trio.Cancelled:
            raise
        except BaseException as exc:  # noqa: BLE001 - the host's to handle, whatever it is
            self.result.set(_Outcome(error=exc))


async def _serve_calls(calls: trio.Nursery, jobs: "trio.MemoryReceiveChannel[_HostCall[Any]]") -> None:
    with jobs:
        async for call in jobs:
            calls.start_soon(call.run)


_inherited: "weakref.WeakSet[Portal | DedicatedThread]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for owner in list(_inherited):
        owner._forked()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _bounded(timeout: float) -> float:
    """*timeout* as a lock takes it: not negative, not above what the platform can wait."""
    return min(max(timeout, 0.0), threading.TIMEOUT_MAX)
