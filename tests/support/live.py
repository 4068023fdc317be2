"""A live server over tiers whose disks really fail: real time, real threads, and an engine that asks."""

import hashlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import trio

from lmcache_trio import Client, Config, Role, Server, open_client, open_server
from lmcache_trio.abc import ChunkKey
from lmcache_trio.testing.faulty_tier import FaultyTier

SHARD = 64 << 10


class WatchedTier(FaultyTier):
    """Says when it has answered a question: a server's first after each opening shows that it works."""

    answered = trio.Event()
    _opens = trio.Event()
    _opens.set()

    def stay_shut(self) -> None:
        """Once it is fenced it is not opened before `wait_works_again`, however long a test takes to look at it."""
        self._opens = trio.Event()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        await self._opens.wait()
        async with super().open():
            yield

    async def contains(self, keys: Sequence[ChunkKey]) -> Sequence[bool]:
        found = await super().contains(keys)
        self.answered.set()
        return found

    async def wait_works_again(self) -> None:
        """While it is fenced: until it is used again."""
        self.answered = trio.Event()
        self._opens.set()
        with trio.fail_after(60):
            await self.answered.wait()


async def wait_in_use(tier: WatchedTier, is_fenced: Callable[[], bool]) -> None:
    """Until *tier* is in use, again or still. It may have been opened, and have answered, before this is called."""
    with trio.fail_after(100):  # a busy machine's probes fail more often, and then come up to a minute later
        while is_fenced():
            tier.answered = trio.Event()
            with trio.move_on_after(0.2):
                await tier.answered.wait()


class Live:
    """A server with tiers, and an engine of one worker. Chunks hold their digest, over and over."""

    def __init__(self, server: Server, scheduler: Client, worker: Client) -> None:
        self.server, self.scheduler, self.worker = server, scheduler, worker
        self._sessions = itertools.count(1)

    async def store(self, chain: Sequence[bytes]) -> int:
        """How many of *chain* were new to memory."""
        session = next(self._sessions)
        await self.scheduler.lookup(session, chain, budget=0.0)
        async with self.worker.storing(session, b"", chain) as storing:
            for i, view in storing.slots.items():
                view[:] = chain[i] * (SHARD // 32)
        self.scheduler.end(session)
        return len(storing.slots)

    async def hits(self, chain: Sequence[bytes], budget: float | None = None) -> int:
        """How many of *chain* come back, and every byte of them is right."""
        session = next(self._sessions)
        answer = await self.scheduler.lookup(session, chain, budget=budget)
        if answer.chunks:
            async with self.worker.retrieving(answer.lease, 0, answer.chunks) as views:
                assert [bytes(view) for view in views] == [digest * (SHARD // 32) for digest in chain[: answer.chunks]]
        self.scheduler.end(session)
        return answer.chunks

    async def written_back(self) -> None:
        await self.server._parts.tiers.wait_idle()

    def tier(self, number: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = self.server.statistics()["tiers"][number]
        return found


OpenLive = Callable[..., AbstractAsyncContextManager[Live]]


@asynccontextmanager
async def open_live(address: str, *tiers: Any, **settings: Any) -> AsyncIterator[Live]:
    """A server with *tiers* and an empty memory, and its engine."""
    settings = {"grace": 2.0, "prefetch_budget": 30.0, **settings}  # that a busy machine is slow is no miss here
    config = Config(address=address, memory={"backend": "cpu", "size": 16 << 20}, **settings)
    async with open_server(config, tiers=tiers) as server:
        for runner in server._parts.tiers.runners:
            await runner.opened.wait()  # on a busy machine that may be later
        async with open_client(address, role=Role.SCHEDULER, engine="e") as scheduler:
            async with open_client(address, role=Role.WORKER, engine="e") as worker:
                assert await worker.register(b"f" * 32, SHARD, 16)
                yield Live(server, scheduler, worker)


def chain_of(name: str, count: int) -> list[bytes]:
    """Digests of a prompt."""
    return [hashlib.sha256(f"{name} {i}".encode()).digest() for i in range(count)]
