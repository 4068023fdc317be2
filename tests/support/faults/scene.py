"""A server in the test's loop, over real sockets, and client processes that are killed or stopped."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from typing import Any

import attrs
import trio

from lmcache_trio import Config, Server, open_server
from lmcache_trio.testing.forks import Fork, Forks, engines, servers
from support.faults import client_process, worker_process


@attrs.frozen(eq=False)
class Doomed:
    """A client process that stands where it was told to."""

    process: Fork

    async def says(self, word: str) -> None:
        assert self.process.stdout is not None
        with trio.fail_after(60):
            await trio.lowlevel.wait_readable(self.process.stdout)
            assert self.process.stdout.readline().strip() == word  # it writes whole lines

    async def told(self, words: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{words}\n")
        self.process.stdin.flush()

    async def go_on(self) -> None:
        await self.told("go on")


@attrs.frozen(eq=False)
class Scene:
    """A server, and what happens to it."""

    server: Server
    processes: ExitStack

    def held(self) -> dict[str, Any]:
        held: dict[str, Any] = self.server.statistics()["held"]
        return held

    async def process(self, point: str, engine: str = "doomed") -> Doomed:
        """One that has come to *point*."""
        return await self._run(servers, client_process.__file__, engine, point)

    async def worker(self, engine: str) -> Doomed:
        """An engine's worker, for its whole life."""
        return await self._run(engines, worker_process.__file__, engine)

    async def _run(self, forks: Forks, program: str, *arguments: str) -> Doomed:
        process = forks.start([program, self.server.address, *arguments], stdin=True)
        self.processes.callback(process.close)
        self.processes.callback(process.kill)
        doomed = Doomed(process)
        await doomed.says("here")
        return doomed

    async def until(self, true: Callable[[dict[str, Any]], bool]) -> None:
        """The server runs in this loop: it only needs its turns."""
        with trio.fail_after(60):
            while not true(self.held()):
                await trio.lowlevel.checkpoint()


@asynccontextmanager
async def open_scene(address: str, **settings: Any) -> AsyncIterator[Scene]:
    memory = {"backend": "cpu", "size": settings.pop("size", 2 << 20)}
    config = Config(address=address, memory=memory, **{"grace": 0.0, **settings})
    async with open_server(config) as server:
        with ExitStack() as processes:
            yield Scene(server, processes)


Scenes = Callable[..., AbstractAsyncContextManager[Scene]]
