"""How long the mover of the path `shm` waits for a server, and for the stores before a store."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from lmcache_trio._wire.messages import Commit, Committed, Reserve, Reserved
from lmcache_trio.adapters.specs import StoreSpec
from lmcache_trio.adapters.worker.jobs import Jobs, RegisteredKV, StoreJob
from lmcache_trio.adapters.worker.shm_mover import ShmMover

KV: Any = SimpleNamespace(groups=[SimpleNamespace(block_bytes=8)])
TIMEOUT = 5.0


class Server:
    """It drops every store, and takes *seconds* for each reply."""

    arena = object()
    chunk_tokens = 64

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.heard = 0
        self._ids = iter(range(1, 1000))

    def new_id(self) -> int:
        return next(self._ids)

    async def request(self, ask: Reserve | Commit, kind: type[Any], unwanted: Any = None) -> Reserved | Committed:
        await trio.sleep(self.seconds)
        self.heard += 1
        return Reserved(ask.id, b"", b"", b"", {"no_space": 1})


async def store(count: int, seconds: float) -> dict[str, int]:
    """What became of *count* stores that were submitted at one time."""
    client: Any = Server(seconds)
    mover = ShmMover("test", RegisteredKV(latest=KV, known=KV, chunk_tokens=64), TIMEOUT)
    jobs = Jobs(mover)
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            spec = StoreSpec("r", 1, b"", b"d" * 32, (0, 1), chunk_tokens=64)
            job = StoreJob(spec, np.arange(2), kv=KV, fence=None, reported=True)
            jobs.begin(job)
            nursery.start_soon(jobs.run, client, job)
    mover.close()
    return jobs.statistics()


async def test_a_store_is_not_dropped_because_many_others_ask_before_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    assert await store(20, seconds=1.0) == {"running": 0, "dropped_no_space": 20}


@pytest.mark.parametrize("count", [1, 20])
async def test_a_server_that_says_nothing_is_waited_for_once_or_twice_and_not_by_each_store(
    autojump_clock: trio.testing.MockClock, count: int
) -> None:
    assert await store(count, seconds=1000.0) == {"running": 0, "dropped_unavailable": count}
    assert trio.current_time() <= 2 * TIMEOUT
