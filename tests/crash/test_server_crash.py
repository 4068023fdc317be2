"""The whole server, killed by SIGKILL at random points under load and started again on the same directory, many times.

Every hit of every life is read through a lookup and a retrieve, and compared byte by byte. What a chunk holds follows
from its digest alone, so a wrong byte shows, whoever wrote it and however many kills ago.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random

import pytest
import trio

from lmcache_trio import Client, Role, open_client
from lmcache_trio.errors import Gone, Unavailable
from lmcache_trio.testing.forks import Fork, servers

SHARD = 24_000
"""Bytes of a chunk: no whole number of pages."""
SIZE = 4 << 20
"""Of the disk: some 110 chunks, fewer than are stored, so that each life evicts."""
SETTINGS = {
    "memory.size": '"1MiB"',  # 42 chunks: most hits come from the disk, also late in a life
    "grace": "0.1",
    "tiers": f'[{{backend="disk", path="PATH", size={SIZE}, slab_size={1 << 20}}}]',
    "device": '{backend="none"}',
}
PROMPTS = 100
CHUNKS = 6
CLIENTS = 3
SEEDS = 10
LIVES = 2
"""Servers killed at the same time, on two cores."""
MOST_PROMPTS = 60
"""Served in one life: what three clients get through in a quarter of a second where two cores are free."""
KILLS = 11
"""Of one server. 10 seeds of 2 servers: 220."""


def prompt(number: int) -> list[bytes]:
    """Its digests. Prompts share their first chunks by tens."""
    names = [f"{number % 10 if i < 2 else number}/{i}" for i in range(CHUNKS)]
    return [hashlib.sha256(name.encode()).digest() for name in names]


@functools.cache
def content(digest: bytes) -> bytes:
    return Random(digest).randbytes(SHARD)


def physical(directory: Path) -> int:
    """Bytes that the file system has given away for it."""
    total = 0
    for file in [directory, *directory.iterdir()]:
        with suppress(FileNotFoundError):
            total += file.stat().st_blocks * 512
    return total


class Life:
    """One directory, and the servers that live on it one after the other."""

    def __init__(self, place: Path, seed: int) -> None:
        place.mkdir()
        self.directory = place / "kv"
        self.address = f"unix://{place}/s"
        self.random = Random(seed)
        self.counts: Counter[str] = Counter()
        self.sessions = 0
        self._served = trio.Event()

    async def run(self) -> None:
        for _ in range(KILLS):
            async with self.server() as process, self.clients() as (scheduler, worker):
                before = self.counts["hits"]
                for number in self.random.sample(range(PROMPTS), 12):
                    await self.serve(scheduler, worker, prompt(number), store=False)
                self.counts["from disk"] += self.counts["hits"] - before
                tier = (await scheduler.statistics())["tiers"][0]
                assert tier["backend"]["corrupt"] == 0
                assert not tier["fenced"], tier["reason"]
                async with trio.open_nursery() as load:
                    for _ in range(CLIENTS):
                        load.start_soon(self.use, scheduler, worker)
                    await self.wait_served(self.random.randrange(MOST_PROMPTS))  # any point is a good one
                    process.kill()
            self.counts["kills"] += 1
            assert physical(self.directory) <= SIZE

    @asynccontextmanager
    async def server(self) -> AsyncIterator[Fork]:
        sets = [f"{key}={value.replace('PATH', str(self.directory))}" for key, value in SETTINGS.items()]
        arguments = ["-m", "lmcache_trio", "serve", "--address", self.address]
        arguments += [word for setting in sets for word in ("--set", setting)]
        with servers.start(arguments) as process:
            try:
                assert process.stdout is not None
                await trio.lowlevel.wait_readable(process.stdout)
                assert "ready" in process.stdout.readline()
                yield process
            finally:
                process.kill()

    @asynccontextmanager
    async def clients(self) -> AsyncIterator[tuple[Client, Client]]:
        async with open_client(self.address, role=Role.SCHEDULER, engine="e") as scheduler:
            async with open_client(self.address, role=Role.WORKER, engine="e") as worker:
                await worker.register(b"f" * 32, SHARD, 16)
                while (await worker.statistics())["tiers"][0]["fenced"]:  # noqa: ASYNC110 - it is ready before, if busy
                    await trio.sleep(0.01)
                yield scheduler, worker

    async def use(self, scheduler: Client, worker: Client) -> None:
        """Serve prompts until the server is gone."""
        with suppress(Unavailable):
            while True:
                digests = prompt(self.random.randrange(PROMPTS))[: self.random.randrange(1, CHUNKS + 1)]
                await self.serve(scheduler, worker, digests)
                assert physical(self.directory) <= SIZE

    async def wait_served(self, prompts: int) -> None:
        """Until so many more were begun: time would decide how much a slow machine leaves on its disk."""
        last = self.sessions + prompts
        while self.sessions < last:
            self._served = trio.Event()
            await self._served.wait()

    async def serve(self, scheduler: Client, worker: Client, digests: Sequence[bytes], store: bool = True) -> None:
        """What an engine does for one prompt: ask, read and check what is there, store what is not."""
        self.sessions += 1
        self._served.set()
        session = self.sessions
        answer = await scheduler.lookup(session, digests)
        try:
            if answer.chunks:
                await self.check(worker, answer.lease, digests[: answer.chunks])
            rest = digests[answer.chunks :]
            if rest and store:
                async with worker.storing(session, digests[answer.chunks - 1] if answer.chunks else b"", rest) as given:
                    for position, slot in given.slots.items():
                        slot[:] = content(rest[position])
                    self.counts["stored"] += len(given.slots)
        finally:
            with suppress(Unavailable):
                scheduler.end(session)

    async def check(self, worker: Client, lease: bytes, digests: Sequence[bytes]) -> None:
        try:
            async with worker.retrieving(lease, 0, len(digests)) as views:
                read = [bytes(view) for view in views]
        except Gone:
            return
        assert read == [content(digest) for digest in digests], "wrong bytes were served"
        self.counts["hits"] += len(digests)


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_a_server_killed_at_random_points_serves_no_wrong_byte_and_its_hits_come_back(
    tmp_path: Path, seed: int
) -> None:
    lives = [Life(tmp_path / str(i), seed * LIVES + i) for i in range(LIVES)]
    with trio.fail_after(110):
        async with trio.open_nursery() as nursery:
            for life in lives:
                nursery.start_soon(life.run)
    for life in lives:
        print(dict(life.counts))
        assert life.counts["kills"] == KILLS
        assert life.counts["from disk"] > 10 * KILLS
        assert life.counts["stored"] > KILLS
