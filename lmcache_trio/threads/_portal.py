"""A Trio loop in a thread of its own, and the calls that a synchronous host makes into it.

Every wait of the host is bounded, and ends when the loop ends. A portal refuses to be started twice, and to be called
from its own loop.
"""

import atexit
import contextlib
import math
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import trio

from lmcache_trio.errors import Misuse, Unavailable
from lmcache_trio.threads._calls import Handoff, bounded
from lmcache_trio.threads._forks import inherited

__all__ = ["Portal"]

T = TypeVar("T")
_EXIT_GRACE = 2.0
"""Seconds that the interpreter's exit waits for a portal that was not stopped."""


class Portal:
    """A Trio loop in a thread of its own, for a synchronous host. Every wait of the host is bounded."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._thread: threading.Thread | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope: trio.CancelScope | None = None
        self._ended = True
        self._stopping = False
        self._guard = threading.Lock()
        self._pending: set[_HostCall[Any]] = set()
        self._queue: trio.MemorySendChannel[_HostCall[Any]] | None = None
        inherited.add(self)

    @property
    def alive(self) -> bool:
        """Whether the loop runs, in this process and not in its parent."""
        return not self._ended and self._token is not None

    def start(self, main: Callable[..., Awaitable[None]], *args: Any, timeout: float) -> Any:
        """Run ``await main(*args, task_status=…)`` in the thread; return what it passed to ``task_status.started()``.

        Raises the error of *main* before that; `Unavailable` if *main* took longer than *timeout* seconds, which
        cancels it; `Misuse` for a second start. A later error of *main* ends the portal and goes to
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
        # Registered after main's imports: exit hooks run last in, first out, so the loop ends before its libraries.
        atexit.register(self._at_exit)
        return outcome.unwrap()

    def post(self, fn: Callable[..., object], *args: Any) -> bool:
        """Have the loop call ``fn(*args)`` soon, in order of posting. False: the loop ended. *fn* must not raise."""
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

        Raises its error; `Unavailable` if it is late, which cancels it, or if the loop has ended.
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
        """Cancel *main* and wait for the thread, *timeout* seconds at most. False: it has not ended. Idempotent."""
        thread = self._thread
        if thread is None or (self._ended and not thread.is_alive()):
            return True
        self._refuse_loop_thread("stop")
        self._stopping = True
        self.post(self._cancel)
        thread.join(bounded(timeout))
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
        self._queue, queued = trio.open_memory_channel[_HostCall[Any]](math.inf)
        error: BaseException | None = None
        async with trio.open_nursery() as calls:
            self._scope = calls.cancel_scope
            self._token = trio.lowlevel.current_trio_token()
            calls.start_soon(_serve_calls, calls, queued)
            if self._stopping:  # the host gave up before the loop began
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
        assert self._queue is not None
        with contextlib.suppress(trio.BrokenResourceError):  # the loop is ending; `_work` answers
            self._queue.send_nowait(call)

    def _cancel(self) -> None:
        if self._scope is not None:
            self._scope.cancel()

    def _refuse_loop_thread(self, verb: str) -> None:
        if threading.current_thread() is self._thread:
            raise Misuse(f"{verb}() of the portal {self.name} in its own loop would wait for itself")

    def _at_exit(self) -> None:
        self.stop(_EXIT_GRACE)

    def forked(self) -> None:
        self._ended = True
        self._token = None
        self._thread = None
        self._guard = threading.Lock()


class _Outcome:
    """The value or the error of a call."""

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
    """A call of the host in the loop."""

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
        except BaseException as exc:  # noqa: BLE001 - raised again in the host
            self.result.set(_Outcome(error=exc))


async def _serve_calls(calls: trio.Nursery, queued: "trio.MemoryReceiveChannel[_HostCall[Any]]") -> None:
    with queued:
        async for call in queued:
            calls.start_soon(call.run)
