"""A scheduler that is itself a Trio program: the cache is a client in its tree of tasks, with no thread beside it."""

from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from lmcache_trio import Client, Gone

Compute = Callable[[int], Awaitable[list[bytes]]]
Served = tuple[list[bytes], int]


async def serve(scheduler: Client, worker: Client, session: int, digests: list[bytes], compute: Compute) -> Served:
    """The KV of a prompt's chunks, and how many of them the cache had; *compute* gives those from a position on."""
    kv: list[bytes] = []
    try:
        with trio.move_on_after(0.5), suppress(Gone):  # late, or not valid any more when it was read, is a miss
            kv = await load(scheduler, worker, session, digests)
        reused = len(kv)
        kv += await compute(reused)
        async with worker.storing(session, digests[reused - 1] if reused else b"", digests[reused:]) as storing:
            for position, slot in storing.slots.items():  # what gets no slot is not stored
                slot[:] = kv[reused + position]
        return kv, reused
    finally:
        scheduler.end(session)  # a notice: nothing here can be interrupted


async def load(scheduler: Client, worker: Client, session: int, digests: list[bytes]) -> list[bytes]:
    """The leading chunks that the cache has. `Gone`: they are not there any more."""
    answer = await scheduler.lookup(session, digests)
    if not answer.chunks:
        return []
    scheduler.taken_notice(session, answer.lease)
    async with worker.retrieving(answer.lease, 0, answer.chunks) as slots:
        read = [bytes(slot) for slot in slots]
    return read
