"""A server in the test's loop, over real sockets, and client processes that are killed or stopped."""

import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from support.faults import client_process, worker_process

from lmcache_trio import Config, Server, open_server


@attrs.frozen(eq=False)
class Doomed:
    """A client process that stands where it was told to."""

    process: trio.Process

    async def says(self, word: str) -> None:
        assert self.process.stdout is not None
        with trio.fail_after(60):
            said = b""
            while not said.endswith(b"\n") and (more := await self.process.stdout.receive_some()):
                said += more
            assert said.decode().strip() == word

    async def told(self, words: str) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send_all(f"{words}\n".encode())

    async def go_on(self) -> None:
        await self.told("go on")


@attrs.frozen(eq=False)
class Scene:
    """A server, and what happens to it."""

    server: Server
    nursery: trio.Nursery

    def held(self) -> dict[str, Any]:
        held: dict[str, Any] = self.server.statistics()["held"]
        return held

    async def process(self, point: str, engine: str = "doomed") -> Doomed:
        """One that has come to *point*."""
        return await self._run(client_process.__file__, engine, point)

    async def worker(self, engine: str) -> Doomed:
        """An engine's worker, for its whole life."""
        return await self._run(worker_process.__file__, engine)

    async def _run(self, program: str, *arguments: str) -> Doomed:
        command = [sys.executable, program, self.server.address, *arguments]

        async def run(task_status: trio.TaskStatus[trio.Process]) -> None:
            await trio.run_process(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, check=False, task_status=task_status
            )

        doomed = Doomed(await self.nursery.start(run))
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
    async with open_server(config) as server, trio.open_nursery() as nursery:
        try:
            yield Scene(server, nursery)
        finally:
            nursery.cancel_scope.cancel()


@pytest.fixture
def scheme() -> str:
    """Of the server's address; tests of what hangs on the transport set it."""
    return "unix"


@pytest.fixture
def scenes(tmp_path: Path, scheme: str) -> Callable[..., AbstractAsyncContextManager[Scene]]:
    """Opens servers, with settings of the test's own."""
    return lambda **settings: open_scene(f"{scheme}://{tmp_path}/s.sock", **settings)
