"""A client process that stops in the middle of what its arguments name, says so in one line, and waits to be killed.

Run as `python client_process.py ADDRESS ENGINE POINT`. Told a line on its standard input, it goes on to the end.
"""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from lmcache_trio import Client, Role, open_client
from lmcache_trio._transport import introduce
from lmcache_trio._wire.codec import OFFSETS, encode
from lmcache_trio._wire.messages import PROTOCOL_VERSION, Commit, Done, Hello, Lookup, Register, Reset

SHARD = 64 << 10
STORED = [bytes([i]) * 32 for i in range(1, 4)]
NEW = [bytes([i]) * 32 for i in range(11, 14)]


@asynccontextmanager
async def engine(address: str, name: str) -> AsyncIterator[tuple[Client, Client]]:
    async with (
        open_client(address, role=Role.SCHEDULER, engine=name) as scheduler,
        open_client(address, role=Role.WORKER, engine=name) as worker,
    ):
        await worker.register(b"f" * 32, SHARD, 16)
        while worker.taken < worker.arena_size:
            await worker.ping()
        yield scheduler, worker


async def store(scheduler: Client, worker: Client, session: int, digests: list[bytes], fill: bytes) -> int:
    """Store whole slots of *fill*; returns how many chunks got one."""
    await scheduler.lookup(session, digests)
    async with worker.storing(session, b"", digests) as storing:
        for slot in storing.slots.values():
            slot[:] = fill * SHARD
    scheduler.end(session)
    await scheduler.ping()
    return len(storing.slots)


async def stop_here(word: str = "here") -> None:
    """Say so, and wait for a line."""
    print(word, flush=True)
    await trio.lowlevel.wait_readable(0)
    os.read(0, 100)


async def say_last(scheduler: Client, worker: Client, word: str) -> None:
    """Say one word whose reply is not waited for."""
    if word == "reset":
        scheduler.request_unheard(Reset(scheduler.new_id()))
    elif word == "done":
        pinned = await worker.retrieve((await scheduler.lookup(1, STORED)).lease, 0, 3)
        worker.request_unheard(Done(worker.new_id(), pinned.pin))
    else:
        await scheduler.lookup(1, NEW)
        reserved = await worker.reserve(1, b"", NEW)
        assert worker.arena is not None
        for offset in OFFSETS.unpack(reserved.offsets):
            worker.arena.view(offset, SHARD)[:] = b"X" * SHARD
        worker.request_unheard(Commit(worker.new_id(), reserved.reservation))


async def main(address: str, name: str, point: str) -> None:
    if point == "welcomed":
        await introduce(address, encode(Hello(PROTOCOL_VERSION, "doomed", os.urandom(16), Role.SCHEDULER, name)))
        await stop_here()
        return
    if point == "registering":
        async with open_client(address, role=Role.WORKER, engine=name, shards=2) as worker:
            worker.request_nowait(Register(worker.new_id(), b"f" * 32, SHARD, 16), lambda reply: None)
            await stop_here()
        return
    async with engine(address, name) as (scheduler, worker):
        if point == "looking up":
            for session in range(50):
                ask = Lookup(scheduler.new_id(), session, 0, b"".join(STORED), 3)
                scheduler.request_nowait(ask, lambda reply: None)
            await stop_here()
        elif point in ("reset", "commit", "done"):
            await say_last(scheduler, worker, point)
            await stop_here()
        elif point in ("leased", "reading"):
            answer = await scheduler.lookup(1, STORED)
            assert answer.chunks == 3
            if point == "leased":
                await stop_here()
            else:
                async with worker.retrieving(answer.lease, 0, 3):
                    await stop_here()
        else:
            await scheduler.lookup(1, NEW)
            async with worker.storing(1, b"", NEW) as storing:
                assert len(storing.slots) == 3
                if point != "reserved":
                    storing.slots[0][: SHARD // 2] = b"X" * (SHARD // 2)
                    if point == "written":
                        for slot in storing.slots.values():
                            slot[:] = b"X" * SHARD
                await stop_here()
                storing.slots[1][:] = b"X" * SHARD  # only a process that was continued comes here
            await stop_here("ended")


if __name__ == "__main__":
    trio.run(main, sys.argv[1], sys.argv[2], sys.argv[3])
