"""The link between an adapter and its server: connect, serve until lost, wait until a server listens, and again.

It runs in a Trio loop in a thread of its own, because its host is synchronous. A missing server is never an error of
the host: the link logs it once, and waits by notification. A setting that the server refuses is an error at start.
Later it is logged and tried again, because the server may be replaced by another one. A bug ends one connection.
"""

import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Any, TypeVar

import trio

from lmcache_trio._transport.socket_files import NotToBeUsed
from lmcache_trio._wire.messages import Hello
from lmcache_trio.client import Client, connect, places_of, wait_server
from lmcache_trio.config.client import check_server_uids
from lmcache_trio.errors import LMCacheTrioError, Misuse, ProtocolError
from lmcache_trio.threads import Handoff, Lock, Portal, inherited

__all__ = ["REFUSED_WAIT", "Link", "logger"]

logger = logging.getLogger("lmcache_trio")
_T = TypeVar("_T")
REFUSED_WAIT = 5.0
"""Longest pause in seconds before a server that listens, but refused, is asked again: it does not tell when it would
accept.
"""


class Link:
    """Keeps one client. In the loop, *connected* prepares each new one (register, …), and *lost* is called at its end.

    *server_uids*: as `connect` has them.
    """

    def __init__(
        self,
        address: str,
        hello: Hello,
        *,
        connected: Callable[[Client], Awaitable[None]],
        lost: Callable[[], None],
        server_uids: Collection[int] | None = None,
    ) -> None:
        check_server_uids(server_uids)
        self.address = address
        self.client: Client | None = None
        """The client to use now, for any thread to read; None while no server is connected."""
        self.hello = hello
        """The Hello of the next connection. The adapter may replace it."""
        self.said = hello
        """The Hello of the present connection."""
        self._server_uids = server_uids
        self._connected = connected
        self._lost = lost
        self._portal = Portal(f"lmcache-trio {hello.client}")
        self._jobs: trio.Nursery | None = None
        """For the jobs of the present connection."""
        self._homeless: trio.Nursery | None = None
        """For jobs that come while there is no connection."""
        self._lock = Lock()
        self._first: Handoff[LMCacheTrioError | bool] = Handoff()
        self._told = self._why = ""
        inherited.add(self)

    def forked(self) -> None:
        """In a forked child no task reads from the server, so this adapter has none any more."""
        self.client = None

    @property
    def alive(self) -> bool:
        return self._portal.alive

    def start(self, timeout: float) -> None:
        """Wait *timeout* seconds at most for the first connection; log it if none came. `Misuse`: it was refused."""
        self._portal.start(self._run, timeout=10.0)
        came = self._first.wait(timeout)
        if isinstance(came, LMCacheTrioError):
            self._portal.stop(5.0)
            raise came
        if came is None and self._settle_first(False):
            where = ", nor at ".join(places_of(self.address))
            why = f" ({self._why})" if self._why else ""
            self._tell(f"no lmcache-trio server answers at {where}: going on without a cache until one does{why}")

    def stop(self, timeout: float) -> bool:
        """End the connection after its copies. False: that took longer than *timeout* seconds."""
        return self._portal.stop(timeout)

    def spawn(
        self, job: Callable[..., Awaitable[None]], *args: Any, refused: Callable[[], None] = lambda: None
    ) -> bool:
        """Have the loop run ``job(client, *args)`` under the connection. False: the loop has ended.

        Without a connection *client* is None. A job contains its own failures. The connection is closed after its jobs.
        If the loop is ending, it calls *refused* instead.
        """
        return self._portal.post(self._spawn, job, args, refused)

    def post(self, fn: Callable[..., object], *args: Any) -> bool:
        """Have the loop call ``fn(*args)`` soon."""
        return self._portal.post(fn, *args)

    def call(self, async_fn: Callable[..., Awaitable[_T]], *args: Any, timeout: float) -> _T:
        """Run ``async_fn(*args)`` in the loop and wait for it; `Unavailable` when it is late."""
        return self._portal.call(async_fn, *args, timeout=timeout)

    def _spawn(self, job: Callable[..., Awaitable[None]], args: tuple[Any, ...], refused: Callable[[], None]) -> None:
        for nursery, client in ((self._jobs, self.client), (self._homeless, None)):
            if nursery is not None:
                try:
                    nursery.start_soon(job, client, *args)
                    return
                except RuntimeError:
                    continue  # it has just closed
        refused()

    async def _run(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        try:
            await self._keep_connected()
        except BaseExceptionGroup as group:
            if group.split(trio.Cancelled)[1] is not None:
                raise
            await trio.lowlevel.checkpoint_if_cancelled()  # as one Cancelled, however many tasks it was

    async def _keep_connected(self) -> None:
        async with trio.open_nursery() as self._homeless:
            pause = 0.0
            while True:
                try:
                    self.said = self.hello
                    async with connect(self.address, self.said, self._server_uids) as client:
                        await self._serve(client)
                    pause = 0.0
                except (Misuse, ProtocolError) as exc:
                    if self._settle_first(exc):
                        return
                    self._tell(f"no cache: {exc}", logging.ERROR)
                except NotToBeUsed as exc:
                    self._settle_first(False)
                    self._tell(f"going on without a cache until the lmcache-trio server can be used: {exc}")
                except LMCacheTrioError as exc:
                    self._why = str(exc)
                    self._tell(f"the lmcache-trio server at {self.address} is not usable: {exc}", logging.DEBUG)
                except Exception:  # a bug of ours: it costs this one connection, and is logged
                    logger.exception("bug in the connection to %s, which is ended", self.address)
                if not await self._waited():
                    pause = REFUSED_WAIT
                await trio.sleep(pause)
                pause = min(REFUSED_WAIT, 2 * pause or 0.02)

    async def _waited(self) -> bool:
        """Wait until a server listens. False: it cannot be waited for now, which must not end the cache for good."""
        try:
            await wait_server(self.address)
            return True
        except Misuse as exc:
            self._tell(f"no cache: {exc}", logging.ERROR)
        except LMCacheTrioError as exc:
            self._tell(f"no lmcache-trio server can be waited for at {self.address}: {exc}", logging.DEBUG)
        except Exception:  # a bug of ours: it costs this one wait, and is logged
            logger.exception("bug in the wait for %s, which is begun anew", self.address)
        return False

    async def _serve(self, client: Client) -> None:
        failure: LMCacheTrioError | None = None
        try:
            async with trio.open_nursery() as jobs:
                self._jobs = jobs
                try:
                    await self._connected(client)
                except LMCacheTrioError as exc:
                    failure = exc
                else:
                    self.client = client
                    self._told = ""
                    self._settle_first(True)
                    await client.wait_closed()
                    self._tell(f"the lmcache-trio server at {self.address} is gone: going on without a cache")
                finally:
                    self.client = None
                    self._lost()
        finally:
            self._jobs = None
        if failure is not None:
            raise failure

    def _settle_first(self, value: LMCacheTrioError | bool) -> bool:
        with self._lock:
            return self._first.set(value)

    def _tell(self, what: str, level: int = logging.WARNING) -> None:
        """Log *what* once, however often it is told in a row."""
        if what != self._told:
            self._told = what
            logger.log(level, "%s", what)
