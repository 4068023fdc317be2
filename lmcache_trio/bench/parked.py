"""What other clients notice of lookups that are parked on a tier that hangs: their latencies, without and with them.

A server of its own, with a disk every thread of which hangs from its second question on. One engine looks up, retrieves
and stores in turn, all in memory, while another one's lookups wait; idle and parked take turns, so that a machine that
drifts drifts for both. It measures and prints nothing.
"""

import itertools
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from statistics import median

import attrs
import trio

from lmcache_trio._core.keys import DIGEST_BYTES
from lmcache_trio._wire.messages import Role
from lmcache_trio.bench.rows import percentile
from lmcache_trio.bench.run import scratch, serving
from lmcache_trio.client import Client, open_client
from lmcache_trio.errors import Unavailable

__all__ = ["VERBS", "Figures", "measure_parked"]

VERBS = ("lookup", "retrieve", "store")
HOT_CHUNKS = 32
"""An 8k prompt."""
SHARD = 64 << 10
"""Small, because bytes are not what is measured."""
OPERATIONS = 500
"""Of each verb, in a round."""
_WAIT = 600
"""Seconds that a parked lookup is let wait: longer than the run."""

_sessions = itertools.count(1)


@attrs.frozen
class Figures:
    """Seconds of one verb: medians over the rounds."""

    idle_p50: float
    idle_p99: float
    parked_p50: float
    parked_p99: float

    @property
    def ratio(self) -> float:
        """Of the 99th percentiles, parked to idle."""
        return self.parked_p99 / self.idle_p99


async def measure_parked(parked: int, rounds: int) -> dict[str, Figures]:
    """*parked* lookups wait at the same time. `Unavailable` when it could not be measured."""
    samples: dict[tuple[str, bool], list[list[float]]] = {(verb, on): [] for verb in VERBS for on in (False, True)}
    async with AsyncExitStack() as stack:
        folder = await stack.enter_async_context(scratch())
        address = f"unix://{folder}/server.sock"
        await stack.enter_async_context(serving(address, _sets(str(folder)), folder))
        scheduler, worker = await _engine(stack, address, "measured")
        other, _ = await _engine(stack, address, "parked")
        hot = await _stored(scheduler, worker)
        for i in range(rounds + 1):
            for on in (False, True):
                async with _parked(other, worker, parked if on else 0):
                    times = await _round(scheduler, worker, hot)
                for verb in VERBS:
                    samples[verb, on] += [times[verb]] if i else []  # the first round warms
    return {
        verb: Figures(
            *(
                median(percentile(times, share) for times in samples[verb, on])
                for on in (False, True)
                for share in (0.5, 0.99)
            )
        )
        for verb in VERBS
    }


def _sets(folder: str) -> list[str]:
    tier = {"backend": "faulty", "inner.backend": "disk", "inner.path": f"{folder}/tier", "inner.size": "64MiB"}
    fault = {"kind": "hang_thread", "on": "contains", "at": "[2]"}
    tier |= {f"faults.0.{key}": value for key, value in fault.items()}
    return [
        *(f"tiers.0.{key}={value}" for key, value in tier.items()),
        *("memory.size=256MiB", f"tier_timeout={_WAIT * 2}", f"prefetch_budget={_WAIT}", "device.backend=none"),
    ]


async def _engine(stack: AsyncExitStack, address: str, name: str) -> tuple[Client, Client]:
    scheduler = await stack.enter_async_context(open_client(address, role=Role.SCHEDULER, engine=name))
    worker = await stack.enter_async_context(open_client(address, role=Role.WORKER, engine=name))
    await worker.register(bytes(DIGEST_BYTES), SHARD, 16)
    return scheduler, worker


def _digests(count: int) -> list[bytes]:
    return [secrets.token_bytes(DIGEST_BYTES) for _ in range(count)]


async def _stored(scheduler: Client, worker: Client) -> list[bytes]:
    hot, session = _digests(HOT_CHUNKS), next(_sessions)
    await scheduler.lookup(session, hot, budget=0)
    async with worker.storing(session, b"", hot) as storing:
        if len(storing.slots) != HOT_CHUNKS:
            raise Unavailable(f"the server dropped what was to be looked up: {storing.dropped}")
    scheduler.end(session)
    return hot


@asynccontextmanager
async def _parked(client: Client, observer: Client, count: int) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(_park, client)
        with trio.fail_after(60):
            while (await observer.statistics())["held"]["prefetches"] != count:
                pass
        yield
        nursery.cancel_scope.cancel()


async def _park(client: Client) -> None:
    session = next(_sessions)
    try:
        await client.lookup(session, _digests(8), budget=_WAIT)
        raise Unavailable("a lookup was answered that was to wait")
    finally:
        client.end(session)


async def _round(scheduler: Client, worker: Client, hot: list[bytes]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {verb: [] for verb in VERBS}
    for session in itertools.islice(_sessions, OPERATIONS):
        fresh, began = _digests(1), time.perf_counter()
        answer = await scheduler.lookup(session, hot)
        looked_up = time.perf_counter()
        if answer.chunks != len(hot):
            raise Unavailable(f"{answer.chunks} chunks were found where {len(hot)} are")
        await worker.done((await worker.retrieve(answer.lease, 0, len(hot))).pin)
        retrieved = time.perf_counter()
        reserved = await worker.reserve(session, b"", fresh)
        if await worker.commit(reserved.reservation) != 1:
            raise Unavailable("a chunk was not stored")
        stored = time.perf_counter()
        scheduler.end(session)
        for verb, seconds in zip(VERBS, (looked_up - began, retrieved - looked_up, stored - retrieved), strict=True):
            times[verb].append(seconds)
    return times
